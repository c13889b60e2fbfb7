"""Random small graphs with LoRA branches woven in: `python -m tests.passes.random_graphs --graphs 5000 --seed 1`.

A program is a list of steps on a pool of tensors of one shape. Some steps are branches, in any spelling; some only
look like one; some are other work, with writes in place among it. Which layers have to be fused, and how often, is
known from how the program was made: no fewer, and none of the others. hypothesis draws the programs, and makes one that
fails as small as it can.
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from tests.passes.test_left_alone import LOOK_ALIKES, OTHER_THINGS
from tests.passes.test_spellings import SPELLINGS
from tests.passes.toys import SCALE, SHAPED_LIKE_X, Site, inputs, lora

WIDTH, RANKS, LENGTH = 6, (3, 3, 2, 4), 9
TOLD_EVERY = 500  # graphs


class Given(NamedTuple):
    """What a step may read besides the pool: two inputs of the graph, and a second B of rank 3."""

    cache: Tensor
    weight: Tensor
    square: Tensor


Sums = Callable[[Given, Site, Site, Tensor, Tensor], list[Tensor]]


def two_on_one(p: Given, s: Site, t: Site, x: Tensor, other: Tensor) -> list[Tensor]:
    """Siblings; what the first one gives is used before the second one is computed."""
    q = lora(s, x)
    return [q, torch.tanh(q) + other, lora(t, x)]


def late(p: Given, s: Site, t: Site, x: Tensor, other: Tensor) -> list[Tensor]:
    """Base outputs first, then something else, then the branches."""
    y, z = s.base_layer(x), t.base_layer(x)
    seen = torch.tanh(other)
    return [y + s.lora_b(s.lora_a(x)) * SCALE, seen, z + t.lora_b(t.lora_a(x))]


def read_before(p: Given, s: Site, t: Site, x: Tensor, other: Tensor) -> list[Tensor]:
    """In place onto a base output that was read before."""
    y = s.base_layer(x)
    early = y.relu()
    return [y.add_(s.lora_b(s.lora_a(x)) * SCALE), early]


def base_read_too(p: Given, s: Site, t: Site, x: Tensor, other: Tensor) -> list[Tensor]:
    y = s.base_layer(x)
    return [y + s.lora_b(s.lora_a(x)) * SCALE, torch.tanh(y) + other]


def write_elsewhere(p: Given, s: Site, t: Site, x: Tensor, other: Tensor) -> list[Tensor]:
    """A cache of its own is written between a layer and its branch."""
    y, cache = s.base_layer(x), torch.zeros_like(other)
    cache.view(-1).copy_(other.reshape(-1))
    return [y + s.lora_b(s.lora_a(x)) * SCALE, cache]


def write_to_the_input(p: Given, s: Site, t: Site, x: Tensor, other: Tensor) -> list[Tensor]:
    y = s.base_layer(x)
    p.cache.add_(0.5)
    return [y + s.lora_b(s.lora_a(x)) * SCALE, p.cache * 1.0]


def chain(p: Given, s: Site, t: Site, x: Tensor, other: Tensor) -> list[Tensor]:
    return [lora(t, lora(s, x))]


def two_adapters(p: Given, s: Site, t: Site, x: Tensor, other: Tensor) -> list[Tensor]:
    return [lora(s, x) + (x @ s.a_t @ s.b_t) * 0.5]


def bias_of_b(p: Given, s: Site, t: Site, x: Tensor, other: Tensor) -> list[Tensor]:
    return [s.base_layer(x) + F.linear(s.lora_a(x), s.b, s.bias) * SCALE]


def narrow_base(p: Given, s: Site, t: Site, x: Tensor, other: Tensor) -> list[Tensor]:
    """The base casts down, the branch does not."""
    return [F.linear(x.bfloat16(), s.w.bfloat16()).to(x.dtype) + s.lora_b(s.lora_a(x))]


def weight_is_an_input(p: Given, s: Site, t: Site, x: Tensor, other: Tensor) -> list[Tensor]:
    return [s.base_layer(x) + F.linear(F.linear(x, s.a), p.weight) * SCALE]


def weight_written_between(p: Given, s: Site, t: Site, x: Tensor, other: Tensor) -> list[Tensor]:
    y, shrunk = s.base_layer(x), F.linear(x, s.a)
    early = F.linear(shrunk, p.weight)
    p.weight.mul_(0.5)
    return [y + F.linear(shrunk, p.weight) * SCALE, early]


def peft(p: Given, s: Site, t: Site, x: Tensor, other: Tensor) -> list[Tensor]:
    """As PEFT writes it: the adapter's dtype, and back."""
    y = s.base_layer(x)
    return [(y + s.lora_b(s.lora_a(s.drop(x.to(s.a.dtype)))) * SCALE).to(y.dtype)]


def peft_siblings(p: Given, s: Site, t: Site, x: Tensor, other: Tensor) -> list[Tensor]:
    return [*peft(p, s, t, x, other), *peft(p, t, s, x, other)]


def delta_cast_back(p: Given, s: Site, t: Site, x: Tensor, other: Tensor) -> list[Tensor]:
    return [s.base_layer(x) + s.lora_b(s.lora_a(x.to(s.a.dtype))).to(x.dtype) * SCALE]


def a_used_by_two(p: Given, s: Site, t: Site, x: Tensor, other: Tensor) -> list[Tensor]:
    """One A, two B."""
    shrunk = s.lora_a(x)
    return [s.base_layer(x) + s.lora_b(shrunk), t.base_layer(x) + F.linear(shrunk, p.square)]


def bottleneck(p: Given, s: Site, t: Site, x: Tensor, other: Tensor) -> list[Tensor]:
    return [other + s.lora_b(s.lora_a(other))]


def other_branch_input(p: Given, s: Site, t: Site, x: Tensor, other: Tensor) -> list[Tensor]:
    return [s.base_layer(x) + s.lora_b(s.lora_a(x + 1.0))]


def x_written_between(p: Given, s: Site, t: Site, x: Tensor, other: Tensor) -> list[Tensor]:
    x = x * 2.0
    y = s.base_layer(x)
    shrunk = s.lora_a(x)
    x.view(-1).mul_(0.5)
    return [y + s.lora_b(shrunk) * SCALE, x]


def base_written_between(p: Given, s: Site, t: Site, x: Tensor, other: Tensor) -> list[Tensor]:
    """The base output is read, changed, and summed through a view of it."""
    y = s.base_layer(x)
    flat = y.view(-1)
    out = y.add_(s.lora_b(s.lora_a(x)))
    flat.mul_(0.5)
    return [out]


# A step: what it computes, and how often the first and the second of its layers have to be fused
PLAIN: dict[str, tuple[Sums, tuple[int, int]]] = {
    "siblings": (two_on_one, (1, 1)),
    "late": (late, (1, 1)),
    "read before": (read_before, (1, 0)),
    "base read too": (base_read_too, (1, 0)),
    "write elsewhere": (write_elsewhere, (1, 0)),
    "write to the input": (write_to_the_input, (1, 0)),
    "chain": (chain, (1, 1)),
    "two adapters": (two_adapters, (2, 0)),
    "bias of B": (bias_of_b, (1, 0)),
    "A used by two": (a_used_by_two, (0, 0)),
    "bottleneck": (bottleneck, (0, 0)),
    "x + 1": (other_branch_input, (0, 0)),
    "weight from an input": (weight_is_an_input, (1, 0)),
    "weight written between": (weight_written_between, (0, 0)),
    "x written between": (x_written_between, (0, 0)),
    "base written through a view": (base_written_between, (0, 0)),
}
DOUBLE = {"narrow base": (narrow_base, (1, 0))}
CASTS = {
    "as PEFT": (peft, (1, 0)),
    "as PEFT, siblings": (peft_siblings, (1, 1)),
    "delta cast back": (delta_cast_back, (1, 0)),
}
NEEDS_RANK_3 = {"A used by two", "weight from an input", "weight written between"}
NOT_IN_BF16 = {"through integers"}  # a rounding would make a step of one


def _spelled(spelling: Callable[[Site, Tensor], Tensor]) -> Sums:
    return lambda p, s, t, x, other: [spelling(s, x)]


def _other(work: Callable[[Tensor, Tensor], Tensor]) -> Sums:
    return lambda p, s, t, x, other: [work(x, other)]


def steps(mixed: bool) -> dict[str, tuple[Sums, tuple[int, int]]]:
    """All kinds of steps of a program; ``mixed``: bfloat16 layers, some of them under float32 adapters."""
    kinds = {name: (_spelled(spelling), (1, 0)) for name, spelling in SPELLINGS.items()} | PLAIN
    alike = {name: spelling for name, (spelling, _) in LOOK_ALIKES.items()} | OTHER_THINGS
    kinds |= {f"not: {name}": (_spelled(s), (0, 0)) for name, s in alike.items() if not (mixed and name in NOT_IN_BF16)}
    kinds |= {f"other: {name}": (_other(work), (0, 0)) for name, work in SHAPED_LIKE_X.items()}
    return kinds | (CASTS if mixed else DOUBLE)


@dataclass(frozen=True)
class Step:
    """left, right, first, second: which of the pool's tensors and of the layers it takes, counted round."""

    kind: str
    left: int
    right: int
    first: int
    second: int


@dataclass(frozen=True)
class Plan:
    """A program as data. tied: "" or what the layers' weights share."""

    seed: int
    mixed: bool
    tied: str
    steps: tuple[Step, ...]


def plans() -> st.SearchStrategy[Plan]:
    number = st.integers(0, 7)

    def of_kind(mixed: bool) -> st.SearchStrategy[Plan]:
        step = st.builds(Step, st.sampled_from(sorted(steps(mixed))), number, number, number, number)
        tied = st.sampled_from(["", "", "one A", "views of one tensor", "one layer's A and B"])
        listed = st.lists(step, min_size=1, max_size=LENGTH).map(tuple)
        return st.builds(Plan, st.integers(0, 10**6), st.just(mixed), tied, listed)

    return st.sampled_from([False, False, True]).flatmap(of_kind)


class Program(nn.Module):
    """A plan that can be run. Every value of the pool is returned."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        torch.manual_seed(plan.seed)
        self.plan, self.kinds = plan, steps(plan.mixed)
        self.sites = nn.ModuleList(Site(lora, WIDTH, WIDTH, rank, bias=True) for rank in RANKS)
        self.square = nn.Parameter(torch.randn(WIDTH, 3))
        for site in self.sites:
            site.narrow = nn.Parameter(torch.randn(1, site.a.shape[0]))
        self.eval().to(torch.bfloat16 if plan.mixed else torch.float64)
        if plan.mixed:  # the last two have float32 adapters
            for site in self.sites[2:]:
                site.lora_a.float(), site.lora_b.float()
        self._tie(plan.tied)

    def _tie(self, tied: str) -> None:
        one, two = self.sites[:2]
        if tied == "one A":
            two.lora_a.weight = one.lora_a.weight
        elif tied == "one layer's A and B":
            two.lora_a, two.lora_b = one.lora_a, one.lora_b
        elif tied:
            flat = torch.cat([one.b.detach().flatten(), two.b.detach().flatten()])
            for site, part in zip((one, two), flat.chunk(2), strict=True):
                site.lora_b.weight = nn.Parameter(part.view(site.b.shape))

    def forward(self, x: Tensor, cache: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        given = Given(cache, weight, self.square)
        pool = [x * 1.0]
        for step in self.plan.steps:
            work, _ = self.kinds[step.kind]
            first, second = (self.sites[i] for i in self.places(step))
            pool += work(given, first, second, pool[step.left % len(pool)], pool[step.right % len(pool)])
        return tuple(pool)

    def places(self, step: Step) -> tuple[int, int]:
        """The layers that a step takes. In a mixed program only some steps can take float32 adapters."""
        start = 2 if step.kind in CASTS else 0
        count = 2 if self.plan.mixed else len(RANKS)
        if step.kind in NEEDS_RANK_3:
            count = 2
        return start + step.first % count, start + step.second % count

    def expected(self) -> Counter[int]:
        """How often each layer has to be fused."""
        found: Counter[int] = Counter()
        for step in self.plan.steps:
            for place, times in zip(self.places(step), self.kinds[step.kind][1], strict=True):
                found[place] += times
        return +found


def check(plan: Plan) -> Counter[str]:
    """Counts of what was done. AssertionError: the rewritten graph computes something else, or other layers are fused
    than have to be."""
    program = Program(plan)
    traced = torch.fx.symbolic_trace(program)  # what is rewritten: a traced x += y is x + y
    given, expected = given_to(plan), program.expected()
    with torch.no_grad():
        plain = run(traced, given)
        truth = run(torch.fx.symbolic_trace(copy.deepcopy(program).double()), given) if plan.mixed else plain
        for examples in (None, given):  # without shapes, what needs them is left
            fused, report = lorafx.fuse(traced, examples, validate=examples is not None)
            assert_like(run(fused, given), plain, truth)
            found = fused_layers(report)
            assert found <= expected, f"fused {found}, expected {expected}"
    # a branch behind a copy is traced back to what was copied, and left where that is written to before the sum
    if not any(step.kind == "other: copy" for step in plan.steps):
        assert found == expected, f"fused {found}, expected {expected}; skipped: {report.skipped}"
    return Counter(graphs=1, branches=found.total(), groups=len(report.groups), left=len(report.skipped))


def given_to(plan: Plan) -> list[Tensor]:
    """x, cache and weight."""
    dtype = torch.bfloat16 if plan.mixed else torch.float64
    return [inputs(WIDTH, dtype=dtype), inputs(WIDTH, 2, 3, dtype=dtype), inputs(3, WIDTH, dtype=dtype)]


def run(gm: Callable[..., Sequence[Tensor]], given: Sequence[Tensor]) -> list[Tensor]:
    """Results, and what is in the inputs afterwards."""
    own = [tensor.clone() for tensor in given]
    if any(parameter.dtype == torch.float64 for parameter in getattr(gm, "parameters", list)()):
        own = [tensor.double() for tensor in own]
    return [*gm(*own), *own]


def assert_like(got: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """In float64 the same; else no further from the float64 truth than the plain graph is, but for rounding."""
    assert len(got) == len(plain)
    for i, (ours, theirs, exact) in enumerate(zip(got, plain, truth, strict=True)):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        size, own = exact.norm(), (theirs.double() - exact).norm()
        allowed = 1e-9 * size if theirs.dtype == torch.float64 else 4 * own + 0.03 * size
        error = (ours.double() - exact).norm()
        assert error <= allowed, f"value {i}: off by {error:.2e} of {size:.2e}, allowed {allowed:.2e}"


def fused_layers(report: lorafx.Report) -> Counter[int]:
    names = [branch.name for group in report.graphs[0].passes.groups for branch in group.branches]
    return Counter(int(re.search(r"sites\.(\d+)", name)[1]) for name in names)


def try_many(
    graphs: int, seed: int, check: Callable[[Plan], Mapping[str, int]] = check, *, shrink: bool = True
) -> Counter[str]:
    """Check so many programs; one that fails is printed, with ``shrink`` the smallest. Returns what was counted."""
    total: Counter[str] = Counter()
    phases = [hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shrink else [])]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=graphs,
        phases=phases,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(plans())
    def checked(plan: Plan) -> None:
        total.update(check(plan))
        if total["graphs"] % TOLD_EVERY == 0:
            print(f"{total['graphs']} graphs, {total['branches']} branches fused", flush=True)

    checked()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    total = try_many(arguments.graphs, arguments.seed)
    fused = f"{total['branches']} branches fused in {total['groups']} groups"
    seconds = time.perf_counter() - started
    print(
        f"seed {arguments.seed}: {total['graphs']} graphs, {fused}, {total['left']} look-alikes left, {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
