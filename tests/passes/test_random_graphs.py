"""Random models with LoRA branches woven in: whatever the passes make of them computes the same."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

import lorafx
from tests.passes.test_spellings import SPELLINGS
from tests.passes.toys import SHAPED_LIKE_X as SPARE
from tests.passes.toys import Site, fused_by, inputs, lora

GRAPHS, WIDTH, STEPS = 100, 6, 9


class Random(nn.Module):
    """A list of steps on a pool of tensors of one shape, drawn once; every value counts in the result."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        draw = random.Random(seed)
        self.sites = nn.ModuleList(
            Site(
                SPELLINGS[draw.choice(sorted(SPELLINGS))], WIDTH, WIDTH, draw.randint(1, 3), bias=True, lora_bias=False
            )
            for _ in range(STEPS + 3)
        )
        kinds = ["site", "site", "siblings", "siblings", "late", *SPARE]
        self.steps = [(draw.choice(kinds), draw.random(), draw.random(), draw.randint(2, 4)) for _ in range(STEPS)]

    def forward(self, x: Tensor) -> Tensor:
        pool = [x * 1.0]  # writes in place must not reach the caller's x
        sites = iter(self.sites)
        for kind, one, two, count in self.steps:
            left, right = pool[int(one * len(pool))], pool[int(two * len(pool))]
            if kind == "site":
                pool.append(next(sites)(left))
            elif kind == "siblings":
                for site in list(self.sites)[:count]:
                    pool.append(site(left))
                    pool.append(torch.tanh(pool[-1] if two < 0.5 else right))
            elif kind == "late":  # base outputs first, then something else, then the branches
                pair = list(self.sites)[-2:]
                bases = [site.base_layer(left) for site in pair]
                pool.append(right + bases[0] if one < 0.5 else torch.tanh(left))
                pool += [y + lora(site, left) - site.base_layer(left) for y, site in zip(bases, pair, strict=True)]
                pool += [y + site.lora_b(site.lora_a(left)) for y, site in zip(bases, pair, strict=True)]
            else:
                pool.append(SPARE[kind](left, right))
        total = pool[0]
        for i, value in enumerate(pool[1:]):
            total = total + torch.tanh(value) * (i + 1)
        return total


def model_of(seed: int) -> Random:
    return Random(seed).double().eval()


@pytest.mark.parametrize("chunk", range(10))
def test_rewritten_graphs_compute_the_same(chunk):
    found = 0
    for seed in range(chunk, GRAPHS, 10):
        model, x = model_of(seed), inputs(WIDTH, dtype=torch.float64)
        traced = torch.fx.symbolic_trace(model)
        with torch.no_grad():
            expected = traced(x)  # a traced x += y is x + y: not the model, but its graph is what is rewritten
            for examples in (None, (x,)):
                fused, report = lorafx.fuse(traced, examples)
                found += len(report.groups)
                torch.testing.assert_close(fused(x), expected, rtol=1e-9, atol=1e-9, msg=f"seed {seed}")
    assert found > 20


@pytest.mark.parametrize("seed", range(1000, 1005))
def test_rewritten_graphs_of_dynamo_compute_the_same(seed):
    model, x = model_of(seed), inputs(WIDTH, dtype=torch.float64)
    with torch.no_grad():
        fused, report = fused_by("dynamo", model, x)
        assert report.groups
        torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)
