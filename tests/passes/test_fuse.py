"""``lorafx.fuse``: a new graph and a report; what it was given stays as it was."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch

import lorafx
from lorafx.errors import LorafxError
from lorafx.explain import Report
from tests.passes.toys import inputs, siblings


@pytest.fixture
def traced() -> torch.fx.GraphModule:
    return torch.fx.symbolic_trace(siblings(3, bias=True))


def test_the_given_graph_stays_as_it_was(traced):
    code, nodes = traced.code, [(node.name, dict(node.meta)) for node in traced.graph.nodes]
    fused, report = lorafx.fuse(traced, (inputs(),))
    assert isinstance(fused, torch.fx.GraphModule)
    assert isinstance(report, Report)
    assert fused is not traced
    assert traced.code == code
    assert [(node.name, dict(node.meta)) for node in traced.graph.nodes] == nodes
    for ours, theirs in zip(fused(inputs()), traced(inputs()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_parameters_are_shared(traced):
    fused, _ = lorafx.fuse(traced)
    theirs = {id(parameter) for parameter in traced.parameters()}
    assert {id(parameter) for parameter in fused.parameters()} <= theirs
    before = [out.clone() for out in fused(inputs())]
    with torch.no_grad():
        traced.get_parameter("q.lora_b.weight").zero_()
    after = fused(inputs())
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_report(traced):
    _, report = lorafx.fuse(traced, (inputs(),))
    assert [branch.name for branch in report.groups[0].branches] == ["q", "k", "v"]
    assert report.groups[0].op == "fused_lora"
    assert report.recompiles == 0
    data = json.loads(json.dumps(report.to_dict()))
    rank = traced.get_parameter("k.lora_a.weight").shape[0]
    shapes = {"in_features": 10, "out_features": 8, "ranks": [rank], "rows": rank}
    assert data["groups"][0]["branches"][1] == {"name": "k", **shapes}
    assert data["graphs"][0]["ops_after"]["lorafx.fused_lora"] == 1
    assert "1 group(s) of 3 LoRA branch(es), 0 skipped" in str(report)
    assert "q, k, v" in str(report)
    assert "10 -&gt; 12, 8, 4" in report._repr_html_()
    assert report.dot().startswith("digraph")
    assert "fused_lora" in report.graphs[0].after
    assert "fused_lora" not in report.graphs[0].before


def test_nothing_to_fuse():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    fused, report = lorafx.fuse(torch.fx.symbolic_trace(model))
    assert report.groups == report.skipped == []
    assert "0 group(s)" in str(report)
    assert report.dot().startswith("digraph")
    assert torch.equal(fused(inputs(4)), model(inputs(4)))


def test_groups_of_one_module_are_all_counted():
    """Functional LoRA: several groups stand in one module and would share its name."""
    from torch.nn import functional as F

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("first", "second"):
                setattr(self, name, torch.nn.Parameter(torch.randn(6, 6)))
                setattr(self, f"{name}_a", torch.nn.Parameter(torch.randn(2, 6)))
                setattr(self, f"{name}_b", torch.nn.Parameter(torch.randn(6, 2)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.linear(x, self.first) + F.linear(F.linear(x, self.first_a), self.first_b)
            return F.linear(x, self.second) + F.linear(F.linear(x, self.second_a), self.second_b)

    model = torch.nn.Sequential(Block(), Block())
    _, report = lorafx.fuse(torch.fx.symbolic_trace(model))
    assert [group.branches[0].name for group in report.groups] == ["0.first", "0.second", "1.first", "1.second"]
    torch._dynamo.reset()
    torch.compile(model, backend="lorafx", options={"inductor": False})(inputs(6))
    names = [group.branches[0].name for group in lorafx.explain(model).groups]
    assert names == ["0.first", "0.second", "1.first", "1.second"]


class Plain(torch.nn.Module):
    """Without annotations: as strings they keep torch from pickling the traced graph."""

    def __init__(self, model):
        super().__init__()
        self.q, self.k = model.q, model.k
        for site in (self.q, self.k):
            del site.spelling

    def forward(self, x):
        return tuple(s.base_layer(x) + s.lora_b(s.lora_a(x)) * 1.5 for s in (self.q, self.k))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))])
def test_copies_of_the_fused_graph(copied):
    fused, report = lorafx.fuse(torch.fx.symbolic_trace(Plain(siblings(2))), (inputs(),))
    assert len(report.groups) == 1
    other = copied(fused)
    for ours, theirs in zip(other(inputs()), fused(inputs()), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("lowering", ["auto", "aten", "reference"])
def test_lowerings(traced, lowering):
    fused, report = lorafx.fuse(traced, options={"lowering": lowering})
    assert report.groups[0].lowering == lowering
    with torch.no_grad():
        for ours, theirs in zip(fused(inputs()), traced(inputs()), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_unknown_options(traced):
    with pytest.raises(LorafxError, match="expected one of"):
        lorafx.fuse(traced, options={"lowering": "cuda"})
    with pytest.raises(LorafxError, match="unknown option"):
        lorafx.fuse(traced, options={"lowring": "aten"})


def test_fused_twice(traced):
    once, _ = lorafx.fuse(traced, (inputs(),))
    twice, report = lorafx.fuse(once, (inputs(),))
    assert report.groups == []
    assert twice.code == once.code


def test_a_report_of_another_model_is_not_given():
    """A model that is gone leaves addresses behind, which a new model may get."""
    for _ in range(3):
        model = siblings(1)
        torch._dynamo.reset()
        torch.compile(model, backend="lorafx", options={"inductor": False})(inputs())
        assert len(lorafx.explain(model).graphs) == 1
        del model
