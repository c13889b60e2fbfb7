"""``lorafx bench``: decode tokens/s of the base model, PEFT and lorafx, in one process, one after the other.

All three run transformers' ``generate`` with a static cache, greedily, and share the base weights' memory. What is
timed is a decode step: the time between two tokens. Outputs are compared first; where they disagree, nothing is timed.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import lorafx
from lorafx.cli.machine import describe
from lorafx.cli.models import load
from lorafx.cli.output import console, print_json, print_lines, print_table
from lorafx.errors import LorafxError, UnsupportedModelError

PROMPT = 16  # tokens
# How far lorafx's LoRA delta may be from PEFT's, relative to its size. PEFT rounds each branch to the base's dtype.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-2}
TOLERANCE_16_BIT = 0.2


@dataclass
class Stopwatch(transformers.StoppingCriteria):
    """Called by generate after each token: remembers when."""

    device: torch.device
    times: list[float] = field(default_factory=list)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def step(self) -> float:
        """Seconds of a decode step: the median, without the first token, which comes with the prefill."""
        return statistics.median(b - a for a, b in zip(self.times, self.times[1:], strict=False))


def run(
    model_name: str,
    adapters: Mapping[str, str],
    *,
    batch: int,
    tokens: int,
    rounds: int,
    threads: int | None,
    as_json: bool,
) -> int:
    """Compare, measure and print. LorafxError: the model or an adapter won't do, or outputs disagree"""
    if threads is not None:
        torch.set_num_threads(threads)
    base = load(model_name)
    if not base.can_generate():
        raise UnsupportedModelError(f"{type(base).__name__} generates nothing; bench times a decode step")
    if torch.accelerator.is_available():
        base.to(torch.accelerator.current_accelerator())
    rows = [list(adapters)[row % len(adapters)] for row in range(batch)]
    ids = torch.randint(1, base.get_input_embeddings().num_embeddings, (batch, PROMPT), generator=_seeded())
    contenders = _contenders(base, adapters, rows, ids.to(base.device), tokens)
    console(stderr=True).print("compiling, and comparing the outputs", style="dim")
    difference = _compare({title: generate()[0].logits[0] for title, generate in contenders.items()}, base.dtype)
    seconds: dict[str, list[float]] = {title: [] for title in contenders}
    for number in range(rounds):
        for title in sorted(contenders, reverse=bool(number % 2)):  # in turn, in either order
            seconds[title].append(contenders[title]()[1].step())
    medians = {title: statistics.median(steps) for title, steps in seconds.items()}
    facts = describe() | {"model": model_name, "dtype": str(base.dtype), "rows": batch, "rounds": rounds}
    _print(facts, {title: medians[title] for title in contenders}, batch, difference, as_json)
    return 0


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _contenders(
    base: nn.Module, adapters: Mapping[str, str], rows: list[str], ids: Tensor, tokens: int
) -> dict[str, Callable[[], tuple[Any, Stopwatch]]]:
    """By title, what generates once: its output, and the times of the tokens."""
    base.generation_config.eos_token_id = None  # so that each run has the same length
    (first, path), *others = adapters.items()
    ours = lorafx.compile(_sharing(base), dict(adapters), dynamic=False)  # which checks the files, so it comes first
    theirs = peft.PeftModel.from_pretrained(_sharing(base), path, adapter_name=first).eval()
    for name, other in others:
        theirs.load_adapter(other, adapter_name=name)
    names = {} if len(adapters) == 1 else {"adapter_names": rows}
    base.compile(dynamic=False)

    def generate(model: Any, **extra: Any) -> tuple[Any, Stopwatch]:
        watch = Stopwatch(base.device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=tokens,
                pad_token_id=0,
                cache_implementation="static",
                disable_compile=True,  # what is to be compiled is
                stopping_criteria=transformers.StoppingCriteriaList([watch]),
                output_logits=True,
                return_dict_in_generate=True,
                **extra,
            )
        return out, watch

    return {
        "base model, compiled": lambda: generate(base),
        "PEFT, eager": lambda: generate(theirs, **names),
        "lorafx, compiled": lambda: generate(ours, adapter_names=rows),
    }


def _sharing(model: nn.Module) -> nn.Module:
    """A copy with the same weights, in the same memory."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _compare(logits: Mapping[str, Tensor], dtype: torch.dtype) -> float:
    """How far the LoRA deltas of the first token's logits are apart, relative to PEFT's. LorafxError: too far"""
    base, theirs, ours = (part.double() for part in logits.values())
    size = (theirs - base).norm()
    difference = float((ours - theirs).norm() / size) if size > 0 else float((ours - base).norm() / base.norm())
    limit = TOLERANCES.get(dtype, TOLERANCE_16_BIT)
    if not difference <= limit:
        raise LorafxError(
            f"lorafx and PEFT disagree: their LoRA deltas are {difference:.1e} apart (relative), expected at most"
            f" {limit:.0e}. Nothing was timed. Are the adapters trained? Where B is zero there is no delta to compare."
        )
    return difference


def _print(facts: dict[str, Any], medians: dict[str, float], batch: int, difference: float, as_json: bool) -> None:
    reference = next(iter(medians.values()))
    rows = [
        {"what": title, "ms a step": round(step * 1e3, 2), "tokens/s": round(batch / step, 1)}
        | {"times base": round(step / reference, 2)}
        for title, step in medians.items()
    ]
    if as_json:
        print_json(facts | {"delta_difference": difference, "results": rows})
        return
    print_table(rows)
    print_lines(
        f"Medians of {facts['rounds']} rounds in turn, {batch} row(s); outputs agree: LoRA deltas are {difference:.0e}"
        " apart (relative).",
        ", ".join(f"{key} {value}" for key, value in facts.items() if key not in ("rows", "rounds")),
        "A tiny model shows what each call costs besides its work. These numbers are of this machine, now.",
    )
