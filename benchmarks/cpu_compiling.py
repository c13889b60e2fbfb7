"""What compiles, and when: the two cases of the CPU benchmark that are about Dynamo and Inductor, not about a step."""

from __future__ import annotations

import copy
import logging
import random
import time
from dataclasses import replace

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from transformers import PreTrainedModel

import lorafx
from benchmarks.cpu_cases import (
    BASE,
    COMPILE_TARGET,
    LORAFX,
    PEFT,
    PEFT_COMPILED,
    RECOMPILE_TARGET,
    TIMED,
    Entry,
)
from benchmarks.cpu_contenders import LIMIT, ContenderError, Reference, Workshop, distances, visible
from benchmarks.cpu_timing import progress, with_times
from benchmarks.forward_pass import make_step, sharing, with_adapters
from benchmarks.turns import take_turns, timed

LISTS = 64


def name_lists(rows: int, adapters: int, count: int = LISTS) -> list[list[str]]:
    """Different ones, always the same; the base model is among the names."""
    generator = random.Random(0)
    names = ["__base__", *(f"a{i}" for i in range(adapters))]
    found: dict[tuple[str, ...], None] = {}
    while len(found) < count:
        found[tuple(generator.choices(names, k=rows))] = None
    return [list(one) for one in found]


def recompiles(base: PreTrainedModel, inductor: bool = True, count: int = LISTS) -> dict:
    """Every list once, counting graphs; then all again in turns, timed. PEFT's compiled code is made for one list: past
    Dynamo's limit it runs eagerly. The base model stays out: its graphs would count against the same limit."""
    torch._dynamo.reset()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # it says at length that PEFT has reached the limit
    workshop, forward = Workshop(base, inductor), visible(TIMED[3].entries[0].forward, base)
    lists = name_lists(forward.rows, len(forward.ranks), count)
    kinds = (LORAFX, PEFT, PEFT_COMPILED)
    steps = {kind: workshop.make(Entry(kind, kind, forward)).step for kind in kinds}
    calls = {
        kind: [lambda step=step, names=names: step(adapter_names=names) for names in lists]
        for kind, step in steps.items()
    }
    rows = [{"contender": kind} for kind in kinds]
    outputs: dict[str, list[Tensor]] = {}
    for row in rows:
        kind = row["contender"]
        before, started = counters["stats"]["unique_graphs"], time.perf_counter()
        outputs[kind] = [call() for call in calls[kind]]
        row["graphs"] = counters["stats"]["unique_graphs"] - before
        progress(f"{kind}: {count} lists, {row['graphs']} graph(s), {time.perf_counter() - started:.1f} s")
    exact = with_adapters(copy.deepcopy(base), forward).double()
    exact = make_step(exact, forward, past=workshop.past(forward.rows))
    references = [exact(adapter_names=names) for names in lists]
    for kind in kinds:
        pairs = zip(outputs[kind], references, strict=True)
        worst = torch.stack([distances(mine, reference) for mine, reference in pairs]).max().item()
        if not worst <= LIMIT[base.dtype]:
            raise ContenderError(f"{kind} is {worst:.1e} away from PEFT in float64 for a list of adapter_names")
    seconds = take_turns(
        {kind: lambda i, mine=mine: timed(mine[i % count]) for kind, mine in calls.items()}, rounds=count
    )
    result = with_times(rows, seconds, ())
    again = max(row["graphs"] for row in rows if row["contender"] == LORAFX) - 1
    reported = lorafx.explain(workshop.lorafx_model(replace(forward, in_use=None))).recompiles
    result["targets"] = [RECOMPILE_TARGET.verdict(max(again, reported))]
    limit = torch._dynamo.config.recompile_limit
    result["notes"] = [
        f"{row['contender']}: {row['graphs']} graph(s) for {count} lists, of at most {limit} that Dynamo makes"
        for row in rows
        if row["contender"] != PEFT
    ]
    return result


def compile_seconds(base: PreTrainedModel) -> dict:
    """The first call, which makes one graph, less the second; nothing is read from Inductor's or Dynamo's caches."""
    forward, seconds = visible(TIMED[2].entries[0].forward, base), {}
    with torch._inductor.config.patch(force_disable_caches=True):
        small = sharing(base)  # what only the first compile of a process pays is paid before
        small.model.layers, small.config.num_hidden_layers = small.model.layers[:1], 1
        small.compile(dynamic=False)
        make_step(small, forward)()
        for kind in (BASE, LORAFX):
            torch._dynamo.reset()
            workshop = Workshop(base)
            contender, reference = workshop.make(Entry(kind, kind, forward)), Reference(workshop, forward)
            outputs: list[Tensor] = []
            with fresh_cache():  # the compiled C++ is kept by content, even with the caches off
                first = timed(lambda step=contender.step, outputs=outputs: outputs.append(step()))
            reference.check(Entry(kind, kind, forward), outputs[0])
            seconds[kind] = first - timed(contender.step)
            progress(f"{kind}: compiled in {seconds[kind]:.1f} s")
    rows = [
        {"contender": kind, "seconds": one_value(s), "ratio": one_value(s / seconds[BASE])}
        for kind, s in seconds.items()
    ]
    return {"rows": rows, "targets": [COMPILE_TARGET.verdict(seconds[LORAFX] / seconds[BASE])]}


def one_value(value: float) -> dict[str, float]:
    """Measured once: quartiles say nothing."""
    return {"low": value, "median": value, "high": value}
