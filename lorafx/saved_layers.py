"""A module of which adapters have copies, as it runs: row by row, in one graph.

In what is traced stands the model's own module, and behind it an op that knows nothing of adapters
(``kernels/saved.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from lorafx.bank import AdapterBank, bank_of
from lorafx.errors import UnsupportedModelError
from lorafx.kernels.saved import set_saved_forward
from lorafx.saved_modules import needs_gradients
from lorafx.sites import MARKERS, refusal, rows_unknown
from lorafx.token_rows import TokenRows


class AdaptedWrapper(nn.Module):
    """PEFT's wrapper while lorafx runs it: the model's own module, then the op; eagerly, what PEFT does."""

    _lorafx_adapted = True
    _lorafx_bank: AdapterBank
    _lorafx_place: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None:
            return super().forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            if needs_gradients(self):
                return super().forward(*args, **kwargs)
            y = self.original_module(*args, **kwargs)
            x = one_tensor("this module", args, kwargs, y)
            return torch.ops.lorafx.saved.default(y, x, self._lorafx_bank.key, self._lorafx_place)
        if self._lorafx_bank.chosen is None or self.disable_adapters:
            return super().forward(*args, **kwargs)
        y = self.original_module(*args, **kwargs)
        return apply_saved(self._lorafx_bank, self._lorafx_place, y, one_tensor("this module", args, kwargs, y))


class AdaptedModules(AdaptedWrapper, ModulesToSaveWrapper):
    """Adapters have copies of the module."""


class AdaptedTokens(AdaptedWrapper, TrainableTokensWrapper):
    """Adapters have rows of its weight."""


ADAPTED = {ModulesToSaveWrapper: AdaptedModules, TrainableTokensWrapper: AdaptedTokens}
PLAIN = {ours: theirs for theirs, ours in ADAPTED.items()}


class SavedHook:
    """The forward hook of a module of a plain model. ``place``: in the bank's list."""

    def __init__(self, bank: AdapterBank, place: int) -> None:
        self.bank, self.place = bank, place

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        x = one_tensor("this module", args, kwargs, output)
        if torch.compiler.is_compiling():
            return torch.ops.lorafx.saved.default(output, x, self.bank.key, self.place)
        return apply_saved(self.bank, self.place, output, x)


def adapt(wrapper: AuxiliaryTrainingWrapper, bank: AdapterBank, place: int) -> None:
    wrapper.__class__ = ADAPTED.get(type(wrapper), type(wrapper))
    vars(wrapper).update(_lorafx_bank=bank, _lorafx_place=place)


def release(wrapper: AuxiliaryTrainingWrapper) -> None:
    """Undo ``adapt``."""
    wrapper.__class__ = PLAIN.get(type(wrapper), type(wrapper))
    for name in ("_lorafx_bank", "_lorafx_place"):
        vars(wrapper).pop(name, None)


def one_tensor(path: str, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Tensor:
    """What a module was called with. UnsupportedModelError: anything else than one tensor, that makes one tensor"""
    values = [*args, *(value for value in kwargs.values() if value is not None)]
    if len(values) != 1 or not isinstance(values[0], Tensor) or not isinstance(output, Tensor):
        raise UnsupportedModelError(
            f"{path} is in modules_to_save of an adapter, and was called with {len(values)} arguments for a"
            f" {type(output).__name__}; expected one tensor in and one out. lorafx.uncompile(model) runs it with PEFT."
        )
    return values[0]


def apply_saved(bank: AdapterBank, place: int, y: Tensor, x: Tensor) -> Tensor:
    """``y``, with the rows of adapters that have a copy of this module replaced by what their copy gives for ``x``.

    y: ``[rows, ...]``; x: ``[rows, ...]``, of any dtype
    """
    path, selection = bank.saved.paths[place], bank.in_use
    copies = bank.saved.copies(path)
    chosen = [next((name for name, _ in row if name in copies), None) for row in selection]
    if not any(chosen):
        return y
    if len(chosen) == 1:
        return _run(bank, path, copies[chosen[0]], x, y).to(y.dtype)
    if reason := rows_unknown((*x.shape, 1), len(chosen), bank.batch):
        raise UnsupportedModelError(refusal(path, reason))
    rows = x.shape[0]
    of_row = [chosen[i * len(chosen) // rows] for i in range(rows)]
    out = y.clone()
    for name in dict.fromkeys(filter(None, of_row)):
        index = torch.tensor([i for i, other in enumerate(of_row) if other == name], device=x.device)
        part = _run(bank, path, copies[name], x.index_select(0, index), y.index_select(0, index))
        out = out.index_copy(0, index, part.to(y.dtype))
    return out


def _run(bank: AdapterBank, path: str, copy: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What the copy gives for these rows, of which the model's own module made ``y``."""
    wrapper = bank.saved.wrappers.get(path)
    own = bank._root.get_submodule(path) if wrapper is None else wrapper.original_module
    if wrapper is None:  # ours: where the model went, it goes too
        like = next(own.parameters(), None)
        mine = next(copy.parameters(), None)
        if like is not None and (like.dtype, like.device) != (mine.dtype, mine.device):
            copy.to(device=like.device, dtype=like.dtype)
        copy.train(own.training)
    return copy(own, y, x) if isinstance(copy, TokenRows) else copy(x)


def _op_forward(y: Tensor, x: Tensor, key: int, place: int) -> Tensor:
    return apply_saved(bank_of(key), place, y, x)


set_saved_forward(_op_forward)
MARKERS[torch.ops.lorafx.saved.default] = _op_forward
