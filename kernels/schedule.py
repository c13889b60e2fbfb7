"""Block sizes of the Triton lowering, from what the host knows: a pure function of ints."""

from __future__ import annotations

from dataclasses import dataclass

# A GPU has about a hundred multiprocessors; a shrink of few tokens is cut along k until it has this many programs.
FULL_GPU = 128
MAX_SPLIT_K = 32
# Rows of one token, each with programs of its own: more than a decode step has, so an input that was flattened to
# [batch * tokens, k] is cut into tiles. Tiles of 16 rows with a pass for each adapter in them took 5 to 8 times as long
# at 64 rows of 8 adapters on an H100.
FEW_ROWS = 512
FOLDED_CHUNK = 1024  # of k, for a program of the shrink beside folded layers
MOST_LAYER_TOKENS = 64  # of a tile of a layer: so many read W once


@dataclass(frozen=True)
class Schedule:
    """Tokens of a program: ``shrink_m`` and ``expand_m``; 1 means sums of products, 16 and more tensor cores.

    Shrink: a program takes ``block_r`` ranks of ``together`` siblings and ``chunk`` of k in steps of ``block_k``;
    ``rank_blocks`` programs share the ranks of a window and ``split_k`` the whole of k. Expand: ``block_n`` columns, in
    steps of ``expand_r`` ranks. ``spans``: a tile may hold tokens of several rows of the batch
    """

    spans: bool
    shrink_m: int
    expand_m: int
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
    rows: int | None,
    tokens_per_row: int | None,
    k: int,
    widths: tuple[int, ...],
    max_rank: int,
    itemsize: int = 2,
    folded: bool = False,
    capability: int = 90,
) -> Schedule:
    """Block sizes for one launch pair; any of them is right, they differ in speed.

    rows, tokens_per_row: None where only the run knows them (a dynamic shape), so that no guard is added;
    k: width of x; widths: of the outputs; max_rank: no adapter has a higher rank; itemsize: bytes of an operand of
    the dots; folded: the layers are computed in the shrink's launch; capability: of an NVIDIA GPU, 90 for 9.0
    """
    if tokens_per_row == 1 and (rows is None or rows <= FEW_ROWS):
        return _single_rows(rows, k, widths, max_rank, folded)
    if rows is None or tokens_per_row is None:
        tokens = None
    else:
        tokens = rows * tokens_per_row
    spans = tokens_per_row == 1
    longest = 64 if tokens_per_row is None else power_of_two(tokens if spans else tokens_per_row, 16, 64)
    shrink_m, split_k = longest, 1
    block_k = power_of_two(k, 16, 64 if itemsize <= 2 else 32)
    if tokens is not None:  # unknown: the scratch grows with split_k, so only where the tokens are known to be few
        while shrink_m > 16 and tokens // shrink_m < FULL_GPU // 2:
            shrink_m //= 2
        # the expand reads all partial sums again for each of its column tiles: only those of few tokens are many
        programs = FULL_GPU * (2 if shrink_m == 16 else 1)
        split_k = max(1, min(8, programs // -(-tokens // shrink_m), k // (4 * block_k)))
    together = power_of_two(len(widths), 1, 4)
    block_r = power_of_two(max_rank, 16, 64 // together)
    chunk = _chunk(k, split_k, block_k)
    return Schedule(
        spans=spans,
        shrink_m=shrink_m,
        expand_m=min(longest, 32 if itemsize <= 2 or capability >= 100 else 64),  # 64 would spill on sm_100
        block_r=block_r,
        rank_blocks=min(4, -(-max_rank // block_r)),
        together=together,
        block_k=block_k,
        chunk=chunk,
        split_k=-(-k // chunk),
        shrink_warps=4,
        shrink_stages=4,
        block_n=power_of_two(max(widths), 16, 256 if itemsize <= 2 else 128),
        expand_r=16,
        expand_warps=4,
    )


@dataclass(frozen=True)
class LayerSchedule:
    """Of the siblings' own layers: a program takes ``tile_m`` tokens (1: sums of products, 16 and more: tensor cores)
    and ``tile_n`` columns, in steps of ``block_k``, of which ``stages`` are on their way at once. ``first``: these
    programs start before the shrink's."""

    tile_m: int
    tile_n: int
    block_k: int
    stages: int
    first: bool


def layer_schedule(
    tokens: int | None, k: int, widths: tuple[int, ...], itemsize: int = 2, shared: int = 96 * 1024
) -> LayerSchedule:
    """Block sizes for the layers of one launch, the best of some hundred on an H100 (docs/performance.md).

    tokens: None where only the run knows; shared: bytes of a multiprocessor's memory that one program may take
    """
    if tokens == 1:  # the shrink is short, and its programs start among the first if they are
        return LayerSchedule(1, power_of_two(max(widths), 1, 8), power_of_two(k, 16, 512), 1, False)
    tile_m = MOST_LAYER_TOKENS if tokens is None else power_of_two(tokens, 16, MOST_LAYER_TOKENS)
    tile_n, block_k = power_of_two(max(widths), 16, 32), power_of_two(k, 16, 256 // itemsize)
    programs = sum(-(-width // tile_n) for width in widths)
    # Where each multiprocessor has one program, that one has more on its way. What a program takes of a multiprocessor
    # the shrink's programs take too, and these are the more, the more rows there are.
    stages = 3 if tile_m == MOST_LAYER_TOKENS else 6 if programs <= FULL_GPU else 4
    room = shared // ((tile_m + tile_n) * block_k * itemsize)
    return LayerSchedule(tile_m, tile_n, block_k, max(1, min(stages, room)), True)


def _single_rows(rows: int | None, k: int, widths: tuple[int, ...], max_rank: int, folded: bool) -> Schedule:
    """Bound by latency and by the bytes of A and B: many small programs, long rows of loads, no padding of the one
    token to a tile. The more rows, the larger the programs: these then wait for each other's launch. Beside the folded
    layers of several rows the shrink has time for longer programs, whose fewer sums the expand reads sooner."""
    block_k = power_of_two(k, 32, 256)
    split_k = max(1, min(MAX_SPLIT_K, k // (FOLDED_CHUNK if folded and rows != 1 else block_k)))
    block_n = 128 if max_rank <= 16 else 64
    if rows is not None:
        while split_k > 8 and rows * len(widths) * split_k > 4 * FULL_GPU:
            split_k //= 2
        while block_n < 256 and rows * sum(widths) // block_n > 16 * FULL_GPU:
            block_n *= 2
    block_n = power_of_two(max(widths), 32, block_n)
    chunk = _chunk(k, split_k, block_k)
    return Schedule(
        spans=False,
        shrink_m=1,
        expand_m=1,
        block_r=16,
        rank_blocks=max(1, min(4, -(-max_rank // 16))),
        together=1,
        block_k=block_k,
        chunk=chunk,
        split_k=-(-k // chunk),
        shrink_warps=4,
        shrink_stages=1,
        block_n=block_n,
        expand_r=power_of_two(max_rank, 16, max(16, 4096 // block_n)),  # 128 numbers of B for a thread
        expand_warps=1,
    )


def _chunk(k: int, split_k: int, block_k: int) -> int:
    """What each of ``split_k`` programs takes of k, in whole blocks."""
    return -(-k // (split_k * block_k)) * block_k


def power_of_two(value: int, low: int = 1, high: int = 1 << 30) -> int:
    """The smallest power of two that holds ``value``, kept between two powers of two."""
    return max(low, min(high, 1 << max(value - 1, 0).bit_length()))
