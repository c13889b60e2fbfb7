"""Which branches become one op, and where it stands."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lorafx
from tests.passes.toys import SCALE, Site, Wrap, assert_fused, fused_by, inputs, lora, siblings

FUSED = torch.ops.lorafx.fused_lora.default


def sizes(report) -> list[int]:
    return [len(group.branches) for group in report.graphs[0].passes.groups]


def assert_same(fused, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        for out, expected in zip(fused(x.clone()), model(x.clone()), strict=True):
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_base_outputs_of_later_siblings_move_up():
    """q's result is reshaped before k is computed: the op stands before that, behind all three base layers."""
    fused, _ = lorafx.fuse(torch.fx.symbolic_trace(siblings(3)), (inputs(),))
    names = [node.name for node in fused.graph.nodes]
    (op,) = [node for node in fused.graph.nodes if node.target is FUSED]
    at = names.index(op.name)
    bases = [node for node in fused.graph.nodes if node.op == "call_module"]
    assert [node.target for node in bases] == ["q.base_layer", "k.base_layer", "v.base_layer"]
    assert all(names.index(node.name) < at for node in bases)
    assert all(names.index(node.name) > at for node in fused.graph.nodes if node.target == "unflatten")
    assert op.args[0] == bases
    assert op.args[1].name == "x"


@pytest.mark.parametrize("road", ["dynamo", "fx"])
def test_two_attentions_on_one_input_are_two_groups(road):
    first, second = siblings(3), siblings(2)
    model = Wrap(lambda m, x: (m.first(x), m.second(x)), lambda m, x: (m.first.base(x), m.second.base(x)))
    model.first, model.second = first, second
    report = assert_fused(road, model, inputs(), groups=[3, 2])
    assert [group.parent for group in report.groups] == ["first", "second"]
    assert [branch.name for branch in report.groups[1].branches] == ["second.q", "second.k"]


@pytest.mark.parametrize("road", ["dynamo", "fx"])
def test_wrapped_layers_of_any_name_are_siblings(road):
    """The layer inside the wrapper need not be called as PEFT calls it."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.original, self.down = nn.Linear(10, 8), nn.Linear(10, 2, bias=False)
            self.up = nn.Linear(2, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.original(x) + self.up(self.down(x)) * SCALE

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = Wrapped(), Wrapped()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.q(x), self.k(x)

    model = Wrap(lambda m, x: (*m.first(x), *m.second(x)), lambda m, x: None, first=Attention(), second=Attention())
    fused, report = fused_by(road, model, inputs())
    assert [group.parent for group in report.groups] == ["first", "second"]
    assert sizes(report) == [2, 2]
    assert [branch.name for branch in report.groups[0].branches] == ["first.q.original", "first.k.original"]
    assert_same(fused, model, inputs())


@pytest.mark.parametrize("road", ["dynamo", "fx"])
def test_layers_one_after_another(road):
    """x of the second layer is the result of the first: a branch that is itself replaced."""
    model = Wrap(lambda m, x: (m.two(m.one(x)),), lambda m, x: None)
    model.one, model.two = Site(lora, 10, 10, 2), Site(lora, 10, 10, 3)
    fused, report = fused_by(road, model, inputs())
    assert sizes(report) == [1, 1]
    assert_same(fused, model, inputs())


@pytest.mark.parametrize("road", ["dynamo", "fx"])
def test_a_base_that_needs_a_siblings_result(road):
    def forward(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        q = m.q(x)
        k = (m.k.base_layer(x) + q.relu()) + m.k.lora_b(m.k.lora_a(x)) * SCALE
        return q, k, m.v(x)

    model = Wrap(forward, lambda m, x: None)
    model.q, model.k, model.v = (Site(lora, 10, 6, 2) for _ in range(3))
    fused, report = fused_by(road, model, inputs())
    assert sorted(sizes(report)) == [1, 2]
    assert [branch.name for branch in report.groups[0].branches] == ["q", "v"]
    assert_same(fused, model, inputs())


@pytest.mark.parametrize("road", ["dynamo", "fx", "fx with inputs"])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("through_a_view", [False, True])
def test_a_write_to_x_between_siblings_parts_them(early, through_a_view, road):
    """``early``: k's base output is computed before the write, its branch after."""

    def forward(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        x = x * 2.0
        q = m.q(x)
        k = m.k.base_layer(x) if early else None
        (x.view(-1) if through_a_view else x).add_(1.0)
        k = m.k.base_layer(x) if k is None else k
        return q, k + m.k.lora_b(m.k.lora_a(x)) * SCALE, m.v(x)

    model = Wrap(forward, lambda m, x: None)
    model.q, model.k, model.v = (Site(lora, 10, 6, 2) for _ in range(3))
    fused, report = fused_by(road, model, inputs())
    assert sizes(report) == [1, 2]
    assert_same(fused, model, inputs())


@pytest.mark.parametrize("road", ["dynamo", "fx with inputs"])
def test_a_write_elsewhere_does_not_part_siblings(road):
    """A key/value cache is written in place between layers and between siblings."""

    def forward(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        q = m.q(x)
        cache = torch.zeros_like(q)
        cache.copy_(q)
        cache.view(-1).mul_(2.0)
        return q, m.k(x), cache

    model = Wrap(forward, lambda m, x: None)
    model.q, model.k = (Site(lora, 10, 6, 2) for _ in range(2))
    fused, report = fused_by(road, model, inputs())
    assert sizes(report) == [2]
    assert_same(fused, model, inputs())


def test_contexts_part_siblings():
    def forward(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        q = m.q(x)
        with torch.autocast("cpu", torch.bfloat16):
            k = m.k(x)
        return q, k, m.v(x)

    model = Wrap(forward, lambda m, x: None)
    model.q, model.k, model.v = (Site(lora, 10, 6, 2) for _ in range(3))
    fused, report = fused_by("dynamo", model, inputs())
    assert sum(sizes(report)) == 3
    assert len(sizes(report)) >= 2
    with torch.no_grad():
        for out, expected in zip(fused(inputs()), model(inputs()), strict=True):
            assert out.dtype == expected.dtype
            bound = 2e-2 if out.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(out, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("road", ["dynamo", "fx"])
def test_one_layer_called_twice(road):
    model = Wrap(lambda m, x: (m.site(x), m.site(x), m.site(x.relu())), lambda m, x: None)
    model.site = Site(lora, 10, 6, 2)
    fused, report = fused_by(road, model, inputs())
    assert sum(sizes(report)) == 3
    assert_same(fused, model, inputs())


def test_two_adapters_on_siblings_that_are_computed_in_turn():
    """q's second adapter stands before k's first: groups cross, and each op stands where all it needs is there."""

    def forward(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        outs = []
        for site in (m.q, m.k, m.v):
            y = lora(site, x)
            outs.append(y + x @ site.a_t @ site.b_t)
        return tuple(outs)

    model = Wrap(forward, lambda m, x: None)
    model.q, model.k, model.v = (Site(lora, 10, 6, 2) for _ in range(3))
    fused, report = fused_by("fx", model, inputs())
    assert sizes(report) == [3, 3]
    assert_same(fused, model, inputs())


def test_counters_log_lint_and_meta(caplog):
    counters["lorafx"].clear()
    model = siblings(3)
    model.v.lora_a.bias = nn.Parameter(torch.randn(2))
    with caplog.at_level(logging.DEBUG, logger="lorafx.passes"):
        fused, report = lorafx.fuse(torch.fx.symbolic_trace(model), (inputs(),))
    assert counters["lorafx"]["mark_branches"] == 2
    assert counters["lorafx"]["fuse_groups"] == 1
    assert counters["lorafx"]["clean_up"] == 6  # A, B and the scaling of both
    assert "fuse_groups: 1" in caplog.text
    assert "v is left as it is: A has a bias" in caplog.text
    assert [skipped.name for skipped in report.skipped] == ["v"]
    fused.graph.lint()
    (op,) = [node for node in fused.graph.nodes if node.target is FUSED]
    assert [tuple(value.shape) for value in op.meta["example_value"]] == [(2, 3, 12), (2, 3, 8)]
    for i, out in enumerate(sorted(op.users, key=lambda node: node.args[1])):
        assert out.meta["example_value"].shape == (2, 3, (12, 8)[i])
        assert "qk"[i] in out.meta["nn_module_stack"]
