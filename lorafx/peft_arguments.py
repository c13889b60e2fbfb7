"""What a user says to a PeftModel about one call, made such that PEFT reads it as we do before its tuner is asked.

As soon as it is called, PEFT looks for aLoRA's invocation tokens, for each of ``adapter_names``. It reads a name for
the whole batch letter by letter, and what it has found stands where the user's own ``alora_offsets`` would be. And what
it hands on (to ``ForwardHooks``) is without the inputs, so the number of rows can be checked here alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel
from torch import nn

from lorafx.errors import AdapterMismatchError
from lorafx.invocations import read_offsets
from lorafx.selection import BASE


class Names(list):
    """Of each row a name that PEFT knows; given: what the user said, the number of rows checked."""

    def __init__(self, names: Sequence[str], given: Any) -> None:
        super().__init__(names)
        self.given = given

    @property
    def weighted(self) -> bool:
        """Some row weighs its adapters, which PEFT does not know."""
        return any(isinstance(each, Mapping) for each in (self.given, *self.given))


class Offsets(list):
    """``alora_offsets`` of the user's, not of PEFT's own."""


class ReadArguments:
    """A forward pre-hook of the PeftModel of ``runtime``, and of use to its generate."""

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if kwargs.get("adapter_names") is None and kwargs.get("alora_offsets") is None:
            return None
        return args, self.read(args, kwargs)

    def read(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """``kwargs`` with ``Names`` and ``Offsets`` in them.

        AdapterMismatchError: not one name, or one offset, for each row
        """
        rows = self.runtime.batch_of(args, kwargs)
        names, offsets = kwargs.get("adapter_names"), kwargs.get("alora_offsets")
        if names is not None:
            kwargs = {**kwargs, "adapter_names": read_names(names, rows)}
        if offsets is not None:
            kwargs = {**kwargs, "alora_offsets": Offsets(read_offsets(offsets, rows))}
        return kwargs


class PeftGenerate:
    """``generate`` of the PeftModel, whose arguments are read first."""

    def __init__(self, model: PeftModel, read: ReadArguments) -> None:
        self.model, self.arguments = model, read
        self.__doc__ = type(model).generate.__doc__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).generate.__get__(self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.model).generate(self.model, *args, **self.arguments.read(args, kwargs))


def read_names(names: Any, rows: int | None) -> Any:
    """``Names``, or ``names`` where they are not names, weights of names and None alone, or for the whole of a batch of
    unknown size.

    AdapterMismatchError: not one for each row
    """
    check_count(names, rows)
    if isinstance(names, (str, Mapping)) and rows is not None:
        return Names([_as_peft(names)] * rows, names)
    if isinstance(names, (list, tuple)) and all(name is None or isinstance(name, (str, Mapping)) for name in names):
        return Names([_as_peft(name) for name in names], names)
    return names


def _as_peft(name: str | None | Mapping[str, float]) -> str:
    """For the invocation tokens that it looks for; several adapters on a row can't have any."""
    if isinstance(name, Mapping):
        return str(next(iter(name))) if len(name) == 1 else BASE
    return BASE if name is None else name


def check_count(names: Any, rows: int | None) -> None:
    """AdapterMismatchError: ``names`` are some, but not one for each row (None: that can't be told)"""
    if isinstance(names, (list, tuple)) and names and rows is not None and len(names) != rows:
        raise AdapterMismatchError(
            f"got {len(names)} adapter_names for a batch of {rows} rows; expected one name for each row"
            " (None or '__base__' for the base model)"
        )


def stand_before(model: nn.Module, runtime: Any) -> None:
    """Nothing, where ``model`` is no PeftModel."""
    if not isinstance(model, PeftModel):
        return
    read = ReadArguments(runtime)
    model.register_forward_pre_hook(read, with_kwargs=True)
    if hasattr(type(model), "generate"):
        vars(model)["generate"] = PeftGenerate(model, read)


def step_aside(model: nn.Module) -> None:
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, ReadArguments):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    if isinstance(vars(model).get("generate"), PeftGenerate):
        del vars(model)["generate"]
