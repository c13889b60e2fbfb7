"""Block sizes of the Triton lowering, from what the host knows: a pure function of ints."""

from __future__ import annotations

from dataclasses import dataclass

# A GPU has about a hundred multiprocessors; a shrink of few tokens is cut along k until it has this many programs.
FULL_GPU = 128
MAX_SPLIT_K = 16
# Rows of one token, more than a decode step has: an input that was flattened to [batch * tokens, k].
MANY_ROWS = 512


@dataclass(frozen=True)
class Schedule:
    """``block_m`` is the tokens of a program; 1 means sums of products (decode), 16 and more tensor cores.

    Shrink: a program takes ``block_r`` ranks of ``together`` siblings and ``chunk`` of k in steps of ``block_k``;
    ``rank_blocks`` programs share the ranks of a window and ``split_k`` the whole of k. Expand: ``block_n`` columns, in
    steps of ``expand_r`` ranks. ``spans``: a tile may hold tokens of several rows of the batch
    """

    block_m: int
    spans: bool
    block_r: int
    rank_blocks: int
    together: int
    block_k: int
    chunk: int
    split_k: int
    shrink_warps: int
    shrink_stages: int
    block_n: int
    expand_r: int
    expand_warps: int


def schedule(
    rows: int | None, tokens_per_row: int | None, k: int, widths: tuple[int, ...], max_rank: int, itemsize: int = 2
) -> Schedule:
    """Block sizes for one launch pair; any of them is right, they differ in speed.

    rows, tokens_per_row: None where only the run knows them (a dynamic shape), so that no guard is added;
    k: width of x; widths: of the outputs; max_rank: no adapter has a higher rank; itemsize: bytes of an operand of
    the dots
    """
    if tokens_per_row == 1 and (rows is None or rows <= MANY_ROWS):
        return _decode(k, widths, max_rank)
    if rows is None or tokens_per_row is None:
        tokens, block_m, tiles = None, 64, None
    elif tokens_per_row == 1:
        tokens, block_m = rows, 64
        tiles = -(-tokens // block_m)
    else:
        tokens, block_m = rows * tokens_per_row, power_of_two(tokens_per_row, 16, 64)
        tiles = rows * -(-tokens_per_row // block_m)
    together = power_of_two(len(widths), 1, 4)
    block_r = power_of_two(max_rank, 16, 64 // together)
    rank_blocks = min(4, -(-max_rank // block_r))
    block_k = power_of_two(k, 16, 64 if itemsize <= 2 else 32)
    split_k = 1
    if tiles is not None:  # unknown: the scratch grows with split_k, so only where the tokens are known to be few
        split_k = max(1, min(MAX_SPLIT_K, FULL_GPU // tiles, k // (4 * block_k)))
    return Schedule(
        block_m=block_m,
        spans=tokens_per_row == 1,
        block_r=block_r,
        rank_blocks=rank_blocks,
        together=together,
        block_k=block_k,
        chunk=_chunk(k, split_k, block_k),
        split_k=split_k,
        shrink_warps=4,
        shrink_stages=4,
        block_n=power_of_two(max(widths), 16, 128 if itemsize <= 2 else 64),
        expand_r=power_of_two(max_rank, 16, 32),
        expand_warps=4,
    )


def _decode(k: int, widths: tuple[int, ...], max_rank: int) -> Schedule:
    """Bound by latency and by the bytes of A and B, each read once: many small programs, long rows of loads, no
    padding of the one token to a tile."""
    block_k = power_of_two(k, 32, 512)
    split_k = max(1, min(MAX_SPLIT_K, k // block_k))
    return Schedule(
        block_m=1,
        spans=False,
        block_r=16,
        rank_blocks=max(1, min(4, -(-max_rank // 16))),
        together=1,
        block_k=block_k,
        chunk=_chunk(k, split_k, block_k),
        split_k=split_k,
        shrink_warps=4,
        shrink_stages=1,
        block_n=power_of_two(max(widths), 32, 128),
        expand_r=power_of_two(max_rank, 16, 32),
        expand_warps=2,
    )


def _chunk(k: int, split_k: int, block_k: int) -> int:
    """What each of ``split_k`` programs takes of k, in whole blocks."""
    return -(-k // (split_k * block_k)) * block_k


def power_of_two(value: int, low: int = 1, high: int = 1 << 30) -> int:
    """The smallest power of two that holds ``value``, kept between two powers of two."""
    return max(low, min(high, 1 << max(value - 1, 0).bit_length()))
