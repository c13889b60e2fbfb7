"""Gives a skeleton the layers that an adapter was trained on, where the model has them fused into one."""

from __future__ import annotations

from collections.abc import Mapping

from peft import LoraConfig
from torch import nn

from lorafx.errors import AdapterMismatchError
from lorafx.fused_layers import FusedLayer, Fusions, refuse_interleaved

PREFIX = "base_model.model."


def graft(name: str, bare: nn.Module, config: LoraConfig, shapes: Mapping[str, tuple[int, ...]], f: Fusions) -> None:
    """Add to the skeleton ``bare`` the parts of fused layers that tensors of these names and ``shapes`` are for.

    A pattern among the config's targets that hits the fused layer too does not mean it: without tensors of its own the
    layer goes.

    AdapterMismatchError: the parts don't fit, or where one stands can't be told
    UnsupportedModelError: the model's layers hold the parts in another order
    """
    widths = {}
    for key, shape in shapes.items():
        path, mark, _ = key.partition(".lora_B")
        if mark and len(shape) == 2:
            widths[path.removeprefix(PREFIX)] = shape[0]
    there = {path for path, _ in bare.named_modules()}
    alike: dict[
        str, set[int]
    ] = {}  # of what the model lacks: elsewhere it may have layers that are called as parts are
    for path, width in widths.items():
        if path not in there:
            alike.setdefault(path.rpartition(".")[2], set()).add(width)
    adapted = {path.rpartition(".")[2] for path in widths}
    refuse_interleaved(name, bare, adapted)
    for layer in f.layers(bare):
        if (adapted if layer.own else alike.keys()).isdisjoint(layer.parts):
            continue
        parent_path, _, own_name = layer.path.rpartition(".")
        parent = bare.get_submodule(parent_path)
        if not layer.own:
            for part, width in _widths(name, layer, widths, alike).items():
                parent.add_module(part, nn.Linear(layer.in_features, width, bias=False, device="meta"))
        if isinstance(config.target_modules, str) and own_name not in adapted:
            delattr(parent, own_name)


def _widths(name: str, layer: FusedLayer, widths: Mapping[str, int], alike: Mapping[str, set[int]]) -> dict[str, int]:
    """Of every part: as the model has it, else as the file has it; of what neither says any that is left.

    widths: of the B's in the file, by the path of their layer; alike: by the last part of it
    """
    if layer.widths is not None:
        return dict(zip(layer.parts, layer.widths, strict=True))
    found: dict[str, int] = {}
    for part in layer.parts:
        # names in old files may lack a prefix, or have another; then all layers have to agree
        same = alike.get(part, set())
        width = widths.get(layer.path_of(part), min(same) if len(same) == 1 else None)
        if width is not None:
            found[part] = width
    if not found:
        raise AdapterMismatchError(
            f"adapter {name!r} has parts of several widths for layers like {layer.path}, and none for this one. Say how"
            f" wide its parts are with lorafx.compile(..., fused=...)."
        )
    layer.place(found, f"adapter {name!r}")
    left, missing = layer.out_features - sum(found.values()), [part for part in layer.parts if part not in found]
    return {**found, **{part: max(left // len(missing), 1) for part in missing}}
