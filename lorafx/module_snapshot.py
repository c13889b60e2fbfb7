"""What a model is made of, to be put back when a change of it fails half-way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Snapshot:
    """Every module's class and attributes, and what their dicts, lists and sets hold; which parameters want gradients.

    Nothing is copied but references: PEFT changes which modules and parameters there are, not the numbers in them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, type(module), dict(vars(module))) for module in model.modules()]
        self._containers = [
            (value, value.copy() if value else ())
            for _, _, state in self._modules
            for value in state.values()
            if isinstance(value, (dict, list, set))
        ]
        self._wants = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        for each, content in self._containers:
            refill(each, content)
        for module, kind, state in self._modules:
            module.__class__ = kind
            refill(vars(module), state)
        for parameter, wants in self._wants:
            parameter.requires_grad_(wants)


def refill(container: Any, content: Any) -> None:
    """Make a dict, list or set hold what ``content`` holds. A dict is never empty meanwhile, unless its order is to
    change: other threads look modules up in it."""
    if isinstance(container, dict):
        for key in [key for key in container if key not in content]:
            del container[key]
        container.update(content)
        if list(container) == list(content):
            return
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    before = Snapshot(model)
    try:
        yield
    except BaseException:
        before.restore()
        raise
