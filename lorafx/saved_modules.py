"""Modules of which an adapter has a copy of its own (PEFT's ``modules_to_save``), or rows of their weight
(``token_rows.py``): who has one, and how one is made.

On a PeftModel the copies are PEFT's; those that come from a file are held here. ``saved_layers.py`` runs them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from lorafx.adapters import TOKENS
from lorafx.errors import AdapterFormatError
from lorafx.selection import Selection
from lorafx.token_rows import ROWS, PeftsRows, TokenRows, unsuitable_for_rows

Copies = dict[str, dict[str, nn.Module]]  # by adapter, by path


class SavedModules:
    """paths: of the modules that some adapter has had a copy of, in the order of their places in graphs

    wrappers: PEFT's, by path; own: the copies of adapters that PEFT does not hold
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.wrappers: dict[str, AuxiliaryTrainingWrapper] = {}
        self.own: Copies = {}

    def copies(self, path: str) -> Mapping[str, nn.Module]:
        """By adapter."""
        if path in self.wrappers:
            return copies_in(self.wrappers[path])
        return {name: held[path] for name, held in self.own.items() if path in held}

    def clash(self, selection: Selection) -> str | None:
        """Why no module can be chosen for some row; None if one can for each."""
        for row in selection if self.paths and any(len(row) > 1 for row in selection) else ():
            for path in self.paths:
                both = [name for name, _ in row if name in self.copies(path)]
                if len(both) > 1:
                    return f"{' and '.join(both[:2])} each bring a {path} of their own"
        return None

    @property
    def nbytes(self) -> int:
        """Of the copies that are held here."""
        modules = [module for held in self.own.values() for module in held.values()]
        return sum(t.numel() * t.element_size() for m in modules for t in (*m.parameters(), *m.buffers()))


def copies_in(wrapper: AuxiliaryTrainingWrapper) -> Mapping[str, nn.Module]:
    """PEFT's own, by adapter."""
    return PeftsRows(wrapper) if has_rows(wrapper) else wrapper.modules_to_save._modules


def has_rows(wrapper: AuxiliaryTrainingWrapper) -> bool:
    """Its adapters have rows of the module's weight, not copies of the module."""
    return isinstance(wrapper, TrainableTokensWrapper)


def parameters_in(wrapper: AuxiliaryTrainingWrapper) -> Iterator[nn.Parameter]:
    return iter(
        wrapper.token_adapter.trainable_tokens_delta.values()
        if has_rows(wrapper)
        else wrapper.modules_to_save.parameters()
    )


def needs_gradients(wrapper: AuxiliaryTrainingWrapper) -> bool:
    return torch.is_grad_enabled() and any(p.requires_grad for p in parameters_in(wrapper))


def active_in(wrapper: AuxiliaryTrainingWrapper) -> list[str]:
    """The copy that PEFT's switches say; none if they say the model's own module."""
    return [name for name in wrapper.active_adapters if name in copies_in(wrapper)]


def unsuitable(module: nn.Module) -> str | None:
    """Why rows can't go through a copy of ``module`` apart; None if they can, as far as its signature says."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    taken = [p for p in inspect.signature(module.forward).parameters.values() if p.kind not in kinds]
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.rnn.RNNBase)):
        return f"a {type(module).__name__} does not take its rows one by one"
    return None if len(taken) == 1 else f"a {type(module).__name__} takes {len(taken)} arguments, not one tensor"


@torch.no_grad()
def copies_for(root: nn.Module, name: str, saved: Mapping[str, Mapping[str, Tensor]]) -> dict[str, nn.Module]:
    """Copies of the modules at these paths, with these tensors; or rows of their weights.

    AdapterFormatError: NaN or Inf among them, or rows of what has no plain weight
    """
    from lorafx.skeletons import skeleton

    made = {}
    for path, tensors in saved.items():
        own = root.get_submodule(path)
        if ROWS in tensors:
            made[path] = _rows_for(name, path, own, tensors)
            continue
        copy = skeleton(own)
        like = dict((*own.named_parameters(remove_duplicate=False), *own.named_buffers(remove_duplicate=False)))
        state = {}
        for key, tensor in tensors.items():
            _check_finite(name, path, key, tensor)
            state[key] = tensor.to(like[key].device, like[key].dtype, copy=True)
        copy.load_state_dict(state, strict=True, assign=True)
        for key, buffer in own.named_buffers():
            if key not in state:
                holder, _, last = key.rpartition(".")
                copy.get_submodule(holder)._buffers[last] = buffer.clone()
        made[path] = copy.requires_grad_(False)
    return made


def _rows_for(name: str, path: str, own: nn.Module, tensors: Mapping[str, Tensor]) -> TokenRows:
    if reason := unsuitable_for_rows(own):
        raise AdapterFormatError(
            f"adapter {name!r} brings its own {path}: {reason}. Load it with PEFT and pass the PeftModel: that module"
            " then stays as PEFT has it."
        )
    _check_finite(name, path, ROWS, tensors[ROWS])
    rows = tensors[ROWS].to(own.weight.device, own.weight.dtype, copy=True)
    return TokenRows(tensors[TOKENS].to(own.weight.device), rows)


def _check_finite(name: str, path: str, key: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise AdapterFormatError(
            f"adapter {name!r}: {key} of its own {path} holds NaN or Inf; the file is damaged or its training diverged."
        )


def suitable_wrappers(root: nn.Module) -> tuple[dict[str, AuxiliaryTrainingWrapper], dict[str, str]]:
    """(PEFT's wrappers that lorafx can run, by path; why it can't the others)."""
    wrappers, skipped = {}, {}
    for path, module in root.named_modules():
        if type(module) not in (ModulesToSaveWrapper, TrainableTokensWrapper) and not hasattr(
            type(module), "_lorafx_adapted"
        ):
            continue
        if has_rows(module):
            field, reason = "trainable_token_indices", unsuitable_for_rows(module.original_module)
        else:
            field, reason = "modules_to_save", unsuitable(module.original_module)
            if any(isinstance(part, BaseTunerLayer) for part in module.modules_to_save.modules()):
                reason = "an adapter has layers in it adapted, in another one's copy of it too"
        if reason is None:
            wrappers[path] = module
        else:
            skipped[path] = f"it is in {field}, and {reason}"
    return wrappers, skipped


def disagreeing(wrappers: Mapping[str, ModulesToSaveWrapper], active: Iterable[str]) -> str | None:
    """Why PEFT's switches at its wrappers say something else than those at its layers; None if they agree."""
    for path, wrapper in wrappers.items():
        if active_in(wrapper) != [name for name in active if name in copies_in(wrapper)]:
            return f"{path} is set to another adapter than the layers are (set_adapter() ends that)"
    return None
