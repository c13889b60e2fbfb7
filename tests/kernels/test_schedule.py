"""Block sizes are a pure function of ints."""

from __future__ import annotations

import pytest

from lorafx.kernels.schedule import FULL_GPU, MANY_ROWS, MAX_SPLIT_K, Schedule, schedule

LLAMA = {"k": 4096, "widths": (4096, 1024, 1024), "max_rank": 64}


def test_decode():
    assert schedule(1, 1, **LLAMA) == Schedule(block_m=1, block_r=16, block_k=256, block_n=256, split_k=8, num_warps=4)


def test_prefill():
    plan = schedule(4, 1024, **LLAMA)
    assert plan == Schedule(block_m=64, block_r=32, block_k=64, block_n=64, split_k=2, num_warps=4)


def test_few_tokens_are_cut_along_k():
    assert schedule(1, 16, **LLAMA).split_k == MAX_SPLIT_K
    assert schedule(64, 1024, **LLAMA).split_k == 1


@pytest.mark.parametrize("rows", [1, 4, 64, 1000, None])
@pytest.mark.parametrize("tokens", [1, 2, 17, 512, None])
@pytest.mark.parametrize(("k", "widths", "max_rank"), [(1, (1,), 1), (70, (17, 2049), 24), (14336, (4096,), 1000)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_are_what_triton_takes(rows, tokens, k, widths, max_rank, itemsize):
    plan = schedule(rows, tokens, k, widths, max_rank, itemsize)
    for block in (plan.block_m, plan.block_r, plan.block_k, plan.block_n):
        assert block & (block - 1) == 0
    if plan.block_m > 1:  # tl.dot takes no side under 16
        assert min(plan.block_m, plan.block_r, plan.block_k, plan.block_n) >= 16
    assert plan.block_m in (1, 16, 32, 64)
    assert 1 <= plan.split_k <= MAX_SPLIT_K
    assert plan.split_k == 1 or plan.split_k * plan.block_k < k  # no program without work


def test_unknown_tokens_never_multiply_the_scratch():
    """The tokens of a dynamic shape may turn out to be many."""
    assert schedule(None, None, **LLAMA).split_k == 1
    assert schedule(4, None, **LLAMA).split_k == 1


def test_flattened_batch_is_no_decode():
    assert schedule(MANY_ROWS, 1, **LLAMA).block_m == 1
    assert schedule(MANY_ROWS + 1, 1, **LLAMA).block_m == 64


def test_programs_do_not_outgrow_the_gpu():
    plan = schedule(2, 512, **LLAMA)
    assert plan.split_k * (2 * 512 // plan.block_m) <= FULL_GPU
