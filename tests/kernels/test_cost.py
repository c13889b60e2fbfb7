"""The cost model counts what a reader can count by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorafx.kernels import schedule, sgmv
from lorafx.kernels.cost import (
    FOLDED_TOKENS,
    GPUS,
    SIBLINGS,
    Cost,
    GroupShape,
    fold_pays,
    fused,
    gpu_named,
    layers,
    separate,
)

# one token, 8 wide, into 8 and 4; ranks 2 and 1 in use, of 6 and 2 rows
SHAPE = GroupShape(1, 8, (8, 4), (2, 1), (6, 2), itemsize=2, bank_itemsize=4)
OWN = Cost(2 * 8 * 12, 2 * (8 + 64 + 8) + 2 * (8 + 32 + 4), 2)
SHRINK_AND_EXPAND = 2 * 2 * (8 + 8) + 2 * 1 * (8 + 4)
SCALE_AND_SUM = 2 * (8 + 4)
WEIGHTS = 4 * (2 * 16 + 1 * 12)


def test_layers():
    assert layers(SHAPE) == OWN


def test_separate_branches():
    cost = separate(SHAPE)
    assert cost.launches == 2 + 4 * 2
    assert cost.flops == OWN.flops + SHRINK_AND_EXPAND + SCALE_AND_SUM
    x, hidden, deltas, sums = 2 * 2 * 8, 2 * 4 * (2 + 1), 4 * 4 * (8 + 4), 2 * 2 * (8 + 4)
    assert cost.bytes == OWN.bytes + x + WEIGHTS + hidden + deltas + sums


@pytest.mark.parametrize(("lowering", "launches", "scratch"), [("cpp", 1, 0), ("triton", 2, 2 * 4 * 3)])
def test_fused(lowering, launches, scratch):
    cost = fused(SHAPE, lowering)
    assert cost.launches == 2 + launches
    assert cost.flops == separate(SHAPE).flops
    assert cost.bytes == OWN.bytes + 2 * 8 + WEIGHTS + scratch + 2 * 2 * 12


def test_folded_is_one_op_that_reads_x_once():
    cost = fused(SHAPE, "cpp", folded=True)
    assert cost.launches == 1
    assert cost.flops == separate(SHAPE).flops
    assert cost.bytes == OWN.bytes - 2 * 8 + WEIGHTS


def test_aten_multiplies_every_row_of_the_bank():
    cost = fused(SHAPE, "aten")
    assert cost.flops == OWN.flops + 2 * 6 * 16 + 2 * 2 * 12 + SCALE_AND_SUM
    more = fused(replace(SHAPE, rows=(60, 20)), "aten")
    assert more.flops > cost.flops
    assert fused(replace(SHAPE, rows=(60, 20)), "triton") == fused(SHAPE, "triton")


def test_no_adapter_at_a_sibling_costs_nothing_there():
    assert fused(replace(SHAPE, ranks=(0, 0)), "cpp", folded=True).flops == OWN.flops


def test_launches_of_more_siblings_than_one_launch_takes():
    assert SIBLINGS == sgmv.MAX_SIBLINGS
    many = GroupShape(1, 8, (8,) * 5, (2,) * 5, (2,) * 5)
    assert fused(many, "triton").launches == 5 + 4


def test_roofline_is_the_slower_of_memory_and_arithmetic():
    h100 = GPUS["h100"]
    assert h100.least_seconds(Cost(0, int(h100.bandwidth), 0)) == 1
    assert h100.least_seconds(Cost(int(2 * h100.flops), int(h100.bandwidth), 0)) == 2
    # decode is bound by memory, a long prefill by arithmetic
    decode = fused(GroupShape(1, 4096, (4096,), (16,), (16,), 2, 2), "triton")
    prefill = fused(GroupShape(4096, 4096, (4096,), (16,), (16,), 2, 2), "triton")
    assert decode.bytes / h100.bandwidth > decode.flops / h100.flops
    assert prefill.bytes / h100.bandwidth < prefill.flops / h100.flops


def test_folded_into_the_shrink():
    """Two launches in all; the weights are read once more for each further tile of tokens."""
    few = fused(SHAPE, "triton", folded=True)
    assert few.launches == 2
    assert few.flops == separate(SHAPE).flops
    many = replace(SHAPE, tokens=2 * FOLDED_TOKENS + 1)
    apart, folded = fused(many, "triton"), fused(many, "triton", folded=True)
    x_twice = 2 * 2 * 8 * many.tokens  # the two layers and the shrink are one reader
    assert folded.bytes == apart.bytes - x_twice + 2 * 2 * 8 * 12
    assert FOLDED_TOKENS == schedule.MOST_LAYER_TOKENS


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS.keys())
def test_where_folding_pays(gpu):
    """For a decode step, and not for a prefill."""
    for sizes in ((4096, (14336, 14336)), (256, (256, 64, 64)), (14336, (4096,))):
        assert all(fold_pays(gpu, tokens, *sizes, 2) for tokens in (1, 8, FOLDED_TOKENS))
        assert not any(fold_pays(gpu, tokens, *sizes, 2) for tokens in (FOLDED_TOKENS + 1, 512, 8192))


@pytest.mark.parametrize(
    ("name", "key"),
    [("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H200", "h200"), ("NVIDIA L4", "l4"), ("NVIDIA L40S", "h100")],
)
def test_gpus_by_the_names_they_have(name, key):
    assert gpu_named(name) is GPUS[key]


def test_only_16_bits_are_folded_on_a_gpu():
    cpu = torch.device("cpu")
    assert sgmv.folds(8, 4096, (4096, 1024, 1024), torch.bfloat16, cpu)
    assert not sgmv.folds(8, 4096, (4096, 1024, 1024), torch.float32, cpu)
