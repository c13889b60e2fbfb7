"""Small models with LoRA branches, spelled as people spell them, and how their rewritten graphs are judged.

Data are signed, and what is compared is what LoRA adds: the base output is subtracted, in the model's own dtype, from
the result, and in float64 from the reference.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from lorafx.explain import Report

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float64: 1e-12}
SCALE = 1.5
ROADS = ("dynamo", "fx", "fx with inputs")


class Site(nn.Module):
    """One adapted layer: the weights of ``base(x) + SCALE * B(A(x))`` in every form that a spelling needs."""

    def __init__(
        self,
        spelling: Callable[[Site, Tensor], Tensor],
        k: int,
        n: int,
        rank: int,
        bias: bool = False,
        lora_bias: bool = False,
    ) -> None:
        super().__init__()
        self.spelling = spelling
        self.base_layer = nn.Linear(k, n, bias=bias)
        self.lora_a = nn.Linear(k, rank, bias=False)
        self.lora_b = nn.Linear(rank, n, bias=lora_bias)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        self.a_t = nn.Parameter(self.lora_a.weight.detach().t().contiguous())
        self.b_t = nn.Parameter(self.lora_b.weight.detach().t().contiguous())
        self.w_t = nn.Parameter(self.base_layer.weight.detach().t().contiguous())
        self.pair = nn.Sequential(self.lora_a, self.lora_b)
        self.drop = nn.Dropout(0.05)
        self.same = nn.Identity()
        self.scale = nn.Parameter(torch.tensor(SCALE))
        self.register_buffer("scale_buffer", torch.tensor(SCALE))
        self.register_buffer("scale_of_one", torch.tensor([SCALE]))

    @property
    def w(self) -> Tensor:
        return self.base_layer.weight

    @property
    def a(self) -> Tensor:
        return self.lora_a.weight

    @property
    def b(self) -> Tensor:
        return self.lora_b.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.spelling(self, x)


class Siblings(nn.Module):
    """Sites that read the same x, called q, k, v, ...; their results are reshaped before the next one is computed."""

    def __init__(self, *sites: Site) -> None:
        super().__init__()
        for name, site in zip("qkvgu", sites, strict=False):
            self.add_module(name, site)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.heads(site(x)) for site in self.children())

    def base(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.heads(site.base_layer(x)) for site in self.children())

    @staticmethod
    def heads(out: Tensor) -> Tensor:
        return out.unflatten(-1, (-1, 1)).transpose(0, -2)


class Wrap(nn.Module):
    """A function as a model: ``base`` is what is subtracted from the result."""

    def __init__(self, forward: Callable[..., object], base: Callable[..., object], **modules: nn.Module) -> None:
        super().__init__()
        self._forward, self._base = forward, base
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> object:
        return self._forward(self, x)

    def base(self, x: Tensor) -> object:
        return self._base(self, x)


def lora(site: Site, x: Tensor) -> Tensor:
    """The plainest spelling."""
    return site.base_layer(x) + site.lora_b(site.lora_a(x)) * SCALE


def seeded(seed: int = 0) -> torch.Generator:
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def siblings(
    count: int = 3,
    spelling: Callable[[Site, Tensor], Tensor] = lora,
    *,
    ranks: Sequence[int] = (3, 5, 2, 4, 1),
    widths: Sequence[int] = (12, 8, 4, 6, 7),
    k: int = 10,
    **options: bool,
) -> Siblings:
    seeded()
    return Siblings(*(Site(spelling, k, widths[i], ranks[i], **options) for i in range(count))).eval()


def inputs(k: int = 10, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (2, 3)), k, generator=seeded(1)).to(dtype)


def fused_by(road: str, model: nn.Module, *args: Tensor) -> tuple[Callable[..., object], Report]:
    """The rewritten model and the report; ``road``: how the graph is made."""
    if road == "dynamo":
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="lorafx", fullgraph=True, options={"inductor": False})
        compiled(*args)
        return compiled, lorafx.explain(model)
    traced = torch.export.export(model, args).module() if road == "export" else torch.fx.symbolic_trace(model)
    return lorafx.fuse(traced, args if road == "fx with inputs" else None)


def ops(report: Report) -> tuple[Counter[str], Counter[str]]:
    """Before and after, of the only graph."""
    (graph,) = report.graphs
    assert not any(name.startswith("lorafx.") for name in graph.passes.before)
    assert "lorafx.branch" not in graph.passes.after
    return graph.passes.before, graph.passes.after


def assert_fused(
    road: str, model: nn.Module, *args: Tensor, groups: Sequence[int], skipped: int = 0, bound: float | None = None
) -> Report:
    """``groups``: how many branches each fused op takes, in graph order."""
    with torch.no_grad():
        fused, report = fused_by(road, model, *args)
        before, after = ops(report)
        passes = report.graphs[0].passes
        assert [len(group.branches) for group in passes.groups] == list(groups), report
        assert len(passes.skipped) == skipped, passes.skipped
        assert after["lorafx.fused_lora"] == len(groups)
        assert sum(after.values()) < sum(before.values()) + 2 * sum(groups)
        assert_delta(model, fused, *args, bound=bound)
    return report


def assert_untouched(road: str, model: nn.Module, *args: Tensor, reason: str | None) -> Report:
    """Nothing is fused, nothing is changed; ``reason``: words of the only reason, None if none is to be given."""
    with torch.no_grad():
        fused, report = fused_by(road, model, *args)
        before, after = ops(report)
        assert before == after
        for out, plain in zip(_flat(fused(*args)), _flat(model(*args)), strict=True):
            assert torch.equal(out, plain)
        assert report.groups == []
        reasons = [skipped.reason for skipped in report.skipped]
        assert len(reasons) == (reason is not None), reasons
        assert all(reason in given for given in reasons), reasons
    return report


def assert_delta(model: nn.Module, fused: Callable[..., object], *args: Tensor, bound: float | None = None) -> None:
    """What ``fused`` adds to the base output is what the model adds, computed in float64."""
    double = copy.deepcopy(model).double()
    wide = [arg.double() if arg.is_floating_point() else arg for arg in args]
    outs, bases = _flat(fused(*args)), _flat(model.base(*args))
    expected, expected_bases = _flat(double(*wide)), _flat(double.base(*wide))
    assert len(outs) == len(expected) == len(bases)
    plain = _flat(model(*args))
    for i, out in enumerate(outs):
        assert out.shape == expected[i].shape
        assert out.dtype == plain[i].dtype
        delta = expected[i] - expected_bases[i]
        error = (((out.double() - bases[i].double()) - delta).norm() / delta.norm()).item()
        allowed = bound or BOUNDS[bases[i].dtype]
        assert delta.norm() > 0.05 * expected_bases[i].norm(), "the toy adds next to nothing"
        assert error <= allowed, f"result {i}: rel-L2 {error:.2e} > {allowed:.0e}"


def _flat(value: object) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for item in value for tensor in _flat(item)]


def conv1d(x: Tensor, w_t: Tensor, bias: Tensor) -> Tensor:
    """transformers' Conv1D."""
    return torch.addmm(bias, x.view(-1, x.size(-1)), w_t).view(x.size()[:-1] + (w_t.size(-1),))  # noqa: RUF005


def functional_linear(site: Site, x: Tensor) -> Tensor:
    return F.linear(x, site.w, site.bias) + F.linear(F.linear(x, site.a), site.b) * SCALE


# Steps that are no LoRA, of two tensors of one shape, for random graphs
SHAPED_LIKE_X = {
    "add": lambda left, right: left + right,
    "relu": lambda left, right: left.relu(),
    "mul": lambda left, right: left * right,
    "write": lambda left, right: left.add_(0.25),
    "write through a view": lambda left, right: left.view(-1).mul_(0.5).view(left.shape),
    "slice": lambda left, right: torch.cat([left[..., :2], right[..., 2:]], -1),
    "copy": lambda left, right: left.clone(),
}
