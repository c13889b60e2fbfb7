"""``validate=True``: each rewrite is tried on probe inputs beside what it replaces, and undone where it differs.

What is judged is the passes' work, branch by branch and site by site: the sum that each fused op gives, the layers
that were folded into it, the routing that groups share, what was moved, and what is written to inputs. What Inductor
makes of the rewritten graph is not, nor how ``passes/outline.py`` cuts it. A graph that can't be tried (fake inputs, an
error on probe inputs) stays as it was traced: what is not proved is undone.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import fx

from lorafx.lockstep import Blame, Rewritten, Traced, alike, all_nodes, readers_of, stand_ins_of
from lorafx.passes import PassRecord
from lorafx.passes.branch import Skipped
from lorafx.passes.record import StandIn
from lorafx.probe_bank import ProbeBank
from lorafx.probe_inputs import NoProbe, Probe

log = logging.getLogger("lorafx")

VARIABLE = "LORAFX_VALIDATE"
ROUNDS = 4  # of undoing and looking again, before everything is undone
SCALINGS = 3  # until what is added can be seen
UNSEEN = 1e4  # by how much to enlarge what was lost in rounding
LIKE = 3  # what is added, and what it is added to, differ in size by no more than this factor

Rewrite = Callable[[Collection[str]], tuple[fx.GraphModule, PassRecord]]


def default() -> bool:
    """What holds where nobody says ``validate``: the environment variable LORAFX_VALIDATE."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")


@torch._dynamo.disable
@torch.inference_mode(False)
@torch.no_grad()
def validated(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    rewrite: Rewrite,
    unchanged: Callable[[], fx.GraphModule],
    sites: Callable[[PassRecord], ProbeBank] | None = None,
) -> tuple[fx.GraphModule, PassRecord]:
    """A rewritten graph of which all that is fused is proved, and the record, with the rest among what was skipped.

    gm: as it was traced, only read; inputs: real tensors
    rewrite: makes a copy of it and rewrites that, but for the sums and site markers with these names
    unchanged: makes a copy; sites: makes a ProbeBank, where the graph has markers of a bank
    """
    started = time.perf_counter()
    refused: Blame = {}
    names: dict[str, str] = {}
    rewritten, record = rewrite(refused)
    bank = None
    for _ in range(ROUNDS):
        stand_ins = stand_ins_of(all_nodes(rewritten))
        names |= {one.out: one.name for one in stand_ins}
        if not record.groups:
            break
        if bank is None and sites is not None:
            bank = sites(record)
        blame = _judge(gm, inputs, rewritten, stand_ins, bank)
        if not blame:
            break
        for out, reason in blame.items():
            log.warning("%s is left as it is: %s", names[out], reason)
        refused |= blame
        rewritten, record = rewrite(refused)
    else:
        refused |= _all(stand_ins_of(all_nodes(rewritten)), "its rewrite can't be proved")
        names |= {one.out: one.name for one in stand_ins_of(all_nodes(rewritten))}
        record.groups, record.folded = [], 0
    if refused and not record.groups:  # what else the passes did is not proved either
        rewritten, record.after = unchanged(), record.before
    record.skipped += [Skipped(names[out], f"{reason}; left as it is") for out, reason in refused.items()]
    record.proved = len(stand_ins_of(all_nodes(rewritten))) if record.groups else 0
    seconds = time.perf_counter() - started
    log.info("%d branch(es) proved equal on probe inputs, %d undone, %.1f s", record.proved, len(refused), seconds)
    return rewritten, record


def _judge(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    rewritten: fx.GraphModule,
    stand_ins: Collection[StandIn],
    bank: ProbeBank | None,
) -> Blame:
    try:
        probe, traced, written = _run_traced(gm, inputs, rewritten, stand_ins, bank)
    except NoProbe as error:
        return _all(stand_ins, f"its rewrite can't be proved: {error}")
    except Exception as error:  # of the model itself, on inputs that it was not made for
        return _all(stand_ins, f"its rewrite can't be proved: the graph fails on probe inputs ({type(error).__name__})")
    if bank is not None:
        bank.poison(rewritten)
    values, attributes = probe.fresh()
    run = Rewritten(rewritten, attributes, bank, traced)
    try:
        with _same_draws():
            run.run(*values, enable_io_processing=False)
    except Exception as error:  # whatever a wrong rewrite may lead to
        return run.blame or _all(stand_ins, f"the rewritten graph fails on probe inputs ({type(error).__name__})")
    if not run.blame and not alike([values, attributes], written):
        return _all(stand_ins, "the graph leaves other numbers in its inputs, on probe inputs")
    return run.blame


def _run_traced(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    rewritten: fx.GraphModule,
    stand_ins: Collection[StandIn],
    bank: ProbeBank | None,
) -> tuple[Probe, Traced, Any]:
    """Run ``gm``, again where what was added was much smaller or larger than what it was added to, or not seen."""

    def run(probe: Probe, filled: bool = False) -> tuple[Traced, Any]:
        values, attributes = probe.fresh()
        traced = Traced(gm, attributes, bank, stand_ins, readers_of(rewritten), filled)
        with _same_draws():
            traced.run(*values, enable_io_processing=False)
        return traced, [values, attributes]

    try:
        probe = Probe(gm, inputs)
        traced, written = run(probe)
    except NoProbe:
        raise
    except Exception:  # noise where a zero had a meaning
        probe = Probe(gm, inputs, noise=False)
        traced, written = run(probe)
    for _ in range(SCALINGS):
        if not _scale(probe, traced, stand_ins):
            break
        traced, written = run(probe)
    if traced.hidden():
        with suppress(Exception):  # noise where a zero had a meaning
            filled, changed = run(probe, filled=True)
            if filled.hidden() < traced.hidden():
                traced, written = filled, changed
    return probe, traced, written


def _scale(probe: Probe, traced: Traced, stand_ins: Collection[StandIn]) -> bool:
    """Make what branches add like their base outputs in size, by their B and bias; was there anything to do?"""
    truths, seen = traced.truths(), set()
    for one in stand_ins:
        truth = truths.get(one.out)
        if truth is None or one.b is None or one.b in seen or not truth.y:
            continue
        ratio = truth.y / truth.delta if truth.delta else UNSEEN
        if not 1 / LIKE < ratio < LIKE:
            seen.add(one.b)
            probe.rescale(one.b, ratio)
        if one.bias is not None and (size := probe.size(one.bias) * abs(one.factor)) and size * LIKE < truth.y:
            seen.add(one.b)
            probe.rescale(one.bias, truth.y / size)
    return bool(seen)


@contextmanager
def _same_draws() -> Iterator[None]:
    """Random numbers are the same in both runs, and the caller's generators stay as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed(0)
        yield


def _all(stand_ins: Collection[StandIn], reason: str) -> Blame:
    return {one.out: reason for one in stand_ins}
