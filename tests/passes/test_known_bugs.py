"""What earlier attempts at this got wrong: offsets that never advance, layouts chosen by one rank, lost lanes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorafx
from tests.passes.toys import Site, Wrap, assert_fused, inputs, lora, siblings

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
