"""What a conversion needs to know of the model that an adapter is for: its layers' names and sizes, and its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Base:
    """kind: the model's class, for messages
    layers: of every module, by path: (in, out) features where it is linear, else None
    prefix: what names of modules begin with where the model is a part of another (transformers' base_model_prefix)
    config: the model's; None where it has none
    """

    kind: str
    layers: Mapping[str, tuple[int, int] | None]
    prefix: str
    config: Any

    @cached_property
    def flattened(self) -> dict[str, list[str]]:
        """Paths by their names with "_" for ".": several where two become one."""
        found: dict[str, list[str]] = {}
        for path in self.layers:
            found.setdefault(path.replace(".", "_"), []).append(path)
        return found

    def text_config(self) -> Any:
        """The config of the language model, also inside one that sees or hears."""
        get = getattr(self.config, "get_text_config", None)
        return self.config if get is None else get()


def base_of(model: nn.Module) -> Base:
    """model: without PEFT's layers; nothing of its weights is looked at"""
    layers = {path: _sizes(module) for path, module in model.named_modules() if path}
    return Base(
        type(model).__name__,
        layers,
        getattr(model, "base_model_prefix", "") or "",
        getattr(model, "config", None),
    )


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return tuple(module.weight.shape)
    return None
