"""``lorafx.compile`` and ``lorafx.uncompile``."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lorafx import peft_layers
from lorafx.adapter_store import AdapterStore
from lorafx.backend import Options
from lorafx.bank import AdapterBank
from lorafx.errors import LorafxError, UnsupportedModelError
from lorafx.fused_layers import Fusions
from lorafx.kernels import cpp
from lorafx.logs import warn_once
from lorafx.module_snapshot import unchanged_on_error
from lorafx.offloading import check_in_place
from lorafx.peft_loading import PeftLoader
from lorafx.progress import bar
from lorafx.reading import AdapterReader
from lorafx.reserving import bank_dtype, make_store
from lorafx.runtime import Runtime, runtime_of
from lorafx.saved_modules import suitable_wrappers
from lorafx.sources import as_mapping

log = logging.getLogger("lorafx")


def compile(
    model: nn.Module,
    adapters: Any = None,
    *,
    max_adapters: int | None = None,
    max_rank: int | None = None,
    target_modules: Iterable[str] | str | None = None,
    fused: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    validate: bool | None = None,
) -> nn.Module:
    """Make ``model`` run LoRA adapters through fused ops, compiled. Returns the same object.

    model: an nn.Module, PreTrainedModel or PeftModel, in any mode
    adapters: None (the ones already on a PeftModel), a path, ``{name: source}`` or a list of paths; a source is the
        folder that PEFT's ``save_pretrained`` wrote, a GGUF LoRA file, kohya's or diffusers' safetensors
        (``lorafx.formats``), a state dict, or a (state dict, LoraConfig or dict) pair. Or an
        ``AdapterStore``, which holds more adapters than there is room for
    max_adapters, max_rank, target_modules: reserve room, so that adapters loaded later need no new trace: that many
        adapters, of up to that rank (default: the largest given), on layers with these names. Weights of experts
        and routers have no such name: with max_adapters, room for them comes with an adapter of them that is given
    fused: layers that compute several projections at once, for adapters that were trained on each alone: ``{name: parts
        in order}``, or ``{name: {part: width}}`` where neither the model's config nor the adapter tells how wide each
        is. ``qkv_proj``, ``gate_up_proj`` and those of diffusers' ``fuse_qkv_projections`` are known
    dynamic, mode: as torch.compile's; mode "eager" computes the same at once and compiles nothing
    options: "lowering" ("auto", "triton", "cpp", "aten", "reference"), "fold" (False: keep the adapted layers' own
        products apart), "outline" (False: compile each layer, even where many are alike), "inductor"
        (False: run the rewritten graph as it is), and Inductor's own
    validate: when a graph is compiled, try every rewrite on probe inputs beside what it replaces, and undo what differs
        (``lorafx.explain(model).skipped`` then says so). The graph runs two or three times for that, uncompiled, and a
        second bank is in memory meanwhile. None: as the environment variable LORAFX_VALIDATE says (1: yes)

    One adapter given is in use at once; of several none is, until ``model.lora.use`` or ``adapter_names`` says which.

    LorafxError: a subclass says what can't be done; the model is then as it was
    """
    started = time.perf_counter()
    _check_model(model)
    parsed = Options.parse(options if validate is None else {**(options or {}), "validate": validate}, mode)
    fusions = Fusions.parse(fused)
    shelf = adapters if isinstance(adapters, AdapterStore) else None
    sources = as_mapping(None if shelf is not None else adapters)
    room: dict[str, Any] = {"max_adapters": max_adapters, "max_rank": max_rank, "target_modules": target_modules}
    root = peft_layers.base_model_of(model)
    check_in_place(model, root)
    _check_lowering(root, parsed.lowering)
    on_peft = peft_layers.has_adapters(root)
    if shelf is not None:
        _check_shelf(shelf, on_peft, max_adapters)
    with unchanged_on_error(model):
        if on_peft:
            loader = PeftLoader(model, root)
            for name, source in bar(sources.items(), "reading adapters"):
                loader.load(name, source)
            layers, unfused = peft_layers.supported_layers(root)
            weights = peft_layers.adapters_on(layers, vars(root).get("peft_config"))
        else:
            layers, unfused = {}, {}
            reader = AdapterReader(root, bank_dtype(root), fusions)
            if shelf is not None and (max_rank is None or target_modules is None):
                room["others"] = list(shelf.outlines(reader.open))
            weights = [reader.open(name, source).read() for name, source in bar(sources.items(), "reading adapters")]
        store = make_store(root, weights, fusions=fusions, **room)
        for adapter in weights:
            adapter.check_finite()
        bank = AdapterBank(store, lowering=parsed.lowering, max_adapters=max_adapters, max_rank=max_rank)
        bank._root = root
        if layers:
            bank.saved.wrappers = suitable_wrappers(root)[0]
            bank.saved.paths = list(bank.saved.wrappers)
        for adapter in bar(weights, "packing adapters"):
            bank.add(adapter)
        runtime = Runtime(model, root, bank, parsed, dynamic, eager=mode == "eager")
        runtime.peft, runtime.unfused = layers, unfused
        runtime.fused.fusions = fusions
        if on_peft:
            bank._peft, loader.bank = loader, bank
        else:
            bank._read = reader
            if len(sources) == 1:
                bank.use(next(iter(sources)))
        runtime.install()
    if shelf is not None:
        shelf.attach(model)
    log.info("%d adapter(s) packed in %.1f s", len(weights), time.perf_counter() - started)
    log.info("the bank takes %s bytes, %s of them reserved", f"{bank.nbytes:,}", f"{bank.reserved:,}")
    for path, reason in unfused.items():
        log.info("%s is left to PEFT: %s", path, reason)
    if unfused:
        path, reason = next(iter(unfused.items()))
        warn_once(
            f"lorafx: {len(unfused)} layer(s) are left to PEFT, such as {path}: {reason}. lorafx.explain(model) lists"
            " them; LoRA on linear layers, embeddings, Conv2d and the weights of experts and routers is fused."
        )
    return model


def uncompile(model: nn.Module) -> nn.Module:
    """Give ``model`` back as it was before ``lorafx.compile``: the same object. Adapters of a PeftModel stay on it.

    LorafxError: it is not compiled by lorafx
    """
    runtime = runtime_of(model)
    if runtime is None:
        raise LorafxError("this model is not compiled by lorafx")
    runtime.remove()
    return model


def _check_shelf(shelf: AdapterStore, on_peft: bool, max_adapters: int | None) -> None:
    if on_peft:
        raise UnsupportedModelError(
            "an AdapterStore can't serve a model with PEFT's layers, which keep every adapter: compile the base model"
            " (peft_model.unload() gives it back), and have the store read the adapters."
        )
    if max_adapters is None:
        raise LorafxError("an AdapterStore needs max_adapters: how many adapters may be on the device at once")
    if shelf.model is not None:
        raise UnsupportedModelError("this AdapterStore serves a model already; make another one for this model")


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
    if lowering == "cpp" and parameter is not None:
        cpp.check(parameter.device)


__all__ = ["compile", "uncompile"]
