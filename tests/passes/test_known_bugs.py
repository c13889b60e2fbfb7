"""What earlier attempts at this got wrong: offsets that never advance, layouts chosen by one rank, lost lanes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorafx
from tests.passes.toys import Site, Wrap, assert_fused, fused_by, inputs, lora, siblings

RANKS = {
    "3x8": (8, 8, 8),
    "3x16": (16, 16, 16),
    "3x32": (32, 32, 32),
    "3x64": (64, 64, 64),
    "2x8": (8, 8),
    "8+16+64": (8, 16, 64),
    "q only": (8,),
    "rank 1": (1, 1, 1),
    "rank 128": (128, 128),
    "rank 256": (256, 16),
}


@pytest.mark.parametrize("name", RANKS)
def test_every_fused_rank(name):
    ranks = RANKS[name]
    model = siblings(len(ranks), ranks=ranks, widths=(48, 16, 33), k=70)
    assert_fused("fx with inputs", model, inputs(70), groups=[len(ranks)])


@pytest.mark.parametrize("widths", [(2049, 512), (2049, 2049), (1, 2049)])
def test_odd_widths(widths):
    assert_fused("fx with inputs", siblings(2, widths=widths, ranks=(16, 8), k=65), inputs(65), groups=[2])


def test_rank_above_the_widths():
    assert_fused("fx with inputs", siblings(2, ranks=(32, 40)), inputs(), groups=[2])


def test_fuse_leaves_the_counter_of_a_batch_norm_alone():
    """Learning the shapes of a graph in training ran its batch norms, which count batches in a real number."""
    model = Wrap(lambda m, x: m.norm(m.site(x)), lambda m, x: None, site=Site(lora, 10, 6, 2), norm=nn.BatchNorm1d(6))
    model.train().site.drop.p = 0.0
    lorafx.fuse(torch.fx.symbolic_trace(model), (inputs(10, 5),))
    assert model.norm.num_batches_tracked == 0


@pytest.mark.parametrize("road", ["fx with inputs", "dynamo"])
def test_a_write_to_a_sum_that_siblings_read(road, monkeypatch):
    """A marker was taken for the memory of its base output, so that writes to the sum itself were not seen: the second
    sibling moved before them."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        one = m.first(x)
        before = m.second(one)
        one.view(-1).mul_(0.5)
        return before + m.second(one) * 3

    monkeypatch.setenv("LORAFX_VALIDATE", "0")  # which undoes it
    torch.manual_seed(0)
    model = Wrap(forward, lambda m, x: None, first=Site(lora, 10, 10, 2), second=Site(lora, 10, 10, 3)).eval()
    x = inputs(10)
    with torch.no_grad():
        expected = model(x)
        fused, report = fused_by(road, model, x)
        torch.testing.assert_close(fused(x), expected, rtol=1e-5, atol=1e-5)
    assert [len(group.branches) for group in report.graphs[0].passes.groups] == [1, 1, 1]


def test_a_write_to_one_of_two_casts_of_a_sum():
    """A bf16 base under a float32 adapter: both casts became one tensor, and what was written to one stood in both."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        total = m.site.base_layer(x) + m.site.lora_b(m.site.lora_a(x.float())) * 1.5
        one, two = total.to(x.dtype), total.to(x.dtype)
        one.mul_(0.5)
        return one + two * 3

    torch.manual_seed(0)
    model = Wrap(forward, lambda m, x: None, site=Site(lora, 10, 6, 2)).eval().to(torch.bfloat16)
    model.site.lora_a.float(), model.site.lora_b.float()
    x = inputs(10, dtype=torch.bfloat16)
    with torch.no_grad():
        fused, _ = lorafx.fuse(torch.fx.symbolic_trace(model), (x,), validate=False)
        torch.testing.assert_close(fused(x), model(x), rtol=2e-2, atol=2e-2)
