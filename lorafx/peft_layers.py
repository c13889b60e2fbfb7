"""Finds PEFT's layers on a model, ties them to the bank, and reads what PEFT's own switches say.

An adapted layer gets a class of ours (``adapted.py``), and its parameters become views of the bank: PEFT's own edits in
place are seen by the fused ops at once, and there is one copy of each weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.glora import GloraModel
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.model import LoraModel, _adapter_names_pre_forward_hook
from peft.tuners.road import RoadModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from lorafx.adapted import has_dora, is_supported, needs_gradients, other_variants
from lorafx.adapters import AdapterWeights
from lorafx.bank import AdapterBank
from lorafx.dora import unreadable
from lorafx.errors import UnsupportedModelError
from lorafx.experts import parted, site_name, why_not_wrapped
from lorafx.invocations import Prompt
from lorafx.layer_kinds import why_not
from lorafx.logs import warn_once
from lorafx.peft_arguments import Names, Offsets
from lorafx.peft_tensors import all_parameters, names_on, parameters_of, shaped, weights_of
from lorafx.quantised import features_of
from lorafx.recomputing import recomputed_layer
from lorafx.saved_modules import suitable_wrappers

PEFTS_HOOKS = ("_adapter_names_pre_forward_hook", "_alora_offsets_pre_forward_hook")  # each tuner has its own
KNOWS_NAMES = (LoraModel, RoadModel, GloraModel)  # tuners of PEFT's whose hooks are for adapter_names, and idle else

# ------------------------------------------------------------------------------------------------ finding


def base_model_of(model: nn.Module) -> nn.Module:
    """The model that PEFT wraps, or ``model``."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def tuner_of(model: nn.Module) -> BaseTuner | None:
    tuner = getattr(model, "base_model", None) if isinstance(model, PeftModel) else None
    return tuner if isinstance(tuner, BaseTuner) else None


def has_adapters(root: nn.Module) -> bool:
    return any(isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in root.modules())


def all_linear(root: nn.Module) -> list[str]:
    """What PEFT's "all-linear" targets: every linear layer but the output head; an adapted one counts as one."""
    head = root.get_output_embeddings() if hasattr(root, "get_output_embeddings") else None
    inside = tuple(f"{path}." for path, module in root.named_modules() if isinstance(module, BaseTunerLayer))
    return [
        path
        for path, module in root.named_modules()
        if features_of(module) is not None and module is not head and not path.startswith(inside)
    ]


def supported_layers(root: nn.Module) -> tuple[dict[str, PeftLinear], dict[str, str]]:
    """(layers that can be fused, by path; why the others can't, by path)."""
    layers: dict[str, PeftLinear] = {}
    skipped: dict[str, str] = {}
    wrappers, unsuitable = suitable_wrappers(root)
    for path, module in root.named_modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) or path in wrappers:
            continue
        if path.endswith(".token_adapter"):  # of a wrapper, of which is said what there is to say
            continue
        if path in unsuitable:
            skipped[path] = unsuitable[path]
            continue
        if not is_supported(module):
            skipped[path] = (
                f"PEFT's {type(module).__module__.rpartition('.')[2]}.{type(module).__name__} is not fused yet"
            )
        elif kinds := other_variants(module):
            skipped[path] = f"{', '.join(kinds)} is not fused yet"
        elif has_dora(module) and (reason := unreadable(module.get_base_layer())):
            skipped[path] = f"DoRA needs the norms of this layer's weight, and {reason}"
        elif "forward" in vars(module) and not hasattr(module, "_hf_hook"):  # accelerate's leads to the class's own
            skipped[path] = "its forward has been replaced, as X-LoRA does: PEFT's own computes it"
        elif module.merged:
            skipped[path] = "its adapter is merged into the base weight; unmerge_adapter() first"
        elif reason := why_not_wrapped(module):
            skipped[path] = f"PEFT's layer.ParamWrapper on {reason}, is not fused yet"
        elif reason := why_not(module.get_base_layer()):
            skipped[path] = f"{reason} is not fused yet"
        else:
            layers[site_name(path, module)] = module
    main = dtype_of(layers)
    for path in [path for path, layer in layers.items() if any(p.dtype != main for p in all_parameters(layer))]:
        skipped[path] = f"its adapter is not in {main}, as those of other layers are"
        del layers[path]
    for path in tied_layers(layers):
        skipped[path] = "its adapter is that of another layer, turned (ensure_weight_tying)"
        del layers[path]
    for path in parted(layers):
        skipped[path] = "another weight of the same experts is left to PEFT"
        del layers[path]
    return layers, skipped


def tied_layers(layers: dict[str, PeftLinear]) -> list[str]:
    """Those whose parameters share memory with another layer's: the bank would have to move both at once."""
    of_address: dict[int, set[str]] = {}
    for path, layer in layers.items():
        for parameter in all_parameters(layer):
            if parameter.device.type != "meta":
                of_address.setdefault(parameter.data_ptr(), set()).add(path)
    tied = set().union(*(paths for paths in of_address.values() if len(paths) > 1))
    return [path for path in layers if path in tied]


def dtype_of(layers: dict[str, PeftLinear]) -> torch.dtype | None:
    """The widest dtype of their adapters; None where there are none."""
    dtypes = {p.dtype for layer in layers.values() for p in all_parameters(layer)}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).bits, default=None)


def adapters_on(layers: dict[str, PeftLinear], configs: Mapping[str, Any] | None = None) -> list[AdapterWeights]:
    """The adapters that stand on these layers; the weights are the parameters themselves. configs: PEFT's, by name"""
    names = dict.fromkeys(name for layer in layers.values() for name in names_on(layer))
    return [
        AdapterWeights(
            name,
            {path: weights_of(layer, name) for path, layer in layers.items() if name in names_on(layer)},
            invocation=invocation_of((configs or {}).get(name)),
        )
        for name in names
    ]


def invocation_of(config: Any) -> tuple[int, ...]:
    """The invocation tokens of an aLoRA adapter; none of another one, as PEFT takes an empty list too."""
    return tuple(getattr(config, "alora_invocation_tokens", None) or ())


# ------------------------------------------------------------------------------------------------ wrapping


def note_dropout(layers: dict[str, PeftLinear]) -> None:
    """Which layers may drop anything out; said anew whenever adapters have come or gone."""
    for layer in layers.values():
        layer._lorafx_drops = any(not isinstance(drop, nn.Identity) for drop in layer.lora_dropout.values())


def share_memory(layers: dict[str, PeftLinear], bank: AdapterBank, names: Iterable[str] | None = None) -> None:
    """Make the parameters of these adapters (None: all) views of the bank, which holds the same numbers."""
    for name in bank._slots if names is None else names:
        for path in bank.store.taken[bank._slots[name]]:
            if path in layers and name in names_on(layers[path]):
                views = dict(zip(("A", "B", "bias"), bank.store.views(bank._slots[name], path), strict=True))
                for role, parameter in parameters_of(layers[path], name).items():
                    parameter.data = shaped(views[role], parameter)


def own_memory(layers: dict[str, PeftLinear]) -> None:
    """Undo ``share_memory``: every parameter gets memory of its own."""
    for layer in layers.values():
        for parameter in all_parameters(layer):
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


class ContiguousStateDict:
    """A hook on ``state_dict``: adapters in memory of their own, without gaps. That is what safetensors takes, while
    the parameters are views of one storage, and B is held as rank rows. With ``keep_vars`` the parameters stay."""

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for key, value in state.items():
            ours = key.removeprefix(prefix).startswith(("lora_A.", "lora_B.", "lora_embedding_A.", "lora_embedding_B."))
            if ours and isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                state[key] = value.clone(memory_format=torch.contiguous_format)


# ------------------------------------------------------------------------------------------------ PEFT's switches


def active_names(layers: dict[str, PeftLinear]) -> tuple[tuple[str, ...], str | None]:
    """(the adapters that ``set_adapter`` made active, why the fused ops can't do what PEFT's switches say or None).

    A layer says nothing about adapters that it does not have.
    """
    merged = dict.fromkeys(name for layer in layers.values() for name in layer.merged_adapters)
    if merged:
        return (), f"{', '.join(merged)} merged into the base weights (unmerge_adapter() ends that)"
    if len({layer.disable_adapters for layer in layers.values()}) > 1:
        return (), "adapters are disabled in some layers only (enable_adapter_layers() ends that)"
    active: dict[str, None] = {}
    effective = []
    for layer in layers.values():
        names = [name for name in layer.active_adapters if name in names_on(layer)]
        active.update(dict.fromkeys(names))
        effective.append((layer, names))
    if any(len(names) != sum(name in names_on(layer) for name in active) for layer, names in effective):
        return (), "layers differ in which adapters are active (set_adapter() ends that)"
    return tuple(active), None


def disabled(layers: dict[str, PeftLinear]) -> bool:
    """``disable_adapter`` is in force; PEFT sets it on every layer."""
    return any(layer.disable_adapters for layer in layers.values())


def hooked_by_name(layers: dict[str, PeftLinear]) -> bool:
    """PEFT's own way of telling its layers their ``adapter_names`` is in force: hooks, for one call, on each layer."""
    hooks = next(iter(layers.values()))._forward_pre_hooks.values() if layers else ()
    return any(getattr(hook, "func", None) is _adapter_names_pre_forward_hook for hook in hooks)


@contextmanager
def cleaned_on_error(tuner: nn.Module) -> Iterator[None]:
    """PEFT takes its hooks off where a call has ended well; where it has not, each later call would fail as well."""
    try:
        yield
    except BaseException:
        for module in tuner.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if getattr(getattr(hook, "func", None), "__name__", None) in PEFTS_HOOKS:
                    del module._forward_pre_hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
        raise


def raised_by_peft(error: BaseException) -> bool:
    """The line of Python that raised it is PEFT's, or it is about what PEFT has handed on."""
    if "adapter_names" in str(error):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0] == "peft"


class ForwardHooks:
    """Stands for the tuner's ``_enable_peft_forward_hooks``: adapter_names become the call's selection, not hooks, and
    ``alora_offsets``, which PEFT has computed from the prompt or the user has given, where aLoRA adapters begin.

    Rows are not counted here, where a forward's inputs are not: that is done before (``ReadArguments``)."""

    def __init__(self, runtime: Any, tuner: BaseTuner) -> None:
        self.runtime = runtime
        self.tuner = tuner

    @contextmanager
    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names, offsets = kwargs.get("adapter_names"), kwargs.get("alora_offsets")
        runtime = self.runtime
        knows_names = isinstance(self.tuner, KNOWS_NAMES)
        if names is not None and not knows_names:  # PEFT would take no notice of them
            raise UnsupportedModelError(
                f"PEFT's {type(self.tuner).__name__} has no adapter_names: it can't choose for each row. Use PEFT's"
                " set_adapter, one adapter at a time."
            )
        if not knows_names and hasattr(type(self.tuner), "_enable_peft_forward_hooks"):  # X-LoRA's are for each call
            with self._as_pefts(*args, **kwargs):
                yield
        elif (names is not None or offsets is not None) and runtime.unfused:
            # layers that lorafx leaves to PEFT need PEFT's hooks; compiled code would not see them
            warn_once(
                f"lorafx: adapter_names on a model with {len(runtime.unfused)} layer(s) that are left to PEFT:"
                " such calls run as PEFT computes them, uncompiled. LoRA on linear layers, embeddings, Conv2d and the"
                " weights of experts and routers is compiled."
            )
            with self._as_pefts(*args, **kwargs):
                yield
        elif offsets is not None and self._is_pefts_to_do(names):
            with self._as_pefts(*args, **kwargs):
                yield
        else:
            with self._choosing(names, offsets):
                yield

    def _choosing(self, names: Any, offsets: Any) -> AbstractContextManager[None]:
        bank, prompt = self.runtime.bank, None
        if names is not None:
            # where PEFT has found nothing, its aLoRA adapters are off; it looks in vain for a name of all rows
            if not isinstance(names, str) or isinstance(offsets, Offsets):
                prompt = Prompt(offsets=() if offsets is None else offsets)
            return self.runtime.selected(names.given if isinstance(names, Names) else names, prompt=prompt)
        if offsets is not None and (isinstance(offsets, Offsets) or bank.chosen is None):
            return bank.calling(None, None, Prompt(offsets=offsets))
        return nullcontext()  # PEFT's own offsets are those of other adapters than the chosen

    @contextmanager
    def _as_pefts(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """One thread at a time: PEFT puts its hooks on layers that all threads call."""
        runtime, hooks = self.runtime, type(self.tuner)._enable_peft_forward_hooks
        names = kwargs.get("adapter_names")
        if isinstance(names, Mapping) or getattr(names, "weighted", False):
            raise UnsupportedModelError(
                "adapter_names weigh adapters, and this call runs as PEFT computes it, which has no weights for a row."
                " add_weighted_adapter makes one adapter of several; lorafx.explain(model) says what is left to PEFT."
            )
        with runtime.bank.excluding(), cleaned_on_error(self.tuner), runtime.eagerly():
            try:
                with hooks(self.tuner, *args, **kwargs):
                    yield
            except (KeyError, TypeError, ValueError) as error:
                if not raised_by_peft(error):
                    raise
                left = "".join(f", such as {path} ({why})" for path, why in list(runtime.unfused.items())[:1])
                raise UnsupportedModelError(
                    f"adapter_names on layers that PEFT runs itself{left}, and PEFT can't: {type(error).__name__}:"
                    f" {error}. Use PEFT's set_adapter, one adapter at a time."
                ) from error

    def _is_pefts_to_do(self, names: Any) -> bool:
        """aLoRA that the fused ops can't compute: beside other adapters, where its weights need gradients, or where
        eager layers are computed again in the backward, in which PEFT sets its hooks anew."""
        runtime = self.runtime
        runtime.follower.follow(())
        if names is None and runtime.bank.chosen is not None:
            return False
        if names is None and runtime.eager and torch.is_grad_enabled() and recomputed_layer(runtime.root) is not None:
            return True
        return (names is None and not runtime.follower.agrees()) or any(map(needs_gradients, runtime.peft.values()))
