"""Runs one timed case of the CPU benchmark: set up, check, warm up, take turns."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.cpu_cases import Timed, too_slow
from benchmarks.cpu_contenders import Reference, Workshop, adapter_bytes, available, nbytes_of, visible
from benchmarks.turns import quartiles, ratios, take_turns, timed


def progress(text: str) -> None:
    """A full run takes half an hour: say what goes on. Only the tables go to stdout."""
    print(f"  {text}", file=sys.stderr, flush=True)


def measure(case: Timed, base: PreTrainedModel, rounds: int, inductor: bool = True, slow: bool = False) -> dict:
    """Plain data: ``rows`` of the table, one for each contender, ``targets``, and ``notes``. ``slow``: leave out none.

    ContenderError: one computes something else than PEFT in float64
    """
    torch._dynamo.reset()
    workshop = Workshop(base, inductor)
    layers = len(base.model.layers)
    left_out = [entry for entry in case.entries if inductor and not slow and too_slow(entry, layers)]
    entries = [
        replace(entry, forward=visible(entry.forward, base))
        for entry in case.entries
        if available(entry.kind) and entry not in left_out
    ]
    references = {
        forward: Reference(workshop, forward) for forward in dict.fromkeys(entry.forward for entry in entries)
    }
    steps: dict[str, Callable[..., Tensor]] = {}
    rows = []
    for entry in entries:
        contender = workshop.make(entry)
        started = time.perf_counter()
        logits = contender.step()
        seconds = time.perf_counter() - started
        distance = references[entry.forward].check(entry, logits)
        progress(f"{entry.name}: first call {seconds:.1f} s, {distance:.0e} from float64")
        steps[entry.name] = contender.step
        rows.append(
            {
                "contender": entry.name,
                "first_call_seconds": seconds,
                "distance": distance,
                "bytes": contender.nbytes,
                "base_bytes": nbytes_of(base),
                "adapter_bytes": adapter_bytes(base, entry.forward),
            }
        )
    references.clear()
    gc.collect()
    progress(f"{rounds} rounds")
    seconds = take_turns({name: lambda _, step=step: timed(step) for name, step in steps.items()}, rounds)
    notes = [
        f"{entry.name} was left out: its {layers} layers compile for very long; --slow waits" for entry in left_out
    ]
    return {**with_times(rows, seconds, case.targets), "notes": notes}


def with_times(rows: list[dict], seconds: dict[str, list[float]], targets: tuple) -> dict:
    """``rows`` with times and ratios to the first row's, and what became of ``targets``."""
    first = rows[0]["contender"]
    for row in rows:
        mine = seconds[row["contender"]]
        row["seconds"], row["ratio"] = vars(quartiles(mine)), vars(ratios(mine, seconds[first]))
    verdicts = [target.verdict(ratios(seconds[target.of], seconds[target.to]).median) for target in targets]
    return {"rows": rows, "targets": verdicts}
