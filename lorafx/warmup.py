"""``lorafx.warmup``: compiles ahead of the first real call what a model will need."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging as transformers_logging

from lorafx.errors import LorafxError
from lorafx.runtime import Runtime, runtime_of

STEPS = 3  # tokens: one from the prefill, one from a cache of a first length, one from a cache of any length

Inputs = Callable[[int, int], Mapping[str, Any]]


def warmup(
    model: nn.Module,
    batch_sizes: int | Iterable[int],
    lengths: int | Iterable[int],
    *,
    inputs: Inputs | None = None,
    **settings: Any,
) -> dict[tuple[int, int], float]:
    """Run ``model`` once at each of these batch sizes and prompt lengths, so that real calls find all compiled.

    model: what ``lorafx.compile`` returned; with mode "eager" it runs, and there is nothing to compile
    inputs: (batch size, length) -> keyword arguments of the call; by default ``input_ids`` and ``attention_mask``. Real
        calls should pass the same names: another set of arguments is another graph
    settings: for ``generate``, where the model has it: those that change shapes (``num_beams``, ``max_new_tokens`` with
        a static cache). Only three tokens are made, whatever ``max_new_tokens`` says

    A model that generates runs its prefill and its decode, others run one forward, without gradients, in eval mode.
    Adapters in use, modes and random numbers are afterwards as they were; generate's static caches are from now on as
    long as the longest here, which is transformers' own way to compile once. A progress bar is shown unless
    transformers' are off. Returns the seconds of each (batch size, length).

    LorafxError: a model that is not compiled by lorafx; sizes that are no positive whole numbers, or none; lengths
        beyond the model's positions; a model whose inputs are not token ids, without ``inputs``; ``settings`` for one
        that does not generate
    """
    runtime = runtime_of(model)
    if runtime is None:
        raise LorafxError("this model is not compiled by lorafx: call lorafx.compile first, then warm it up")
    generates = isinstance(runtime.root, PreTrainedModel) and runtime.root.can_generate()
    if settings and not generates:
        raise LorafxError(
            f"got {', '.join(settings)}, which are for generate; {type(runtime.root).__name__} does not generate."
            " Arguments of its forward come from inputs=."
        )
    rows, lengths = _sizes(batch_sizes, "batch_sizes"), _sizes(lengths, "lengths")
    make = inputs if inputs is not None else _token_ids(runtime.root, lengths[0])
    shapes = list(product(rows, lengths))
    seconds = {}
    with _left_as_it_was(runtime), transformers_logging.tqdm(shapes, desc="lorafx.warmup", unit="shape") as bar:
        for shape in bar:
            start = time.perf_counter()
            if generates:
                _generate(model, make(*shape), settings)
            else:
                model(**make(*shape))
            seconds[shape] = time.perf_counter() - start
    return seconds


def _sizes(given: Any, name: str) -> list[int]:
    """Largest first: generate's static caches stay as long as the longest was."""
    sizes = [given] if isinstance(given, int) or not isinstance(given, Iterable) else list(given)
    wrong = [size for size in sizes if not isinstance(size, int) or isinstance(size, bool) or size < 1]
    if wrong or not sizes:
        raise LorafxError(f"got {given!r} for {name}; expected a whole number from 1 on, or several of them")
    return sorted(set(sizes), reverse=True)


def _token_ids(root: nn.Module, longest: int) -> Inputs:
    main = getattr(root, "main_input_name", None)
    if main != "input_ids":
        raise LorafxError(
            f"{type(root).__name__}'s main input is {main or 'not known'}, not input_ids. Pass inputs=, a function from"
            " (batch size, length) to the keyword arguments of a call."
        )
    positions = getattr(root.config, "max_position_embeddings", None)
    if isinstance(positions, int) and longest > positions:
        raise LorafxError(f"got length {longest}; {type(root).__name__} has {positions} positions")
    device = next(root.parameters()).device

    def make(rows: int, length: int) -> dict[str, Tensor]:
        ones = torch.ones(rows, length, dtype=torch.int64, device=device)
        return {"input_ids": ones, "attention_mask": ones.clone()}

    return make


def _generate(model: nn.Module, inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    settings = {"max_new_tokens": STEPS, "do_sample": False, **settings}
    settings["min_new_tokens"] = min(STEPS, settings["max_new_tokens"])  # an end of text would be too early
    settings["stopping_criteria"] = StoppingCriteriaList([_AfterSteps()])
    model.generate(**inputs, **settings)


class _AfterSteps(StoppingCriteria):
    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.steps += 1
        return torch.full((input_ids.shape[0],), self.steps >= STEPS, device=input_ids.device)


@contextmanager
def _left_as_it_was(runtime: Runtime) -> Iterator[None]:
    """No gradients; eval mode; one adapter for all rows, since those chosen row by row fit one batch size only."""
    root, bank = runtime.root, runtime.bank
    modes = {module: module.training for module in runtime.model.modules()}
    devices = list({p.device for p in root.parameters() if p.device.type == "cuda"})
    runtime.follower.follow()
    one_for_all = bank.in_use[:1] if len(bank.in_use) > 1 else None
    if root.training:  # in eval mode each module stays in its own: diffusers' adapters are in training mode there
        runtime.model.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), bank.calling(one_for_all, None):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
