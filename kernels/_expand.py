"""``out = y + sum of weight * scale * (S @ B + bias)`` for every token and sibling of a group, in one launch."""

import triton
import triton.language as tl

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
def expand_kernel(
    y0_ptr,  # [tokens, WIDTHS[0]]; all four None where the outputs hold it
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
    PAIRS: tl.constexpr,  # the power of two that holds pairs
    WIDTHS: tl.constexpr,
    FIRST_TILES: tl.constexpr,  # where each sibling's column tiles start
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
    SPLITS: tl.constexpr,  # the power of two that holds SPLIT_K
    SPANS: tl.constexpr,  # a tile may span rows of the batch
    TERMS: tl.constexpr,  # 2: B is bfloat16, S taken as the sum of two bfloat16; 3: both float32, both taken so
    DOT: tl.constexpr,  # what a dot takes for bfloat16
    PRECISION: tl.constexpr,
):
    """Grid: (token tiles, row after row, column tiles of all siblings)."""
    SIBLINGS: tl.constexpr = len(WIDTHS)
    column_tile = tl.program_id(1)
    sibling = 0
    for i in tl.static_range(1, SIBLINGS):
        sibling += (column_tile >= FIRST_TILES[i]).to(tl.int32)
    width = pick(sibling, WIDTHS, tl.int32)
    n = (column_tile - pick(sibling, FIRST_TILES, tl.int32)) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]

    row = row_of(tl.program_id(0), row_tokens, BLOCK_M, SPANS)
    first = first_token(tl.program_id(0), row, row_tokens, BLOCK_M, SPANS)
    last = last_token(first, row, tokens, row_tokens, BLOCK_M, SPANS)
    m = tl.arange(0, BLOCK_M)  # [M]; offsets within a tile fit 32 bits
    valid = first + m <= last
    tile = first.to(tl.int64) * width
    offs = m[:, None] * width + n[None, :]  # [M, N]
    mask = valid[:, None] & (n < width)[None, :]
    out_ptr = pick_ptr(sibling, out0_ptr, out1_ptr, out2_ptr, out3_ptr, SIBLINGS) + tile
    if y0_ptr is None:
        y_ptr = out_ptr
    else:
        y_ptr = pick_ptr(sibling, y0_ptr, y1_ptr, y2_ptr, y3_ptr, SIBLINGS) + tile
    if BLOCK_M == 1:  # on its way while the routing is read; a larger tile would not leave registers enough
        y = tl.load(y_ptr + offs, mask=mask, other=0.0)

    stride_r = pick(sibling, B_STRIDES_R)
    b_columns = pick_ptr(sibling, b0_ptr, b1_ptr, b2_ptr, b3_ptr, SIBLINGS) + n * pick(sibling, B_STRIDES_N)  # [N]
    s_ptr += first.to(tl.int64) * LANES + pick(sibling, FIRST_LANES)
    split_stride = tl.cast(tokens, tl.int64) * LANES

    delta = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
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
                start = tl.cast(0, tl.int64)
                rank = pick(sibling, RANKS, tl.int32)
                bias_row = pick(sibling, BIAS_ROWS)
                factor = pick(sibling, FACTORS, tl.float32)
                if scale_ptr is not None:
                    factor *= tl.load(scale_ptr + FIRST_SIBLING + sibling).to(tl.float32)
            else:
                slot = tl.load(slots_ptr + current * pairs + pair)
                window_ptr = windows_ptr + slot * WINDOW_STRIDE + (FIRST_SIBLING + sibling) * 3
                start = tl.load(window_ptr).to(tl.int64)
                rank = tl.load(window_ptr + 1).to(tl.int32)
                bias_row = tl.load(window_ptr + 2).to(tl.int64)
                factor = tl.load(weights_ptr + current * pairs + pair).to(tl.float32)
                factor *= tl.load(scale_ptr + slot * SCALE_STRIDE + FIRST_SIBLING + sibling).to(tl.float32)
            if rank > 0:
                # Where a tile holds rows of several adapters, what one adds is selected and not multiplied by zero:
                # a NaN stays in the rows that use it.
                part = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32) if SPANS else delta
                for r0 in range(0, rank, BLOCK_R):
                    r = r0 + tl.arange(0, BLOCK_R)  # [R]
                    s_lanes = s_ptr + start + r  # [R]
                    b = tl.load(
                        b_columns[None, :] + ((start + r) * stride_r)[:, None],
                        mask=(r < rank)[:, None] & (n < width)[None, :],
                        other=0.0,
                    )  # [R, N]
                    if BLOCK_M == 1:
                        split = tl.arange(0, SPLITS)
                        s = tl.load(
                            s_lanes[None, :] + split[:, None] * split_stride,
                            mask=(split < SPLIT_K)[:, None] & (r < rank)[None, :],
                            other=0.0,
                        )  # [splits, R]
                        s = tl.sum(s, axis=0) * factor
                        part += tl.sum(s[:, None] * b.to(tl.float32), axis=0)[None, :]
                    else:
                        s = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
                        for split in tl.static_range(SPLIT_K):
                            s += tl.load(
                                s_lanes[None, :] + split * split_stride + m[:, None] * LANES,
                                mask=mine[:, None] & (r < rank)[None, :],
                                other=0.0,
                            )
                        s *= factor
                        if TERMS == 2:
                            part = tl.dot(low_part(s, DOT), b.to(DOT), part)
                            part = tl.dot(high_part(s, DOT), b.to(DOT), part)
                        elif TERMS == 3:
                            part = tl.dot(low_part(s, DOT), high_part(b, DOT), part)
                            part = tl.dot(high_part(s, DOT), low_part(b, DOT), part)
                            part = tl.dot(high_part(s, DOT), high_part(b, DOT), part)
                        else:
                            part = tl.dot(s, b.to(tl.float32), part, input_precision=PRECISION)
                if bias_row >= 0:
                    bias = tl.load(b_columns + bias_row * stride_r, mask=n < width, other=0.0)  # [N]
                    part += factor * bias.to(tl.float32)[None, :]
                if SPANS:
                    delta += tl.where(mine[:, None], part, 0.0)
                else:
                    delta = part

    if BLOCK_M > 1:
        y = tl.load(y_ptr + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, (y.to(tl.float32) + delta).to(y.dtype), mask=mask)
