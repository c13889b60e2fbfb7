"""``S = x @ A.T`` for every (token, pair, sibling) window of a group, in one launch; where the siblings' own layers are
folded into the op, further programs of that launch compute ``y = x @ W.T + bias``."""

import triton
import triton.language as tl

from lorafx.kernels._layers import layer_program
from lorafx.kernels._routing import (
    entry_of,
    first_token,
    high_part,
    last_token,
    low_part,
    pairs_of,
    pick,
    pick_ptr,
    row_of,
)


@triton.jit
def shrink_kernel(
    x_ptr,  # [tokens, K]
    a0_ptr,  # [rank rows of the sibling, K]
    a1_ptr,
    a2_ptr,
    a3_ptr,
    after_ptr,  # not read: the launch comes after what makes it; None where layers are folded
    w0_ptr,  # [WIDTHS[0], K], rows W_STRIDE apart; all eight None where no layers are folded
    w1_ptr,
    w2_ptr,
    w3_ptr,
    bias0_ptr,  # [WIDTHS[0]] or None
    bias1_ptr,
    bias2_ptr,
    bias3_ptr,
    y0_ptr,  # [tokens, WIDTHS[0]]
    y1_ptr,
    y2_ptr,
    y3_ptr,
    s_ptr,  # [SPLIT_K, tokens, LANES], float32; only the lanes of the windows in use are written
    slots_ptr,  # [entries, pairs]; without routing None, and so are the next two
    windows_ptr,  # [slots, siblings, 3]: first row, rank, bias row
    count_ptr,  # []
    tokens,
    row_tokens,  # tokens of one row of the batch
    rows,
    pairs,
    layer_programs,  # the others are for the shrink
    K: tl.constexpr,
    PAIRS: tl.constexpr,  # the power of two that holds pairs
    RANKS: tl.constexpr,  # of each sibling, where there is no routing
    FIRST_LANES: tl.constexpr,  # where each sibling's lanes start in s
    LANES: tl.constexpr,
    FIRST_SIBLING: tl.constexpr,  # of this launch, in windows
    WINDOW_STRIDE: tl.constexpr,  # from slot to slot
    BLOCK_M: tl.constexpr,  # tokens of a program; 1: sums of products, else tl.dot
    BLOCK_R: tl.constexpr,  # ranks of each of its siblings
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,  # of K for a program, a multiple of BLOCK_K
    TOGETHER: tl.constexpr,  # siblings of a program, a power of two
    RANK_BLOCKS: tl.constexpr,  # programs that share the ranks of a window
    SPANS: tl.constexpr,  # a tile may span rows of the batch
    ALIGNED: tl.constexpr,  # rows of A begin at multiples of 16 bytes
    UPCAST: tl.constexpr,  # take x and A as float32
    TERMS: tl.constexpr,  # 2: x is bfloat16, A float32, taken as the sum of two bfloat16
    DOT: tl.constexpr,  # what a dot takes for bfloat16
    PRECISION: tl.constexpr,
    WIDTHS: tl.constexpr,  # of the layers, () where none are folded, and so on
    FIRST_TILES: tl.constexpr,  # where each sibling's column tiles start
    COLUMN_TILES: tl.constexpr,
    W_STRIDE: tl.constexpr,
    W_ALIGNED: tl.constexpr,  # rows of W begin at multiples of 16 bytes
    LAYER_M: tl.constexpr,
    LAYER_N: tl.constexpr,
    LAYER_K: tl.constexpr,
    LAYER_STAGES: tl.constexpr,
    LAYERS_FIRST: tl.constexpr,  # their programs start first
):
    """Grid: (token tiles of the layers * their column tiles, plus token tiles, row after row, * sibling blocks *
    RANK_BLOCKS * SPLIT_K)."""
    SIBLINGS: tl.constexpr = len(FIRST_LANES)
    SPLIT_K: tl.constexpr = (K + CHUNK - 1) // CHUNK
    BLOCKS: tl.constexpr = (SIBLINGS + TOGETHER - 1) // TOGETHER * RANK_BLOCKS * SPLIT_K
    program = tl.program_id(0)
    if not LAYERS_FIRST:
        program = (program + layer_programs) % tl.num_programs(0)
    if len(WIDTHS) == 0 or program >= layer_programs:
        program -= layer_programs
        lane = tl.arange(0, TOGETHER * BLOCK_R)  # [L]: block after block of BLOCK_R lanes, one for each sibling
        tile = program // BLOCKS
        split = program % SPLIT_K
        block = program % BLOCKS // SPLIT_K
        first_sibling = block // RANK_BLOCKS * TOGETHER
        sibling = first_sibling + lane // BLOCK_R  # [L]
        first_rank = block % RANK_BLOCKS * BLOCK_R
        a_ptr = pick_ptr(first_sibling if TOGETHER == 1 else sibling, a0_ptr, a1_ptr, a2_ptr, a3_ptr, SIBLINGS)
        if ALIGNED and TOGETHER > 1 and SIBLINGS > 1:
            a_ptr = tl.multiple_of(a_ptr, 16)  # the compiler forgets it, and would load two bytes at a time
        first_lane = pick(sibling, FIRST_LANES)  # [L]

        row = row_of(tile, row_tokens, BLOCK_M, SPANS)
        first = first_token(tile, row, row_tokens, BLOCK_M, SPANS)
        last = last_token(first, row, tokens, row_tokens, BLOCK_M, SPANS)
        m = tl.arange(0, BLOCK_M)  # [M]; offsets within a tile fit 32 bits
        valid = first + m <= last
        x_ptr += first.to(tl.int64) * K
        s_ptr += (split.to(tl.int64) * tokens + first) * LANES

        # A tile that spans rows takes one pass for each routing entry in it, other tokens masked.
        first_entry = entry_of(first // row_tokens if SPANS else row, rows, count_ptr)
        passes = 1
        if SPANS:
            entry = entry_of((first + m) // row_tokens, rows, count_ptr)  # [M]
            passes = entry_of(last // row_tokens, rows, count_ptr) - first_entry + 1
        for turn in range(passes):
            current = first_entry + turn
            mine = valid  # [M]
            if SPANS:
                mine &= entry == current
            for pair in range(pairs_of(current, pairs, slots_ptr, PAIRS)):
                if slots_ptr is None:
                    start = tl.zeros_like(sibling).to(tl.int64)
                    rank = tl.where(sibling < SIBLINGS, pick(sibling, RANKS, tl.int32), 0)
                else:
                    slot = tl.load(slots_ptr + current * pairs + pair)
                    window_ptr = windows_ptr + slot * WINDOW_STRIDE + (FIRST_SIBLING + sibling) * 3
                    start = tl.load(window_ptr, mask=sibling < SIBLINGS, other=0).to(tl.int64)  # [L]
                    rank = tl.load(window_ptr + 1, mask=sibling < SIBLINGS, other=0).to(tl.int32)  # [L]
                for r0 in range(first_rank, tl.max(rank, axis=0), RANK_BLOCKS * BLOCK_R):
                    r = r0 + lane % BLOCK_R  # [L]
                    live = r < rank
                    a_rows = a_ptr + (start + r) * K  # [L]; start is int64
                    s_lanes = s_ptr + first_lane + start + r  # [L]
                    if BLOCK_M == 1:
                        products = tl.zeros([TOGETHER * BLOCK_R, BLOCK_K], dtype=tl.float32)
                        for k0 in range(0, CHUNK, BLOCK_K):
                            k = split * CHUNK + k0 + tl.arange(0, BLOCK_K)  # [K]
                            x = tl.load(x_ptr + k, mask=k < K, other=0.0)
                            a = tl.load(a_rows[:, None] + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
                            products += x.to(tl.float32)[None, :] * a.to(tl.float32)  # [L, K]
                        tl.store(s_lanes, tl.sum(products, axis=1), mask=live)
                    else:
                        s = tl.zeros([BLOCK_M, TOGETHER * BLOCK_R], dtype=tl.float32)
                        for k0 in range(0, CHUNK, BLOCK_K):
                            k = split * CHUNK + k0 + tl.arange(0, BLOCK_K)  # [K]
                            x = tl.load(
                                x_ptr + m[:, None] * K + k[None, :], mask=mine[:, None] & (k < K)[None, :], other=0.0
                            )  # [M, K]
                            a = tl.load(
                                a_rows[None, :] + k[:, None], mask=live[None, :] & (k < K)[:, None], other=0.0
                            )  # [K, L]
                            if TERMS == 2:
                                s = tl.dot(x.to(DOT), low_part(a, DOT), s)
                                s = tl.dot(x.to(DOT), high_part(a, DOT), s)
                            else:
                                if UPCAST:
                                    x = x.to(tl.float32)
                                    a = a.to(tl.float32)
                                s = tl.dot(x, a, s, input_precision=PRECISION)
                        tl.store(s_lanes[None, :] + m[:, None] * LANES, s, mask=mine[:, None] & live[None, :])
    else:
        layer_program(
            program, x_ptr,
            w0_ptr, w1_ptr, w2_ptr, w3_ptr, bias0_ptr, bias1_ptr, bias2_ptr, bias3_ptr, y0_ptr, y1_ptr, y2_ptr, y3_ptr,
            tokens, K, WIDTHS, FIRST_TILES, COLUMN_TILES, W_STRIDE, W_ALIGNED, LAYER_M, LAYER_N, LAYER_K, LAYER_STAGES,
            DOT, PRECISION,
        )  # fmt: skip
