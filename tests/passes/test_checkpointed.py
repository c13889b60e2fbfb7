"""Layers under ``torch.utils.checkpoint`` are graphs inside the graph: the passes go through them too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorafx
from lorafx.passes.memory import is_movable
from tests.passes.test_gradients import check, gradients
from tests.passes.toys import SCALE, inputs, siblings


class Checkpointed(nn.Module):
    """Siblings, some under a checkpoint, which may stand in another one."""

    def __init__(self, depth: int, dropout: float) -> None:
        super().__init__()
        self.inner = siblings(3, lambda s, x: s.base_layer(x) + s.lora_b(s.lora_a(s.drop(x))) * SCALE).train()
        for site in self.inner.children():
            site.drop.p = dropout
        self.outer, self.depth = siblings(1), depth

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        def run(x: Tensor, depth: int) -> tuple[Tensor, ...]:
            return checkpoint(run, x, depth - 1, use_reentrant=False) if depth else self.inner(x * 2.0)

        return (*run(x, self.depth), *self.outer(x))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("depth", [1, 2])
def test_bodies_are_rewritten(depth, dropout):
    model = Checkpointed(depth, dropout)
    eager, x = copy.deepcopy(model), inputs()
    torch._dynamo.reset()
    fused = torch.compile(model, backend="lorafx", fullgraph=True, options={"inductor": False})
    grads = []
    for call, owner in ((fused, model), (eager, eager)):
        torch.manual_seed(3)
        grads.append(gradients(call, owner, x))
    check(*grads)
    report = lorafx.explain(model)
    assert [len(group.branches) for group in report.groups] == ([1] if dropout else [3, 1])
    (graph,) = report.graphs
    assert graph.passes.after["linear"] == (3 * 3 + 1 if dropout else 4)
    assert len(report.skipped) == (3 if dropout else 0)


def test_dynamo_s_own_bodies_stay():
    """What Dynamo handed over is read again after the backend has returned."""
    model, seen = Checkpointed(1, 0.0), []

    def backend(gm, example_inputs):
        bodies = dict(gm.named_children())
        before = {name: body.code for name, body in bodies.items()}
        seen.append(lorafx.backend.compile_graph(gm, example_inputs, lorafx.backend.Options(inductor=False)))
        assert {name: body.code for name, body in gm.named_children()} == before
        assert bodies
        return seen[-1]

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(inputs())
    assert seen


def test_a_body_is_not_moved():
    """It may draw random numbers."""

    def backend(gm, example_inputs):
        (call,) = [n for n in gm.graph.nodes if isinstance(n.target, torch._ops.HigherOrderOperator)]
        assert not is_movable(gm, call)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(Checkpointed(1, 0.0), backend=backend)(inputs())
