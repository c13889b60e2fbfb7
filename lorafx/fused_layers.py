"""Layers that compute several projections at once, under adapters that were trained on each of these alone.

A fused layer holds its parts one after the other in its output: ``qkv_proj`` is q, then k, then v. An adapter of
``q_proj`` so belongs to a slice of it, at a rank of its own, and its site in the bank is called what the part would be
called: the layer's neighbour, ``...self_attn.q_proj``. How wide the parts are is known from what was said, from the
parts themselves where they are still there (diffusers), from the model's config, or else from the adapter's own B's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lorafx.errors import AdapterMismatchError, LorafxError, UnsupportedModelError
from lorafx.quantised import features_of

PARTS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
EVEN = {"gate_up_proj"}  # the parts multiply each other, so they are equally wide
# Each head's q, k and v stand together, so that no part is a slice: by the layer's name, or by the kind of model.
INTERLEAVED_LAYERS = {"query_key_value", "wqkv"}
INTERLEAVED_MODELS = {"codegen", "minimax"}
INSTEAD = "Train the adapter on the fused layer, or use a model whose projections are separate."


@dataclass(frozen=True)
class Part:
    """One projection: columns ``start`` to ``start + width`` of what the layer at ``layer`` returns."""

    layer: str
    start: int
    width: int


@dataclass(frozen=True)
class FusedLayer:
    """One fused layer of a model. widths: of its parts, in order; None where the model does not say.

    own: the parts stand beside it as modules, and either they run or it does (diffusers)
    """

    path: str
    in_features: int
    out_features: int
    parts: tuple[str, ...]
    widths: tuple[int, ...] | None
    own: bool

    def path_of(self, part: str) -> str:
        parent = self.path.rpartition(".")[0]
        return f"{parent}.{part}" if parent else part

    def place(self, widths: Mapping[str, int], whose: str) -> dict[str, Part]:
        """Where the parts of these widths stand, counted from the left, or else from the right.

        AdapterMismatchError: they don't fit, or a part between others that are not known; ``whose`` widths, for it
        """
        known = [widths.get(part) for part in self.parts]
        total = sum(width for width in known if width is not None)
        full = None not in known
        if total > self.out_features or (full and total != self.out_features):
            raise AdapterMismatchError(
                f"{whose} does not fit {self.path}, which is {self.out_features} wide: its parts are"
                f" {_listed(widths)}. Is it an adapter of another model?"
            )
        found: dict[str, Part] = {}
        for i, (part, width) in enumerate(zip(self.parts, known, strict=True)):
            if width is None:
                continue
            if None not in known[:i]:
                start = sum(known[:i])
            elif None not in known[i:]:
                start = self.out_features - sum(known[i:])
            else:
                raise AdapterMismatchError(
                    f"{whose} adapts {part}, and where that stands in {self.path} can't be told from"
                    f" {_listed(widths)} alone. Say how wide its parts are: lorafx.compile(..., fused="
                    f"{{{self.path.rpartition('.')[2]!r}: {{{', '.join(f'{p!r}: ...' for p in self.parts)}}}}})."
                )
            found[part] = Part(self.path, start, width)
        return found


def _listed(widths: Mapping[str, int]) -> str:
    return ", ".join(f"{part} {width}" for part, width in widths.items())


@dataclass(frozen=True)
class Fusions:
    """Which layers are fused, by the last part of their path, and how wide their parts are where that was said."""

    parts: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: PARTS)
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def parse(cls, fused: Any) -> Fusions:
        """``fused``: of ``lorafx.compile``, ``{layer: parts in order}`` or ``{layer: {part: width}}``; None: the
        usual names. LorafxError: something else, or a layer whose parts are no slices."""
        if fused is None:
            return cls()
        if not isinstance(fused, Mapping) or not all(isinstance(name, str) and name for name in fused):
            raise LorafxError(f"got fused={fused!r}; expected a dict such as {{'qkv_proj': ('q_proj', ...)}}")
        widths = {}
        for name, parts in fused.items():
            names = list(parts) if isinstance(parts, (Sequence, Mapping)) and not isinstance(parts, str) else []
            if len(set(names)) < 2 or len(set(names)) < len(names) or not all(isinstance(n, str) and n for n in names):
                raise LorafxError(
                    f"got fused={{{name!r}: {parts!r}}}; expected the names of its parts in the order in which they"
                    " stand, or a dict of their widths"
                )
            if name in INTERLEAVED_LAYERS:
                raise UnsupportedModelError(
                    f"fused names {name}, which holds q, k and v of each head side by side, so no part is a slice."
                    f" Expected a layer that holds one part after the other. {INSTEAD}"
                )
            if isinstance(parts, Mapping):
                if not all(isinstance(width, int) and width > 0 for width in parts.values()):
                    raise LorafxError(f"got fused={{{name!r}: {parts!r}}}; expected whole numbers as widths")
                widths[name] = tuple(parts.values())
        return cls({**PARTS, **{name: tuple(parts) for name, parts in fused.items()}}, widths)

    def layers(self, root: nn.Module) -> list[FusedLayer]:
        """The fused layers of ``root``."""
        if _kind(root) in INTERLEAVED_MODELS:
            return []
        found = []
        modules = dict(root.named_modules())
        for path, module in modules.items():
            parent, _, name = path.rpartition(".")
            if name not in self.parts or (sizes := features_of(module)) is None:
                continue
            parts = self.parts[name]
            own = [modules.get(f"{parent}.{part}" if parent else part) for part in parts]
            found.append(FusedLayer(path, *sizes, parts, self._widths(root, name, sizes[1], own), None not in own))
        return found

    def _widths(self, root: nn.Module, name: str, out: int, own: Sequence[nn.Module | None]) -> tuple[int, ...] | None:
        if name in self.widths:
            widths = self.widths[name]
            if sum(widths) != out:
                raise UnsupportedModelError(
                    f"fused says that the parts of {name} are {sum(widths)} wide together; this model's layer has"
                    f" {out} features. Expected widths that add up to those."
                )
            return widths
        if None not in own:
            sizes = [features_of(module) for module in own]
            fits = None not in sizes and sum(size[1] for size in sizes) == out
            return tuple(size[1] for size in sizes) if fits else None
        count = len(self.parts[name])
        if name in EVEN:
            return (out // count,) * count if out % count == 0 else None
        heads = _head_widths(root) if count == 3 else None
        return heads if heads is not None and sum(heads) == out else None

    def sizes(self, root: nn.Module) -> dict[str, tuple[int, int]]:
        """(in, out) of each part whose width the model tells and which is no module of its own, by its path."""
        return {
            layer.path_of(part): (layer.in_features, width)
            for layer in self.layers(root)
            if layer.widths is not None and not layer.own
            for part, width in zip(layer.parts, layer.widths, strict=True)
        }

    def find(self, root: nn.Module, widths: Mapping[str, int], whose: str) -> dict[str, Part]:
        """Where each site is a part of a fused layer, by its path. ``widths``: of all sites, by path.

        AdapterMismatchError: as ``FusedLayer.place``
        """
        found: dict[str, Part] = {}
        for layer in self.layers(root):
            paths = {part: layer.path_of(part) for part in layer.parts}
            mine = {part: widths[path] for part, path in paths.items() if path in widths}
            if not mine:
                continue
            all_widths = dict(zip(layer.parts, layer.widths, strict=True)) if layer.widths is not None else mine
            if any(all_widths[part] != width for part, width in mine.items()):
                raise AdapterMismatchError(
                    f"{whose} does not fit {layer.path}: its parts are {_listed(mine)} wide, in this model"
                    f" {_listed(all_widths)}. Is it an adapter of another model?"
                )
            places = layer.place(all_widths, whose)
            found.update({paths[part]: places[part] for part in mine})
        return found


def refuse_interleaved(name: str, root: nn.Module, wanted: Iterable[str]) -> None:
    """UnsupportedModelError: an adapter of ``wanted`` projections, of which ``root`` has only a layer that mixes them

    name: of the adapter; wanted: the last parts of its layers' names
    """
    names = {path.rpartition(".")[2] for path, _ in root.named_modules()}
    mixing = names & (INTERLEAVED_LAYERS | ({"qkv_proj"} if _kind(root) in INTERLEAVED_MODELS else set()))
    missing = {"q_proj", "k_proj", "v_proj", "query", "key", "value"}.intersection(wanted) - names
    if mixing and missing:
        raise UnsupportedModelError(
            f"adapter {name!r} adapts {min(missing)}, and {min(mixing)} of this model holds q, k and v of each head"
            f" side by side, so no part is a slice of it. Expected an adapter of the layer itself. {INSTEAD}"
        )


def _kind(root: nn.Module) -> Any:
    return getattr(getattr(root, "config", None), "model_type", None)


def _head_widths(root: nn.Module) -> tuple[int, int, int] | None:
    """Of q, k and v, as the config of a language model says."""
    config = getattr(root, "config", None)
    get = getattr(config, "get_text_config", None)
    config = get() if get is not None else config
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        return None
    each = getattr(config, "head_dim", None) or hidden // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    return heads * each, shared * each, shared * each
