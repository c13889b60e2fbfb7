"""What a conversion needs to know of the model that an adapter is for: its layers' names and sizes, and its config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.pytorch_utils import Conv1D

from lorafx.layer_kinds import widths_of


@dataclass(frozen=True)
class Base:
    """kind: the model's class, for messages
    layers: of every module, by path: (in, out) features where it is linear or Conv2d (``widths_of``), else None
    prefixes: what names of modules may begin with in older files, in front of the path: transformers' own list
    config: the model's; None where it has none
    """

    kind: str
    layers: Mapping[str, tuple[int, int] | None]
    prefixes: tuple[str, ...]
    config: Any

    @cached_property
    def flattened(self) -> dict[str, list[str]]:
        """Paths by their names with "_" for ".": several where two become one."""
        found: dict[str, list[str]] = {}
        for path in self.layers:
            found.setdefault(path.replace(".", "_"), []).append(path)
        return found

    def without_prefix(self, name: str, separator: str) -> list[str]:
        """``name`` itself, and what it is without each of the prefixes that it begins with."""
        starts = [f"{prefix}{separator}" for prefix in self.prefixes]
        return [name, *(name.removeprefix(start) for start in starts if name.startswith(start))]

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
        tuple(_prefixes(model)),
        getattr(model, "config", None),
    )


def _prefixes(model: nn.Module) -> Iterator[str]:
    """For example "text_model" of a CLIP text encoder, whose modules were inside one of that name before."""
    if not isinstance(model, PreTrainedModel):
        return
    if model.base_model_prefix:
        yield model.base_model_prefix
    for change in get_model_conversion_mapping(model):
        if (
            isinstance(change, PrefixChange)
            and change.prefix_to_remove
            and not (change.model_prefix or change.scope_prefix)
        ):
            yield change.prefix_to_remove


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    return widths_of(module) if isinstance(module, (nn.Linear, Conv1D, nn.Conv2d)) else None
