"""``validate``: what the passes get wrong is undone, by itself, and said; what they get right stays."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lorafx
from lorafx import passes
from lorafx.kernels import cpp
from lorafx.passes.memory import Timeline
from tests.passes.toys import SCALE, Site, Wrap, inputs, lora, siblings
from tests.passes.wrong_rewrites import (
    IN_BRANCHES,
    IN_SITES_OF,
    as_pass,
    forgotten_write,
    lost_scale,
    routing_of_the_row_above,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def put_in(monkeypatch: pytest.MonkeyPatch, bug, victim: str = "k") -> None:
    *first, last = passes.REWRITE
    monkeypatch.setattr(passes, "REWRITE", (*first, as_pass(bug, victim), last))


def names(report) -> list[list[str]]:
    return [[branch.name for branch in group.branches] for group in report.groups]


def two_attentions() -> nn.Module:
    """Siblings alike in all sizes, so that a mix-up runs."""

    def attention(letters: str) -> nn.Module:
        options = {"ranks": [3] * len(letters), "widths": [8] * len(letters), "bias": True, "lora_bias": True}
        return siblings(len(letters), **options)

    model = Wrap(lambda m, x: (*m.first(x), *m.second(x)), lambda m, x: None)
    model.first, model.second = attention("qkv"), attention("qk")
    return model


@pytest.mark.parametrize("bug", IN_BRANCHES, ids=lambda bug: bug.__name__)
def test_wrong_rewrites_of_branches_are_undone(bug, monkeypatch):
    model, x, undone = two_attentions(), inputs(), IN_BRANCHES[bug]
    traced = torch.fx.symbolic_trace(model)
    put_in(monkeypatch, bug, "first.k")
    with torch.no_grad():
        expected = model(x)
        if bug.__name__ != "wrong_shape":
            wrong, _ = lorafx.fuse(traced, (x,), validate=False)
            assert not all(map(torch.allclose, wrong(x), expected)), "the bug is none"
        fused, report = lorafx.fuse(traced, (x,), validate=True)
        for out, truth in zip(fused(x), expected, strict=True):
            torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)
    assert {skipped.name for skipped in report.skipped} == {f"first.{name}" for name in undone}
    assert all("left as it is" in skipped.reason for skipped in report.skipped)
    rest = [f"first.{name}" for name in "qkv" if name not in undone]
    assert names(report) == [*([rest] if rest else []), ["second.q", "second.k"]]
    assert report.graphs[0].passes.proved == len(rest) + 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.q(x)) * self.k(x) + self.v(x)


class Block(nn.Module):
    """Two attentions: a bug in the first one says nothing of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.other = Attention(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.other(x + torch.tanh(self.attention(x)))


def adapted(lowering: str, **options: object) -> tuple[nn.Module, nn.Module]:
    """A PeftModel of two adapters, and the same compiled."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    common = {"target_modules": ["q", "k", "v"], "init_lora_weights": False, "lora_alpha": 12}
    plain = get_peft_model(Block(), LoraConfig(r=4, **common)).eval()
    plain.add_adapter("second", LoraConfig(r=3, **common))
    model = copy.deepcopy(plain)
    lorafx.compile(model, options={"inductor": False, "lowering": lowering}, **options)
    return plain, model


def expected_of(plain: nn.Module, x: Tensor, rows: list[str | None]) -> Tensor:
    outs = []
    for row, name in zip(x.split(1), rows, strict=True):
        if name is None:
            with plain.disable_adapter():
                outs.append(plain(row))
        else:
            plain.set_adapter(name)
            outs.append(plain(row))
    return torch.cat(outs)


ROWS = ["default", None, "second", "second"]
SITE_BUGS = [(lowering, bug) for lowering, bugs in IN_SITES_OF.items() for bug in bugs]


@pytest.mark.parametrize(("lowering", "bug"), SITE_BUGS, ids=lambda value: getattr(value, "__name__", value))
def test_wrong_rewrites_of_sites_are_undone(lowering, bug, monkeypatch):
    if lowering == "cpp" and not cpp.is_built():
        pytest.skip("no C++20 compiler")
    undone = IN_SITES_OF[lowering][bug]
    put_in(monkeypatch, bug, "attention.k")
    plain, model = adapted(lowering, validate=True)
    x = torch.randn(4, 3, 12)
    with torch.no_grad():
        out = model(x, adapter_names=ROWS)
        torch.testing.assert_close(out, expected_of(plain, x, ROWS), **CLOSE)
    report = lorafx.explain(model)
    assert sorted(skipped.name.rpartition(".")[2] for skipped in report.skipped) == sorted(undone)
    assert all("probe inputs" in skipped.reason for skipped in report.skipped)
    left = [["q", "k", "v"], [name for name in "qkv" if name not in undone]]
    found = [[branch.name.rpartition(".")[2] for branch in group.branches] for group in report.groups]
    assert sorted(found, key=len, reverse=True) == [group for group in left if group]


def test_a_bug_in_the_routing_of_a_site_shows_without_validation(monkeypatch):
    """What the tests above undo is a bug."""
    put_in(monkeypatch, routing_of_the_row_above)
    plain, model = adapted("aten", validate=False)
    x = torch.randn(4, 3, 12)
    with torch.no_grad():
        assert not torch.allclose(model(x, adapter_names=ROWS), expected_of(plain, x, ROWS), **CLOSE)


def writing_between(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    x = x * 2.0
    q = m.q(x)
    x.add_(1.0)
    return q, m.k(x), m.v(x)


def test_a_sibling_moved_over_a_write_is_undone(monkeypatch):
    model = Wrap(writing_between, lambda m, x: None)
    model.q, model.k, model.v = (Site(lora, 10, 6, 2) for _ in range(3))
    monkeypatch.setattr(Timeline, "is_quiet", lambda *args: True)
    x = inputs()
    with torch.no_grad():
        traced = torch.fx.symbolic_trace(model)
        _, wrong = lorafx.fuse(traced, (x,), validate=False)
        assert names(wrong) == [["q", "k", "v"]]
        fused, report = lorafx.fuse(traced, (x,), validate=True)
        for out, truth in zip(fused(x), model(x), strict=True):
            torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)
    assert names(report) == [["q"]]
    assert [skipped.name for skipped in report.skipped] == ["k", "v"]


def writing_to_its_input(m: nn.Module, x: Tensor) -> Tensor:
    out = m.k(x)
    x.add_(1.0)
    return out


def test_a_write_to_an_input_that_is_lost_leaves_the_graph_as_it_was(monkeypatch):
    model = Wrap(writing_to_its_input, lambda m, x: None, k=Site(lora, 10, 6, 2))
    put_in(monkeypatch, forgotten_write)
    traced, x = torch.fx.symbolic_trace(model), inputs()
    given = x.clone()
    fused, report = lorafx.fuse(traced, (x,), validate=True)
    assert torch.equal(x, given), "the probe must not write to what it was given"
    assert report.groups == []
    assert "leaves other numbers in its inputs" in report.skipped[0].reason
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(given.clone()))
    assert torch.equal(x, given + 1)


def test_a_fresh_adapter_is_proved_by_another_one():
    """B is zero, so nothing that is done with it shows: noise takes its place, and it stays as it was."""
    model, x = siblings(3), inputs()
    with torch.no_grad():
        for site in model.children():
            site.lora_b.weight.zero_()
    _, report = lorafx.fuse(torch.fx.symbolic_trace(model), (x,), validate=True)
    assert names(report) == [["q", "k", "v"]]
    assert not any(site.lora_b.weight.any() for site in model.children())


def test_a_bug_in_a_fresh_adapter_shows(monkeypatch):
    model, x = siblings(3, ranks=(3, 3, 3)), inputs()
    with torch.no_grad():
        for site in model.children():
            site.lora_b.weight.zero_()
    put_in(monkeypatch, lost_scale)
    _, report = lorafx.fuse(torch.fx.symbolic_trace(model), (x,), validate=True)
    assert names(report) == [["q", "v"]]


@pytest.mark.parametrize("size", [1e-6, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_of_any_size_are_proved(size, dtype):
    """Beside a base output that is much larger, or smaller, nothing would be seen: B is scaled for the probe."""
    model, x = siblings(3).to(dtype), inputs(dtype=dtype)
    with torch.no_grad():
        for site in model.children():
            site.lora_b.weight.mul_(size)
    kept = [site.lora_b.weight.clone() for site in model.children()]
    _, report = lorafx.fuse(torch.fx.symbolic_trace(model), (x,), validate=True)
    assert names(report) == [["q", "k", "v"]]
    assert report.graphs[0].passes.proved == 3
    assert all(torch.equal(site.lora_b.weight, old) for site, old in zip(model.children(), kept, strict=True))


def test_what_adds_nothing_can_not_be_proved():
    model = siblings(2, lambda s, x: s.base_layer(x) + s.lora_b(s.lora_a(x)) * 0.0)
    fused, report = lorafx.fuse(torch.fx.symbolic_trace(model), (inputs(),), validate=True)
    assert report.groups == []
    assert [skipped.name for skipped in report.skipped] == ["q", "k"]
    assert "can't be proved" in report.skipped[0].reason
    assert not any("lorafx" in str(node.target) for node in fused.graph.nodes)


def test_without_inputs_there_is_nothing_to_try():
    traced = torch.fx.symbolic_trace(siblings(2))
    with pytest.raises(lorafx.LorafxError, match="needs example_inputs"):
        lorafx.fuse(traced, validate=True)
    assert len(lorafx.fuse(traced)[1].groups) == 1  # LORAFX_VALIDATE, which the tests set, asks where it can


def test_the_switches(monkeypatch):
    traced, x = torch.fx.symbolic_trace(siblings(2)), inputs()
    monkeypatch.setenv("LORAFX_VALIDATE", "0")
    assert lorafx.fuse(traced, (x,))[1].graphs[0].passes.proved is None
    assert lorafx.fuse(traced, (x,), options={"validate": True})[1].graphs[0].passes.proved == 2
    monkeypatch.setenv("LORAFX_VALIDATE", "1")
    assert lorafx.fuse(traced, (x,))[1].graphs[0].passes.proved == 2
    assert lorafx.fuse(traced, (x,), validate=False)[1].graphs[0].passes.proved is None


def test_the_backend_of_torch_compile(monkeypatch):
    put_in(monkeypatch, lost_scale)
    torch._dynamo.reset()
    model, x = siblings(3), inputs()
    compiled = torch.compile(model, backend="lorafx", options={"inductor": False, "validate": True})
    with torch.no_grad():
        for out, truth in zip(compiled(x), model(x), strict=True):
            torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)
    assert names(lorafx.explain(model)) == [["q", "v"]]


def test_draws_and_buffers_are_left_alone():
    """Validation runs the graph, and leaves no trace of it."""

    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site, self.norm = Site(lora, 10, 6, 2), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.norm(self.site(x)), 0.5, training=True)

    model, x = Drawing().train(), inputs(10, 5)
    model.site.drop.p = 0.0
    torch.manual_seed(3)
    state = torch.get_rng_state()
    buffers = copy.deepcopy(dict(model.named_buffers()))
    _, report = lorafx.fuse(torch.fx.symbolic_trace(model), (x,), validate=True)
    assert len(report.groups) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


def test_float32_branches_beside_a_scale_of_run_time():
    model = siblings(2, lambda s, x: s.base_layer(x) + s.lora_b(s.lora_a(x)) * s.scale * SCALE)
    _, report = lorafx.fuse(torch.fx.symbolic_trace(model), (inputs(),), validate=True)
    assert report.graphs[0].passes.proved == 2
