"""``out = y + sum of weight * scale * (S @ B + bias)`` for every token and sibling of a group, in one launch."""

import triton
import triton.language as tl

from lorafx.kernels._routing import entry_of, pick, pick_ptr, window_of


@triton.jit
def expand_kernel(
    y0_ptr,  # [tokens, WIDTHS[0]]
    y1_ptr,
    y2_ptr,
    y3_ptr,
    b0_ptr,  # [rank rows and bias rows, WIDTHS[0]], any strides
    b1_ptr,
    b2_ptr,
    b3_ptr,
    out0_ptr,  # as y
    out1_ptr,
    out2_ptr,
    out3_ptr,
    s_ptr,  # [SPLIT_K, tokens, LANES], what the shrink wrote
    slots_ptr,  # [entries, pairs]
    weights_ptr,  # [entries, pairs]
    windows_ptr,  # [slots, siblings, 3]: first row, rank, bias row
    scale_ptr,  # [slots, siblings]; without routing [siblings] or None
    count_ptr,  # []
    tokens,
    row_tokens,  # tokens of one row of the batch
    rows,
    pairs,
    WIDTHS: tl.constexpr,
    B_STRIDES_R: tl.constexpr,
    B_STRIDES_N: tl.constexpr,
    RANKS: tl.constexpr,  # of each sibling, where there is no routing, and the same for the next two
    BIAS_ROWS: tl.constexpr,
    FACTORS: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,  # from slot to slot
    FIRST_LANES: tl.constexpr,  # where each sibling's lanes start in s
    LANES: tl.constexpr,
    FIRST_SIBLING: tl.constexpr,  # of this launch, in windows
    WINDOW_STRIDE: tl.constexpr,  # from slot to slot
    BLOCK_M: tl.constexpr,  # tokens of a program; 1: sums of products, else tl.dot
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (token tiles, column tiles of the widest sibling, siblings)."""
    SIBLINGS: tl.constexpr = len(WIDTHS)
    sibling = tl.program_id(2)
    width = pick(sibling, WIDTHS, tl.int32)
    first_column = tl.program_id(1) * BLOCK_N
    if first_column >= width:
        return
    n = first_column + tl.arange(0, BLOCK_N)  # [BN]
    b_ptr = pick_ptr(sibling, b0_ptr, b1_ptr, b2_ptr, b3_ptr, SIBLINGS)
    stride_r = pick(sibling, B_STRIDES_R)
    b_columns = b_ptr + n * pick(sibling, B_STRIDES_N)  # [BN]

    first = tl.program_id(0) * BLOCK_M
    last = tl.minimum(first + BLOCK_M, tokens) - 1
    m = tl.arange(0, BLOCK_M)  # [BM]; offsets within a tile fit 32 bits
    token = first + m  # [BM]
    entry = entry_of(token, row_tokens, rows, count_ptr)  # [BM]
    s_ptr += first.to(tl.int64) * LANES + pick(sibling, FIRST_LANES)
    split_stride = tl.cast(tokens, tl.int64) * LANES

    delta = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    # A tile may span rows of the batch: one pass for each routing entry in it, other tokens masked.
    first_entry = entry_of(first, row_tokens, rows, count_ptr)
    last_entry = entry_of(last, row_tokens, rows, count_ptr)
    for current in range(first_entry, last_entry + 1):
        mine = (token <= last) & (entry == current)  # [BM]
        for pair in range(pairs):
            start, rank, bias_row = window_of(
                current, pair, pairs, sibling, slots_ptr, windows_ptr, FIRST_SIBLING, WINDOW_STRIDE, RANKS, BIAS_ROWS
            )
            if rank > 0:
                part = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
                for r0 in range(0, rank, BLOCK_R):
                    r = r0 + tl.arange(0, BLOCK_R)  # [BR]
                    s_lanes = s_ptr + start + r  # [BR]
                    b = tl.load(
                        b_columns[None, :] + ((start + r) * stride_r)[:, None],
                        mask=(r < rank)[:, None] & (n < width)[None, :],
                        other=0.0,
                    ).to(tl.float32)  # [BR, BN]
                    if BLOCK_M == 1:
                        s = tl.zeros([BLOCK_R], dtype=tl.float32)
                        for split in range(SPLIT_K):
                            s += tl.load(s_lanes + split * split_stride, mask=r < rank, other=0.0)
                        part += tl.sum(s[:, None] * b, axis=0)[None, :]
                    else:
                        s = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
                        for split in range(SPLIT_K):
                            s += tl.load(
                                s_lanes[None, :] + split * split_stride + m[:, None] * LANES,
                                mask=mine[:, None] & (r < rank)[None, :],
                                other=0.0,
                            )
                        part = tl.dot(s, b, part, input_precision=PRECISION)
                if bias_row >= 0:
                    bias = tl.load(b_columns + bias_row * stride_r, mask=n < width, other=0.0)  # [BN]
                    part += bias.to(tl.float32)[None, :]
                if slots_ptr is None:
                    factor = pick(sibling, FACTORS, tl.float32)
                    if scale_ptr is not None:
                        factor *= tl.load(scale_ptr + FIRST_SIBLING + sibling).to(tl.float32)
                else:
                    factor = tl.load(weights_ptr + current * pairs + pair).to(tl.float32)
                    slot = tl.load(slots_ptr + current * pairs + pair)
                    factor *= tl.load(
                        scale_ptr + slot * SCALE_STRIDE + FIRST_SIBLING + sibling, mask=slot >= 0, other=0.0
                    ).to(tl.float32)
                # Selected, not multiplied by zero: a NaN of one adapter stays in the rows that use it.
                delta += tl.where(mine[:, None], part * factor, 0.0)

    tile = first.to(tl.int64) * width
    offs = m[:, None] * width + n[None, :]  # [BM, BN]
    mask = (token <= last)[:, None] & (n < width)[None, :]
    y = tl.load(pick_ptr(sibling, y0_ptr, y1_ptr, y2_ptr, y3_ptr, SIBLINGS) + tile + offs, mask=mask, other=0.0)
    out = (y.to(tl.float32) + delta).to(y.dtype)
    tl.store(pick_ptr(sibling, out0_ptr, out1_ptr, out2_ptr, out3_ptr, SIBLINGS) + tile + offs, out, mask=mask)
