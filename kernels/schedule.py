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
    """``block_m`` is the tokens of a program; 1 means sums of products (decode), 16 and more tensor cores."""

    block_m: int
    block_r: int
    block_k: int
    block_n: int
    split_k: int
    num_warps: int


def schedule(
    rows: int | None, tokens_per_row: int | None, k: int, widths: tuple[int, ...], max_rank: int, itemsize: int = 2
) -> Schedule:
    """Block sizes for one launch pair; any of them is right, they differ in speed.

    rows, tokens_per_row: None where only the run knows them (a dynamic shape), so that no guard is added;
    k: width of x; widths: of the outputs; max_rank: no adapter has a higher rank; itemsize: bytes of an operand of
    the dots
    """
    if tokens_per_row == 1 and (rows is None or rows <= MANY_ROWS):
        # Bound by the bytes of A and B, each read once: long rows of loads, no padding of the one token to a tile.
        block_k = _power_of_two(k, 32, 256)
        split_k = max(1, min(MAX_SPLIT_K, k // (2 * block_k)))
        return Schedule(1, 16, block_k, _power_of_two(max(widths), 32, 256), split_k, 4)
    if rows is None or tokens_per_row is None:
        tokens, block_m = None, 64
    else:
        # A tile may span rows, at one pass for each row in it: small tiles for short rows.
        tokens = rows * tokens_per_row
        block_m = _power_of_two(tokens if tokens_per_row == 1 else tokens_per_row, 16, 64)
    block_k = _power_of_two(k, 16, 64 if itemsize <= 2 else 32)
    split_k = 1
    if tokens is not None:  # unknown: the scratch grows with split_k, so only where the tokens are known to be few
        split_k = max(1, min(MAX_SPLIT_K, FULL_GPU // -(-tokens // block_m), k // (4 * block_k)))
    # Larger blocks of ranks and columns spill registers (64 x 64 x 32: a few bytes on sm_80, none on sm_90).
    block_n = _power_of_two(max(widths), 16, 64)
    return Schedule(block_m, _power_of_two(max_rank, 16, 32), block_k, block_n, split_k, 4)


def _power_of_two(value: int, low: int, high: int) -> int:
    """The smallest power of two that holds ``value``, kept between two powers of two."""
    return max(low, min(high, 1 << max(value - 1, 0).bit_length()))
