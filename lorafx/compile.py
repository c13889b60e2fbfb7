"""``lorafx.compile`` and ``lorafx.uncompile``."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lorafx import peft_layers
from lorafx.adapters import AdapterWeights
from lorafx.backend import Options
from lorafx.bank import AdapterBank, as_mapping
from lorafx.errors import AdapterMismatchError, CapacityError, LorafxError, UnsupportedModelError
from lorafx.peft_loading import PeftLoader
from lorafx.reading import AdapterReader
from lorafx.runtime import Runtime, runtime_of
from lorafx.store import PackedStore, Site

log = logging.getLogger("lorafx")


def compile(
    model: nn.Module,
    adapters: Any = None,
    *,
    max_adapters: int | None = None,
    max_rank: int | None = None,
    target_modules: Iterable[str] | str | None = None,
    dynamic: bool | None = None,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    validate: bool = False,
) -> nn.Module:
    """Make ``model`` run LoRA adapters through fused ops, compiled. Returns the same object.

    model: an nn.Module, PreTrainedModel or PeftModel, in any mode
    adapters: None (the ones already on a PeftModel), a path, ``{name: source}`` or a list of paths; a source is the
        folder that PEFT's ``save_pretrained`` wrote, a state dict, or a (state dict, LoraConfig or dict) pair
    max_adapters, max_rank, target_modules: reserve room, so that adapters loaded later need no new trace: that many
        adapters, of up to that rank (default: the largest given), on layers with these names
    dynamic, mode, options: as torch.compile's; mode "eager" computes the same at once and compiles nothing;
        options may hold "lowering" ("auto", "triton", "aten", "reference"), "inductor" (False: run the rewritten graph
        as it is), and Inductor's own
    validate: not there yet; refused

    One adapter given is in use at once; of several none is, until ``model.lora.use`` or ``adapter_names`` says which.

    LorafxError: a subclass says what can't be done; the model is then as it was
    """
    _check_model(model)
    if validate:
        raise LorafxError("validate=True is not there yet; leave it out")
    parsed = Options.parse(options, mode)
    for name, value in (("max_adapters", max_adapters), ("max_rank", max_rank)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise LorafxError(f"got {name}={value!r}; expected a whole number of at least 1")
    sources = as_mapping(adapters)
    root = peft_layers.base_model_of(model)
    _check_lowering(root, parsed.lowering)
    on_peft = peft_layers.has_adapters(root)
    if on_peft:
        loader = PeftLoader(model, root)
        loaded = loader.load_all(sources)
        layers, unfused = peft_layers.supported_layers(root)
        weights = peft_layers.adapters_on(layers)
    else:
        layers, unfused = {}, {}
        reader = AdapterReader(root, _bank_dtype(root))
        weights = [reader.open(name, source).read() for name, source in sources.items()]
    try:
        store = _make_store(root, weights, layers, max_adapters, max_rank, target_modules)
        for adapter in weights:
            adapter.check_finite()
        bank = AdapterBank(store, lowering=parsed.lowering, max_adapters=max_adapters, max_rank=max_rank)
        for adapter in weights:
            bank.add(adapter)
    except BaseException:
        if on_peft:
            loader.unload_all(loaded)
        raise
    runtime = Runtime(model, root, bank, parsed, dynamic, eager=mode == "eager")
    runtime.peft, runtime.unfused = layers, unfused
    if on_peft:
        bank._peft = loader
    else:
        bank._read = reader
        if len(sources) == 1:
            bank.use(next(iter(sources)))
    runtime.install()
    for path, reason in unfused.items():
        log.warning("%s is left to PEFT: %s", path, reason)
    return model


def uncompile(model: nn.Module) -> nn.Module:
    """Give ``model`` back as it was before ``lorafx.compile``. Adapters of a PeftModel stay on it."""
    runtime = runtime_of(model)
    if runtime is None:
        raise LorafxError("this model is not compiled by lorafx")
    runtime.remove()
    return model


def _check_model(model: Any) -> None:
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise UnsupportedModelError(
            "got a model that torch.compile has wrapped already. lorafx compiles it itself: pass the model from before,"
            " which is model._orig_mod."
        )
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"got {type(model).__name__}; expected a torch.nn.Module")
    root = peft_layers.base_model_of(model)
    if runtime_of(model) is not None or runtime_of(root) is not None:
        raise UnsupportedModelError(
            "this model is compiled by lorafx already. Load further adapters with model.lora.load(name, source), or"
            " lorafx.uncompile(model) first."
        )
    if any(module._compiled_call_impl is not None for module in (model, root)):
        raise UnsupportedModelError(
            "this model was compiled in place (model.compile()). lorafx compiles it itself: pass it uncompiled, or"
            " set model._compiled_call_impl = None."
        )
    for module in (model, root):
        if hasattr(module, "lora"):
            raise UnsupportedModelError(
                f"{type(module).__name__} has an attribute 'lora' of its own, which lorafx needs. Wrap the model"
                " in another nn.Module."
            )


def _check_lowering(root: nn.Module, lowering: str) -> None:
    """What the kernels would refuse in the middle of a trace, said before anything is touched."""
    parameter = next(root.parameters(), None)
    if lowering == "triton" and parameter is not None:
        try:
            from lorafx.kernels.sgmv import check_device
        except ImportError as error:
            raise UnsupportedModelError(f'lowering="triton" needs the triton package: {error}') from error
        check_device(parameter.device)


def _bank_dtype(root: nn.Module) -> torch.dtype:
    """float32, as PEFT keeps adapters beside a float32, bf16 or fp16 base; float64 beside a float64 base."""
    doubles = any(p.dtype == torch.float64 for p in root.parameters())
    return torch.float64 if doubles else torch.float32


def _make_store(
    root: nn.Module,
    weights: list[AdapterWeights],
    layers: dict[str, Any],
    max_adapters: int | None,
    max_rank: int | None,
    target_modules: Iterable[str] | str | None,
) -> PackedStore:
    """An empty store with room for ``weights`` and for what was reserved."""
    if max_adapters is not None and len(weights) > max_adapters:
        raise CapacityError(f"{len(weights)} adapters for max_adapters={max_adapters}")
    largest = max((adapter.ranks[-1] for adapter in weights if adapter.ranks), default=None)
    if max_rank is not None and largest is not None and largest > max_rank:
        raise CapacityError(f"an adapter has rank {largest}, max_rank is {max_rank}")
    names = dict.fromkeys(path for adapter in weights for path in adapter.sites)
    names.update(dict.fromkeys(_targets(root, target_modules)))
    order = {path: i for i, (path, _) in enumerate(root.named_modules())}
    sites, capacities, biases = [], {}, {}
    rank = max_rank or largest or 0
    slots = max(max_adapters or 0, len(weights), 1)
    for path in sorted(names, key=order.__getitem__):
        here = [adapter.sites[path] for adapter in weights if path in adapter.sites]
        if here:
            shape = here[0].a.shape[1], here[0].b.shape[0]
        else:
            shape = _linear_shape(root.get_submodule(path), path)
        sites.append(Site(path, *shape))
        used = sum(site.rank for site in here)
        reserve = (slots - len(here)) * rank if max_adapters is not None or target_modules is not None else 0
        capacities[path] = used + reserve
        biases[path] = sum(site.bias is not None for site in here)
    sample = weights[0].sites if weights else {}
    first = next(iter(sample.values())).a if sample else None
    parameter = next(root.parameters(), None)
    dtype = first.dtype if first is not None else _bank_dtype(root)
    device = parameter.device if parameter is not None else torch.device("cpu")
    return PackedStore(sites, capacities, biases, slots, dtype, device)


def _targets(root: nn.Module, target_modules: Iterable[str] | str | None) -> list[str]:
    """Layers named by ``target_modules``, as PEFT matches names: the end of the path."""
    if target_modules is None:
        return []
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if wanted == ["all-linear"]:
        return peft_layers.all_linear(root)
    found = [
        path for path, _ in root.named_modules() if any(path == name or path.endswith(f".{name}") for name in wanted)
    ]
    missing = [name for name in wanted if not any(path == name or path.endswith(f".{name}") for path in found)]
    if missing:
        raise AdapterMismatchError(
            f"target_modules names {missing[0]!r}, which {type(root).__name__} has no layer of; expected the end of"
            " a module's path, such as 'q_proj'"
        )
    return found


def _linear_shape(module: nn.Module, path: str) -> tuple[int, int]:
    """(in, out) of a linear layer, whatever class it is of."""
    from peft.tuners.tuners_utils import _get_in_out_features

    with_shape = _get_in_out_features(module) if not isinstance(module, nn.Embedding) else (None, None)
    if not isinstance(with_shape[0], int):
        raise UnsupportedModelError(
            f"{path} is a {type(module).__name__}, no linear layer; room can't be reserved there"
        )
    return with_shape


__all__ = ["compile", "uncompile"]
