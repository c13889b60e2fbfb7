"""Block sizes are a pure function of ints."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorafx.kernels.schedule import (
    FEW_ROWS,
    FULL_GPU,
    MAX_SPLIT_K,
    LayerSchedule,
    Schedule,
    layer_schedule,
    schedule,
)

LLAMA = {"k": 4096, "widths": (4096, 1024, 1024), "max_rank": 64}


def test_decode():
    assert schedule(1, 1, **LLAMA) == Schedule(
        spans=False,
        shrink_m=1,
        expand_m=1,
        block_r=16,
        rank_blocks=4,
        together=1,
        block_k=256,
        chunk=256,
        split_k=16,
        shrink_warps=4,
        shrink_stages=1,
        block_n=64,
        expand_r=64,
        expand_warps=1,
    )


def test_more_rows_get_larger_programs():
    few, many = schedule(1, 1, **LLAMA), schedule(64, 1, **LLAMA)
    assert (many.chunk, many.split_k) == (512, 8)
    assert (many.block_n, many.expand_r) == (256, 16)
    assert replace(many, chunk=256, split_k=16, block_n=64, expand_r=64) == few


def test_prefill():
    plan = schedule(4, 1024, **LLAMA)
    assert (plan.spans, plan.shrink_m, plan.split_k) == (False, 64, 2)
    assert (plan.block_r, plan.together, plan.rank_blocks) == (16, 4, 4)


def test_few_tokens_are_cut_into_small_tiles_and_along_k():
    plan = schedule(1, 16, **LLAMA)
    assert (plan.shrink_m, plan.split_k) == (16, 8)
    assert schedule(64, 1024, **LLAMA).split_k == 1


@pytest.mark.parametrize("rows", [1, 4, 64, 1000, None])
@pytest.mark.parametrize("tokens", [1, 2, 17, 512, None])
@pytest.mark.parametrize(("k", "widths", "max_rank"), [(1, (1,), 1), (70, (17, 2049), 24), (14336, (4096,), 1000)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_are_what_triton_takes(rows, tokens, k, widths, max_rank, itemsize):
    plan = schedule(rows, tokens, k, widths, max_rank, itemsize)
    for block in (plan.shrink_m, plan.expand_m, plan.block_r, plan.together, plan.block_k, plan.block_n, plan.expand_r):
        assert block & (block - 1) == 0
    if plan.shrink_m > 1:  # tl.dot takes no side under 16
        assert min(plan.shrink_m, plan.together * plan.block_r, plan.block_k) >= 16
    if plan.expand_m > 1:
        assert min(plan.expand_m, plan.expand_r, plan.block_n) >= 16
    assert plan.expand_r * plan.block_n <= 8192  # numbers of B in the registers of a program
    assert plan.chunk % plan.block_k == 0
    assert (plan.split_k - 1) * plan.chunk < k <= plan.split_k * plan.chunk  # no program without work, none missing
    assert 1 <= plan.split_k <= MAX_SPLIT_K
    assert plan.together * -(-len(widths) // plan.together) >= len(widths)


def test_unknown_tokens_never_multiply_the_scratch():
    """The tokens of a dynamic shape may turn out to be many."""
    assert schedule(None, None, **LLAMA).split_k == 1
    assert schedule(4, None, **LLAMA).split_k == 1


def test_flattened_batch_is_no_decode():
    assert schedule(FEW_ROWS, 1, **LLAMA).shrink_m == 1
    plan = schedule(FEW_ROWS + 1, 1, **LLAMA)
    assert plan.spans
    assert plan.shrink_m >= 16


def test_programs_do_not_outgrow_the_gpu():
    plan = schedule(2, 512, **LLAMA)
    assert plan.split_k * (2 * 512 // plan.shrink_m) <= 2 * FULL_GPU


H100 = 227 * 1024  # bytes of shared memory that a program may take


def test_layers_of_a_decode_step():
    k, widths = LLAMA["k"], LLAMA["widths"]
    assert layer_schedule(1, k, widths, shared=H100) == LayerSchedule(1, 8, 512, 1, False)
    assert layer_schedule(8, k, widths, shared=H100) == LayerSchedule(16, 32, 128, 4, True)
    assert layer_schedule(8, k, (4096,), shared=H100) == LayerSchedule(16, 32, 128, 6, True)
    assert layer_schedule(64, k, widths, shared=H100) == LayerSchedule(64, 32, 128, 3, True)
    assert layer_schedule(None, k, widths, shared=H100).tile_m == 64


@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 1000, None])
@pytest.mark.parametrize(("k", "widths"), [(1, (1,)), (70, (17, 2049)), (14336, (4096,))])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shared", [48 * 1024, 64 * 1024, H100])
def test_tiles_of_layers_are_what_triton_takes(tokens, k, widths, itemsize, shared):
    plan = layer_schedule(tokens, k, widths, itemsize, shared)
    for block in (plan.tile_m, plan.tile_n, plan.block_k):
        assert block & (block - 1) == 0
    if tokens != 1:
        assert min(plan.tile_m, plan.tile_n, plan.block_k) >= 16  # tl.dot takes no less
        assert plan.stages == 1 or plan.stages * (plan.tile_m + plan.tile_n) * plan.block_k * itemsize <= shared


def test_a_shrink_beside_folded_layers_has_longer_programs():
    assert schedule(8, 1, **LLAMA, folded=True).chunk == 1024
    assert schedule(1, 1, **LLAMA, folded=True) == schedule(1, 1, **LLAMA)


def test_registers_of_a_blackwell():
    hopper, blackwell = (schedule(8, 512, **LLAMA, itemsize=4, capability=one) for one in (90, 100))
    assert (hopper.expand_m, blackwell.expand_m) == (64, 32)
    assert replace(blackwell, expand_m=64) == hopper
    assert schedule(8, 512, **LLAMA, capability=100) == schedule(8, 512, **LLAMA, capability=90)
