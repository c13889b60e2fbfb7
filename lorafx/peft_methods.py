"""Stands before the verbs of transformers and diffusers that add PEFT's layers: refuses what lorafx couldn't follow."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorafx.bank import AdapterBank
from lorafx.errors import UnsupportedModelError

GUARDED = ("load_adapter", "add_adapter", "load_lora_adapter")


class GuardedMethod:
    """PEFT's layers and adapters of lorafx's own don't go together; said before PEFT touches the model."""

    def __init__(self, model: nn.Module, bank: AdapterBank, name: str) -> None:
        self.model, self.bank, self.name = model, bank, name
        self.__doc__ = getattr(type(model), name).__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.bank._peft is None and (self.bank._slots or self.bank._shelf is not None):
            ours = ", ".join(map(repr, self.bank._slots)) or "an AdapterStore"
            raise UnsupportedModelError(
                f"model.{self.name} would put PEFT's layers on a model that lorafx has given adapters ({ours}). Load"
                " this one with model.lora.load too, or first model.lora.unload the others."
            )
        return getattr(type(self.model), self.name)(self.model, *args, **kwargs)


def guard(root: nn.Module, bank: AdapterBank) -> None:
    """Only where PEFT isn't yet: on its layers lorafx has no adapters of its own."""
    for name in GUARDED:
        if hasattr(type(root), name):
            vars(root)[name] = GuardedMethod(root, bank, name)
