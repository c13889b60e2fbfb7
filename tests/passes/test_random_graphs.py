"""Random graphs with LoRA branches woven in: see ``random_graphs.py``, which tries thousands by one command."""

from __future__ import annotations

import copy
from collections import Counter

import hypothesis
import pytest
import torch

from lorafx.kernels import aten
from tests.passes.random_graphs import Plan, Program, Step, assert_like, check, fused_layers, given_to, run, try_many
from tests.passes.toys import fused_by

CHUNKS, GRAPHS = 4, 60


@pytest.mark.parametrize("seed", range(CHUNKS))
def test_rewritten_graphs_compute_the_same_and_nothing_else_is_fused(seed):
    total = try_many(GRAPHS, seed)
    assert total["graphs"] >= GRAPHS
    assert total["branches"] > GRAPHS
    assert total["left"] > GRAPHS / 4


def test_rewritten_graphs_of_dynamo_compute_the_same():
    def checked(plan: Plan) -> dict[str, int]:
        hypothesis.assume(any(not step.kind.startswith("other") for step in plan.steps))  # there are weights
        program, given = Program(plan), given_to(plan)
        expected = program.expected()
        with torch.no_grad():
            plain = run(program, given)
            truth = run(copy.deepcopy(program).double(), given) if plan.mixed else plain
            fused, report = fused_by("dynamo", program, *(tensor.clone() for tensor in given))
            assert_like(run(fused, given), plain, truth)
        found = fused_layers(report)
        assert found == expected, f"fused {found}, expected {expected}; skipped: {report.skipped}"
        return {"graphs": 1, "branches": found.total()}

    assert try_many(6, 5, checked, shrink=False)["branches"] > 6


def test_a_layer_behind_a_cast_that_was_written_to():
    """It reads what stands there now, not what the cast was made of. Found by these graphs (seed 31)."""
    steps = (Step("as PEFT", 0, 0, 0, 0), Step("other: write", 1, 0, 0, 0), Step(".add", 1, 0, 0, 0))
    assert check(Plan(0, True, "", steps))["branches"] == 2


def test_a_wrong_expectation_is_noticed(monkeypatch):
    """The check can fail: one branch more than there is, one that nobody expected, other numbers."""
    plan = Plan(1, False, "", (Step("siblings", 0, 0, 0, 1), Step("not: an MLP", 1, 0, 2, 2)))
    assert check(plan)["branches"] == 2
    honest = Program.expected
    for place, times in ((2, 1), (0, -1)):  # an MLP's layer, one branch less
        monkeypatch.setattr(Program, "expected", lambda self, p=place, t=times: honest(self) + Counter({p: t}))
        with pytest.raises(AssertionError, match="expected"):
            check(plan)
    monkeypatch.setattr(Program, "expected", honest)
    product = aten._add_product
    monkeypatch.setattr(aten, "_add_product", lambda y, s, b: product(y, s * 1.001, b))
    with pytest.raises(AssertionError):
        check(plan)
