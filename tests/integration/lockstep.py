"""A compiled PeftModel and a plain one, to which the same is done: after each step they must agree in everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

import lorafx

from .models import LLAMA, assert_close, run

INPUTS = LLAMA.inputs(4)

Verb = Callable[[Any, dict[str, str]], Iterator[None]]  # (model, adapter folders); a check follows each yield


@contextmanager
def nothing_traced(model):
    before = lorafx.explain(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    after = lorafx.explain(model)
    assert (len(after.graphs), after.retraces) == (len(before.graphs), before.retraces)


def in_step(pair, verb: Verb, folders: dict[str, str], check: Callable[[Any], None]) -> None:
    """Do ``verb`` to both, with equal random numbers, and ``check`` the pair at each of its stops."""
    running = [verb(each, folders) for each in pair]
    while True:
        stopped = []
        for steps in running:
            torch.manual_seed(3)
            stopped.append(next(steps, "end"))
        if stopped == ["end", "end"]:
            return
        check(pair)


def adapters_of(model) -> list[str]:
    return list(dict.fromkeys(name for layer in lora_layers(model) for name in layer.lora_A))


def lora_layers(model) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def assert_equal_now(pair, names=None, tolerance=1e-5) -> None:
    model, reference = pair
    assert_close(run(model, INPUTS, names), run(reference, INPUTS, names), tolerance)


def assert_mixed_batches_equal(pair, tolerance=1e-5) -> None:
    """Every adapter that is there, beside the base model."""
    known = [*adapters_of(pair[1])[:3], "__base__"]
    assert_equal_now(pair, (known * 4)[:4], tolerance)


def assert_one_copy(model) -> None:
    """The bank holds what PEFT's layers hold, in the same memory."""
    bank = model.lora
    assert sorted(bank.names) == sorted(adapters_of(model))
    storage, held = bank.store.storage, 0
    first = storage.data_ptr()
    for layer in lora_layers(model):
        for part in (layer.lora_A, layer.lora_B):
            for parameter in part.parameters():
                assert first <= parameter.data_ptr() < first + storage.numel() * storage.element_size()
                held += parameter.numel()
        for name in layer.lora_A:
            torch.testing.assert_close(layer.lora_A[name].weight.shape[0], layer.lora_B[name].weight.shape[1])
    assert held == sum(bank.weights_of(name).elements() for name in bank.names)
    assert bank.nbytes - bank.reserved < held * storage.element_size() + 100_000


def assert_right(pair) -> None:
    """All of it."""
    assert_equal_now(pair)
    assert_mixed_batches_equal(pair)
    assert_one_copy(pair[0])


def assert_uncompiled_right(pair, tolerance=1e-6) -> None:
    """``uncompile`` leaves what PEFT would have, name for name and number for number."""
    model, reference = pair
    lorafx.uncompile(model)
    assert_equal_now(pair)
    assert_mixed_batches_equal(pair)
    mine, theirs = model.state_dict(), reference.state_dict()
    assert list(mine) == list(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-5, atol=tolerance)
