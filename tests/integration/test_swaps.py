"""Adapters come and go at random while four threads run forwards; every output is plain PEFT's for the adapters that
were there at one moment of that forward.

A few hundred changes in CI; ten thousand with ``pytest -m slow tests/integration/test_swaps.py``.
"""

from __future__ import annotations

import sys
import time

import pytest

import lorafx
from tests.integration.in_threads import repeating
from tests.integration.many_adapters import LAYERS, Maker
from tests.integration.models import EAGER_GRAPH, LLAMA, difference, run, tokens, with_peft
from tests.integration.under_load import ROOM, Judge, under_load

INPUTS = {"input_ids": tokens(4)}


def call(model, names=None):
    return run(model, INPUTS, names)


@pytest.fixture(scope="module")
def maker() -> Maker:
    return Maker(INPUTS, largest_rank=64, structures=24)


@pytest.fixture(scope="module")
def judge(maker) -> Judge:
    return Judge([maker.make(i) for i in range(72)], run(LLAMA.build(LAYERS), INPUTS), call)


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        (500, {"options": EAGER_GRAPH}),
        (500, {"mode": "eager"}),
        pytest.param(10_000, {}, marks=pytest.mark.slow),
    ],
    ids=["graph", "eager", "ten thousand"],
)
def test_changes_under_load(changes, how, judge, tmp_path):
    """Ranks 1 to 64, random layers; from memory, from a folder, and read before."""
    room = {"max_adapters": ROOM, "max_rank": 64, "target_modules": "all-linear"}
    model = lorafx.compile(LLAMA.build(LAYERS), None, **how, **room)
    sources: list[object] = []
    for i, one in enumerate(judge.contents):
        if i % 3 == 0:
            one.save(tmp_path / str(i))
            sources.append(str(tmp_path / str(i)))
        else:
            sources.append((one.state, one.config) if i % 3 == 1 else model.lora.read((one.state, one.config)))
    first = judge.contents[0]
    bad = ({key: value * float("nan") for key, value in first.state.items()}, first.config)
    under_load(model, sources, judge, changes, bad)


@pytest.mark.parametrize("changes", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_changes_of_a_peft_model_under_load(changes, judge, tmp_path):
    """The same through PEFT's layers, where each change also goes through PEFT's own methods."""
    for i, one in enumerate(judge.contents[:12]):
        one.save(tmp_path / str(i))
    whole = next(i for i, one in enumerate(judge.contents) if len(one.config.target_modules) == 7)
    judge.contents[whole].save(tmp_path / "whole")
    peft_model = with_peft(LLAMA.build(LAYERS), {"whole": str(tmp_path / "whole")})
    room = {"max_adapters": ROOM + 1, "max_rank": 64, "target_modules": "all-linear"}
    model = lorafx.compile(peft_model, options=EAGER_GRAPH, **room)
    sources = [str(tmp_path / str(i)) for i in range(12)]
    first = judge.contents[0]
    bad = ({key: value * float("nan") for key, value in first.state.items()}, first.config)
    under_load(model, sources, Judge(judge.contents[:12], judge.base, call), changes, bad)


def test_the_active_adapter_of_a_peft_model_is_replaced_under_load(maker, tmp_path):
    """PEFT's forward looks its config up before it comes to where calls wait for changes."""
    contents = [maker.make(i) for i in range(3)]
    for i, one in enumerate(contents):
        one.save(tmp_path / str(i))
    peft_model = with_peft(LLAMA.build(LAYERS), {"a": str(tmp_path / "0")})
    room = {"max_adapters": 2, "max_rank": 64, "target_modules": "all-linear"}
    model = lorafx.compile(peft_model, options=EAGER_GRAPH, **room)
    call(model)
    calls, interval = [], sys.getswitchinterval()

    def one_of_them():
        got = call(model)
        assert any(difference(got, one.expected) <= 1e-5 for one in contents)
        calls.append(got)

    sys.setswitchinterval(1e-4)
    try:
        with repeating(one_of_them, 4):
            for i in range(40):
                model.lora.replace("a", str(tmp_path / str(i % 3)))
                time.sleep(0.005)
    finally:
        sys.setswitchinterval(interval)
    assert len(calls) > 40
    report = lorafx.explain(model)
    assert (len(report.graphs), report.retraces) == (1, [])
