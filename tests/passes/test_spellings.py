"""The same branch, spelled as people spell it: found on every road, fused with its siblings, right to float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from lorafx.backend import Options, compile_graph
from tests.passes.toys import (
    ROADS,
    SCALE,
    Site,
    Wrap,
    assert_delta,
    assert_fused,
    assert_untouched,
    conv1d,
    functional_linear,
    fused_by,
    inputs,
    lora,
    siblings,
)


def loralib(site: Site, x: Tensor) -> Tensor:
    result = F.linear(x, site.w, bias=site.bias)
    result += (site.drop(x) @ site.a.transpose(0, 1) @ site.b.transpose(0, 1)) * SCALE
    return result


def two_adapters(site: Site, x: Tensor) -> Tensor:
    first = site.base_layer(x) + site.lora_b(site.lora_a(site.drop(x))) * SCALE
    return first + (x @ site.a_t @ site.b_t) * 0.5


def add_method_in_place(site: Site, x: Tensor) -> Tensor:
    result = site.base_layer(x)
    return result.add_(site.lora_b(site.lora_a(x)) * SCALE)


# Every one of them: base layer(s), then what is added
SPELLINGS = {
    "modules": lora,
    "F.linear": functional_linear,
    "x @ A @ B": lambda s, x: F.linear(x, s.w) + x @ s.a_t @ s.b_t * SCALE,
    "x @ A.T @ B.T": lambda s, x: x @ s.w.T + (x @ s.a.T @ s.b.T) * SCALE,
    "x @ A.t() @ B.mT": lambda s, x: x @ s.w.t() + (x @ s.a.t() @ s.b.mT) * SCALE,
    "matmul and transpose": lambda s, x: (
        torch.matmul(x, s.w.transpose(-1, -2))
        + torch.matmul(x.matmul(s.a.transpose(0, 1)), torch.transpose(s.b, 1, 0)) * SCALE
    ),
    "permute": lambda s, x: x @ s.w.permute(1, 0) + (x @ s.a.permute(1, 0) @ torch.permute(s.b_t, (0, 1))) * SCALE,
    "base with a bias added": lambda s, x: x @ s.w.T + s.bias + (x @ s.a_t @ s.b_t) * SCALE,
    "delta + base": lambda s, x: s.lora_b(s.lora_a(x)) * SCALE + s.base_layer(x),
    "in place": loralib,
    "add_": add_method_in_place,
    ".add": lambda s, x: s.base_layer(x).add(s.lora_b(s.lora_a(x)).mul(SCALE)),
    "add with alpha": lambda s, x: torch.add(s.base_layer(x), s.lora_b(s.lora_a(x)), alpha=SCALE),
    "scale at the left": lambda s, x: s.base_layer(x) + SCALE * s.lora_b(s.lora_a(x)),
    "scale before B": lambda s, x: s.base_layer(x) + s.lora_b(SCALE * s.lora_a(x)),
    "scale twice": lambda s, x: s.base_layer(x) + 3 * s.lora_b(s.lora_a(x) * 0.5),
    "divided": lambda s, x: s.base_layer(x) + s.lora_b(s.lora_a(x)) / 3 * 2.0,
    "no scale": lambda s, x: s.base_layer(x) + s.lora_b(s.lora_a(x)),
    "scale parameter": lambda s, x: s.base_layer(x) + s.lora_b(s.lora_a(x)) * s.scale,
    "scale buffer": lambda s, x: s.base_layer(x) + s.scale_buffer * s.lora_b(s.lora_a(x)),
    "scale of one element": lambda s, x: s.base_layer(x) + s.scale_of_one * s.lora_b(s.lora_a(x)),
    "scale parameter before B, times a number": lambda s, x: s.base_layer(x) + s.lora_b(s.lora_a(x) * s.scale) * 0.5,
    "Sequential": lambda s, x: s.base_layer(x) + s.pair(x) * SCALE,
    "dropout module": lambda s, x: s.base_layer(x) + s.lora_b(s.lora_a(s.drop(x))) * SCALE,
    "dropout function": lambda s, x: (
        s.base_layer(x) + s.lora_b(s.lora_a(F.dropout(x, 0.05, training=s.training))) * SCALE
    ),
    "identity": lambda s, x: s.base_layer(x) + s.lora_b(s.lora_a(s.same(x))) * SCALE,
    "contiguous": lambda s, x: s.base_layer(x) + s.lora_b(s.lora_a(x.contiguous())) * SCALE,
}
WITH_BIAS = {"base with a bias added", "modules", "F.linear", "in place"}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_fuses_with_its_siblings(name, road):
    model = siblings(2, SPELLINGS[name], bias=name in WITH_BIAS)
    report = assert_fused(road, model, inputs(), groups=[2])
    assert [branch.name.partition(".")[0] for branch in report.groups[0].branches] == ["q", "k"]
    assert [(branch.in_features, branch.out_features) for branch in report.groups[0].branches] == [(10, 12), (10, 8)]


# Shapes or dtypes decide here, so a graph without them won't do
SHAPED = {
    "Conv1D": lambda s, x: conv1d(x, s.w_t, s.bias) + s.lora_b(s.lora_a(s.drop(x))) * SCALE,
    "Conv1D, all of it": lambda s, x: conv1d(x, s.w_t, s.bias) + (x @ s.a_t @ s.b_t) * SCALE,
    "addmm of 2-d x, alpha": lambda s, x: torch.addmm(x @ s.w_t, x @ s.a_t, s.b_t, alpha=SCALE),
    "addmm of 2-d x": lambda s, x: torch.addmm(torch.mm(x, s.w_t), x.mm(s.a_t) * SCALE, s.b.t()),
    ".addmm": lambda s, x: F.linear(x, s.w).addmm(x @ s.a_t, s.b_t, alpha=SCALE),
    "views around the base": lambda s, x: (
        F.linear(x.reshape(-1, 10), s.w).view(x.shape[:-1] + (s.w.size(0),))  # noqa: RUF005
        + s.lora_b(s.lora_a(x)) * SCALE
    ),
    "float64 adapter on a float32 base": lambda s, x: (
        s.base_layer(x) + (F.linear(F.linear(x.double(), s.a.double()), s.b.double()) * SCALE).to(x.dtype)
    ),
}


@pytest.mark.parametrize("road", ["dynamo", "fx with inputs"])
@pytest.mark.parametrize("name", SHAPED)
def test_spellings_that_need_shapes_or_dtypes(name, road):
    x = inputs(10, 6) if "addmm" in name else inputs()
    assert_fused(road, siblings(2, SHAPED[name], bias=name.startswith("Conv1D")), x, groups=[2])


@pytest.mark.parametrize("road", ROADS)
def test_bias_of_b(road):
    assert_fused(road, siblings(3, lora, bias=True, lora_bias=True), inputs(), groups=[3])


@pytest.mark.parametrize("name", ["modules", "x @ A.T @ B.T", "in place", "scale parameter", "add with alpha"])
def test_export_graphs(name):
    assert_fused("export", siblings(2, SPELLINGS[name]), inputs(), groups=[2])


@pytest.mark.parametrize("road", ROADS)
def test_two_active_adapters_make_a_second_group(road):
    report = assert_fused(road, siblings(3, two_adapters), inputs(), groups=[3, 3])
    assert [branch.name for branch in report.groups[0].branches] == ["q", "k", "v"]


def test_scale_read_by_item():
    spelling = lambda s, x: s.base_layer(x) + s.lora_b(s.lora_a(x)) * s.scale_buffer.item()  # noqa: E731
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert_fused("dynamo", siblings(2, spelling), inputs(), groups=[2])
    assert_fused("fx", siblings(2, spelling), inputs(), groups=[2])


def test_scale_that_is_a_number_of_the_call():
    """Dynamo makes it a SymFloat when it changes; no second recompile follows."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site = siblings(1).q

        def forward(self, x: Tensor, scale: float) -> Tensor:
            return self.site.base_layer(x) + self.site.lora_b(self.site.lora_a(x)) * scale

    model, x, graphs = Scaled(), inputs(), []
    compiled = torch.compile(model, backend=counting(graphs), fullgraph=True)
    with torch.no_grad():
        for scale in (1.25, 2.5, -3.0, 0.125):
            torch.testing.assert_close(compiled(x, scale), model(x, scale), rtol=1e-5, atol=1e-5)
    assert graphs == [1, 1]


def counting(graphs: list[int]):
    """A backend that appends to ``graphs`` the number of groups in each graph."""

    def backend(gm, args):
        keep = lambda record: graphs.append(len(record.passes.groups))  # noqa: E731
        return compile_graph(gm, args, Options.parse({"inductor": False}), keep=keep)

    torch._dynamo.reset()
    return backend


@pytest.mark.parametrize("road", ROADS)
def test_opaque_base(road):
    """A base that is no linear layer (a quantised one, say) needs only to read the same x."""

    def base(m: nn.Module, x: Tensor) -> Tensor:
        return F.conv1d(x, m.kernel, padding=1)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return base(m, x) + m.up(m.down(x)) * SCALE

    torch.manual_seed(0)
    model = Wrap(forward, base, down=nn.Linear(10, 3, bias=False), up=nn.Linear(3, 10, bias=False))
    model.kernel = nn.Parameter(torch.randn(4, 4, 3))
    x = inputs(10, 2, 4)
    if road == "fx":
        assert_untouched(road, model, x, reason="give example inputs")
    else:
        assert_fused(road, model, x, groups=[1])


def peft(site: Site, x: Tensor) -> Tensor:
    """As PEFT writes it: bf16 base, float32 adapter, cast back."""
    result = site.base_layer(x)
    dtype = result.dtype
    result = result + site.lora_b(site.lora_a(site.drop(x.to(site.a.dtype)))) * SCALE
    return result.to(dtype)


def mixed(count: int, spelling) -> nn.Module:
    model = siblings(count, spelling)
    for site in model.children():
        site.base_layer.to(torch.bfloat16)
    return model


@pytest.mark.parametrize("road", ["dynamo", "fx with inputs"])
def test_bf16_base_with_float32_adapter(road):
    """Each branch casts x for itself; the siblings still share the bf16 x, and no cast is left."""
    report = assert_fused(road, mixed(3, peft), inputs(dtype=torch.bfloat16), groups=[3])
    assert ops_named(report, "to") == 0


@pytest.mark.parametrize("road", ["dynamo", "fx with inputs"])
def test_bf16_base_whose_sum_stays_float32(road):
    """Without the cast back the result is float32: the base output is cast before the op."""
    model = mixed(2, lambda s, x: s.base_layer(x) + s.lora_b(s.lora_a(x.to(s.a.dtype))) * SCALE)
    report = assert_fused(road, model, inputs(dtype=torch.bfloat16), groups=[2])
    assert ops_named(report, "to") == 2


@pytest.mark.parametrize("road", ["dynamo", "fx with inputs"])
def test_each_sibling_casts_x_for_its_base(road):
    def spelling(site: Site, x: Tensor) -> Tensor:
        x = x.to(site.w.dtype)
        return site.base_layer(x) + site.lora_b(site.lora_a(x.to(site.a.dtype))).to(x.dtype) * SCALE

    with torch.no_grad():
        fused, report = fused_by(road, model := mixed(3, spelling), x := inputs())
        assert [len(group.branches) for group in report.groups] == [3]
        for out, expected in zip(fused(x), model(x), strict=True):
            torch.testing.assert_close(out, expected, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("road", ["dynamo", "fx with inputs"])
def test_a_base_cast_narrower_than_the_branch_reads(road):
    """The branch reads the float32 x: the base's rounded one won't do."""
    model = mixed(1, lambda s, x: s.base_layer(x.bfloat16()).float() + s.lora_b(s.lora_a(x)) * SCALE)
    with torch.no_grad():
        fused, report = fused_by(road, model, x := inputs())
        assert [len(group.branches) for group in report.groups] == [1]
        torch.testing.assert_close(fused(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_groups_of_any_size(count):
    assert_fused("dynamo", siblings(count), inputs(), groups=[count])


@pytest.mark.parametrize("targeted", ["q", "v", "qv", "kv", "qkv"])
def test_any_subset_of_q_k_v(targeted):
    model = siblings(3)
    for name, site in model.named_children():
        if name not in targeted:
            site.spelling = lambda s, x: s.base_layer(x)
    x = inputs()
    with torch.no_grad():
        fused, report = fused_by("fx", model, x)
        assert [[branch.name for branch in group.branches] for group in report.groups] == [list(targeted)]
        for out, expected in zip(fused(x), model(x), strict=True):
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3), (2, 1, 3)])
def test_leading_dimensions(shape):
    for road in ("fx", "fx with inputs"):
        assert_fused(road, siblings(2), inputs(10, *shape), groups=[2])


def test_batch_size_that_varies():
    model, graphs = siblings(2), []
    compiled = torch.compile(model, backend=counting(graphs), fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (2, 5, 7, 3):
            x = inputs(10, rows, 3 + rows)
            for out, expected in zip(compiled(x), model(x), strict=True):
                torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert graphs == [1]


def ops_named(report, name: str) -> int:
    return report.graphs[0].passes.after[name]


def test_inductor_compiles_what_the_passes_make():
    """The other tests run the rewritten graph as it is."""
    model = siblings(3, SPELLINGS["modules"], bias=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="lorafx", fullgraph=True)
    with torch.no_grad():
        assert_delta(model, compiled, inputs())
    assert [len(group.branches) for group in lorafx.explain(model).groups] == [3]
