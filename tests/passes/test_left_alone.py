"""What is not a branch, or not one that may be fused, stays as it was; where it looks like one, the reason is told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from tests.passes.toys import (
    SCALE,
    Site,
    Wrap,
    assert_fused,
    assert_untouched,
    fused_by,
    inputs,
    lora,
    ops,
    siblings,
)

ROADS = ("dynamo", "fx with inputs")


def used_twice(s: Site, x: Tensor) -> Tensor:
    delta = s.lora_b(s.lora_a(x))
    return s.base_layer(x) + delta * SCALE + delta.relu()


def rank_used_twice(s: Site, x: Tensor) -> Tensor:
    shrunk = s.lora_a(x)
    return s.base_layer(x) + s.lora_b(shrunk) * SCALE + shrunk.sum(-1, keepdim=True)


def read_through_a_view(s: Site, x: Tensor) -> Tensor:
    y = s.base_layer(x)
    flat = y.view(-1)
    out = y.add_(s.lora_b(s.lora_a(x)))
    return out + flat.view(out.shape)  # sees the sum


def read_after_the_write(s: Site, x: Tensor) -> Tensor:
    y = s.base_layer(x)
    out = y.add_(s.lora_b(s.lora_a(x)))
    return out * y


def x_written_before_the_sum(s: Site, x: Tensor) -> Tensor:
    x = x * 2.0
    y, shrunk = s.base_layer(x), s.lora_a(x)
    x.view(-1).add_(1)
    return y + s.lora_b(shrunk) * SCALE + x.sum()


def through_integers(s: Site, x: Tensor) -> Tensor:
    return s.base_layer(x) + s.lora_b(s.lora_a(x).to(torch.int32).to(x.dtype))


def biased_after_scale(s: Site, x: Tensor) -> Tensor:
    return s.base_layer(x) + F.linear(s.lora_a(x) * SCALE, s.b, s.base_layer.bias)


LOOK_ALIKES = {
    "an intermediate used twice": (used_twice, "used outside"),
    "the shrunk x used twice": (rank_used_twice, "used outside"),
    "a vector as scale": (lambda s, x: s.base_layer(x) + s.lora_b(s.lora_a(x)) * s.w_t[0], "several elements"),
    "a vector between A and B": (
        lambda s, x: s.base_layer(x) + s.lora_b(s.b_t[:, 0] * s.lora_a(x)),
        "several elements",
    ),
    "two scales of run time": (
        lambda s, x: s.base_layer(x) + s.lora_b(s.lora_a(x) * s.scale) * s.scale_buffer,
        "more than one scale",
    ),
    "a bias behind the scale": (biased_after_scale, "before B's bias"),
    "a delta of width one": (
        lambda s, x: s.base_layer(x) + F.linear(s.lora_a(x), s.b[:1].detach()) + F.linear(s.lora_a(x), s.narrow),
        "broadcast",
    ),
    "another x": (lambda s, x: s.base_layer(x.relu()) + s.lora_b(s.lora_a(x)), "reads the same input"),
    "x without its gradient": (lambda s, x: s.base_layer(x) + s.lora_b(s.lora_a(x.detach())), "reads the same input"),
    "in place, read through a view": (read_through_a_view, "in place while something else reads it"),
    "in place, read afterwards": (read_after_the_write, "in place while something else reads it"),
    "x written before the sum": (x_written_before_the_sum, "changed in place"),
}

OTHER_THINGS = {
    "an MLP": lambda s, x: s.base_layer(x) + s.lora_b(s.lora_a(x).relu()),
    "no sum": lambda s, x: s.base_layer(x) * s.lora_b(s.lora_a(x)),
    "base times alpha": lambda s, x: torch.add(s.lora_b(s.lora_a(x)), s.base_layer(x), alpha=2),
    "A is computed": lambda s, x: s.base_layer(x) + s.lora_b(x @ s.a_t.relu()),
    "B is computed": lambda s, x: s.base_layer(x) + s.lora_a(x) @ s.b_t.exp(),
    "through integers": through_integers,
    "A is sliced": lambda s, x: s.base_layer(x) + x @ s.a_t[:, :2] @ s.b_t[:2],
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_are_left_with_a_reason(name, road):
    spelling, reason = LOOK_ALIKES[name]
    model = siblings(1, spelling, bias=name == "a bias behind the scale", k=12)
    model.q.narrow = nn.Parameter(torch.randn(1, 3))
    report = assert_untouched(road, model, inputs(12), reason=reason)
    assert report.skipped[0].name
    assert reason in str(report)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", OTHER_THINGS)
def test_other_things_are_left_without_a_word(name, road):
    assert_untouched(road, siblings(1, OTHER_THINGS[name]), inputs(), reason=None)


@pytest.mark.parametrize("road", [*ROADS, "fx"])
def test_bias_of_a(road):
    model = siblings(1)
    model.q.lora_a.bias = nn.Parameter(torch.randn(3))
    assert_untouched(road, model, inputs(), reason="A has a bias")


@pytest.mark.parametrize("road", [*ROADS, "fx"])
@pytest.mark.parametrize("bias", [False, True])
def test_bottleneck_on_the_residual_stream(bias, road):
    torch.manual_seed(0)
    down, up = nn.Linear(10, 3, bias=bias), nn.Linear(3, 10, bias=bias)
    model = Wrap(lambda m, x: x + m.up(m.down(x)), lambda m, x: x, down=down, up=up)
    report = assert_untouched(road, model, inputs(), reason=None if bias else "reads the same input")
    assert [skipped.name for skipped in report.skipped] == ([] if bias else ["down"])


@pytest.mark.parametrize("road", ROADS)
def test_active_dropout(road):
    def dropped(site: Site, x: Tensor) -> Tensor:
        return site.base_layer(x) + site.lora_b(site.lora_a(site.drop(x))) * SCALE

    model = siblings(3, dropped).train()
    fused, report = fused_by(road, model, x := inputs())
    before, after = ops(report)
    assert before == after
    assert [skipped.name for skipped in report.skipped] == ["q", "k", "v"]
    assert all("dropout is active" in skipped.reason for skipped in report.skipped)
    # the same draws, in the same order
    torch.manual_seed(7)
    drawn = fused(x)
    torch.manual_seed(7)
    assert all(torch.equal(out, plain) for out, plain in zip(drawn, model(x), strict=True))


def test_dropout_of_p_0_is_idle_in_training():
    model = siblings(2, lambda s, x: s.base_layer(x) + s.lora_b(s.lora_a(s.drop(x))) * SCALE).train()
    for site in model.children():
        site.drop.p = 0.0
    assert_fused("dynamo", model, inputs(), groups=[2])


def test_a_draw_that_nobody_reads_is_not_removed():
    """It moves the draws that come after it."""

    def drawing(s: Site, x: Tensor) -> Tensor:
        F.dropout(x, 0.5, training=True)
        return lora(s, x)

    report = assert_fused("fx", siblings(1, drawing), inputs(), groups=[1])
    assert ops(report)[1]["dropout"] == 1


@pytest.mark.parametrize("road", ["dynamo", "fx with inputs"])
def test_in_place_is_fused_where_the_base_was_read_before(road):
    def read_before(s: Site, x: Tensor) -> Tensor:
        y = s.base_layer(x)
        early = y.relu()
        return y.add_(s.lora_b(s.lora_a(x)) * SCALE) + early

    model = siblings(1, read_before)
    with torch.no_grad():
        fused, report = fused_by(road, model, x := inputs())
        assert [len(group.branches) for group in report.groups] == [1]
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)


def test_hooks_and_subclasses_of_linear_are_opaque():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.Linear)

    for change in ("subclass", "hook"):
        model = siblings(1)
        if change == "subclass":
            model.q.lora_a.__class__ = Doubled
        else:
            model.q.lora_a.register_forward_hook(lambda module, args, out: 2 * out)
        traced = torch.fx.GraphModule(model, Tracer().trace(model))
        fused, report = lorafx.fuse(traced, (inputs(),))
        assert report.groups == []
        assert torch.equal(fused(inputs())[0], model(inputs())[0])


def test_without_example_inputs_casts_and_views_are_left():
    cast = siblings(1, lambda s, x: s.base_layer(x) + s.lora_b(s.lora_a(x.float())) * SCALE)
    assert_untouched("fx", cast, inputs(), reason="give example inputs")
    viewed = siblings(1, lambda s, x: s.base_layer(x.view(-1, 10)).view(2, 3, -1) + s.lora_b(s.lora_a(x)))
    assert_untouched("fx", viewed, inputs(), reason="give example inputs")
    assert_fused("fx with inputs", viewed, inputs(), groups=[1])


def test_without_shapes_a_narrow_delta_is_seen_by_its_weights():
    def narrow(s: Site, x: Tensor) -> Tensor:
        return s.base_layer(x) + F.linear(s.lora_a(x), s.narrow)

    model = siblings(1, narrow)
    model.q.narrow = nn.Parameter(torch.randn(1, 3))
    assert_untouched("fx", model, inputs(), reason="broadcast")


def test_contexts_between_branch_and_sum():
    def without_gradient(s: Site, x: Tensor) -> Tensor:
        y = s.base_layer(x)
        with torch.no_grad():
            delta = s.lora_b(s.lora_a(x))
        return y + delta

    model = siblings(1, without_gradient)
    fused, report = fused_by("dynamo", model, inputs())
    assert report.groups == []
    assert "context" in report.skipped[0].reason
    fused(inputs())[0].sum().backward()
    assert model.q.lora_a.weight.grad is None
    assert model.q.base_layer.weight.grad is not None
