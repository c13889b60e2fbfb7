"""``y = x @ W.T + bias``: a tile of one sibling's own layer, for few tokens, which is as fast as W can be read.

A layer that is read by few tokens costs its bytes. One launch for q, k and v, none of which alone keeps a GPU's memory
busy, took 0.5 of the time of three GEMMs on an H100 (docs/performance.md).
"""

import triton
import triton.language as tl

from lorafx.kernels._routing import pick, pick_ptr


@triton.jit
def layer_program(
    program,
    x_ptr,  # [tokens, K]
    w0_ptr,  # [WIDTHS[0], K], rows W_STRIDE apart
    w1_ptr,
    w2_ptr,
    w3_ptr,
    bias0_ptr,  # [WIDTHS[0]] or None
    bias1_ptr,
    bias2_ptr,
    bias3_ptr,
    y0_ptr,  # [tokens, WIDTHS[0]], written
    y1_ptr,
    y2_ptr,
    y3_ptr,
    tokens,
    K: tl.constexpr,
    WIDTHS: tl.constexpr,
    FIRST_TILES: tl.constexpr,  # where each sibling's column tiles start
    COLUMN_TILES: tl.constexpr,
    W_STRIDE: tl.constexpr,
    ALIGNED: tl.constexpr,  # rows of W begin at multiples of 16 bytes
    BLOCK_M: tl.constexpr,  # tokens; 1: sums of products, else tl.dot
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,  # steps of W on their way at once
    DOT: tl.constexpr,  # what a dot takes for bfloat16
    PRECISION: tl.constexpr,
):
    """``program`` counts token tile after token tile of column tile after column tile: those that read one part of W
    run together."""
    SIBLINGS: tl.constexpr = len(WIDTHS)
    token_tiles = tl.cdiv(tokens, BLOCK_M)
    column_tile = program // token_tiles
    sibling = 0
    for i in tl.static_range(1, SIBLINGS):
        sibling += (column_tile >= FIRST_TILES[i]).to(tl.int32)
    width = pick(sibling, WIDTHS, tl.int32)
    n = (column_tile - pick(sibling, FIRST_TILES, tl.int32)) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    w_ptr = pick_ptr(sibling, w0_ptr, w1_ptr, w2_ptr, w3_ptr, SIBLINGS)
    if ALIGNED:
        w_ptr = tl.multiple_of(w_ptr, 16)
    w_rows = w_ptr + n.to(tl.int64) * W_STRIDE  # [N]
    in_width = n < width
    y_ptr = pick_ptr(sibling, y0_ptr, y1_ptr, y2_ptr, y3_ptr, SIBLINGS)
    first = (program % token_tiles) * BLOCK_M
    x_ptr += first.to(tl.int64) * K
    y_ptr += first.to(tl.int64) * width

    if BLOCK_M == 1:
        products = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            k = k0 + tl.arange(0, BLOCK_K)  # [K]
            in_k = k < K
            x = tl.load(x_ptr + k, mask=in_k, other=0.0)
            w = tl.load(
                w_rows[:, None] + k[None, :],
                mask=in_width[:, None] & in_k[None, :],
                other=0.0,
                eviction_policy="evict_first",  # read by nobody else
            )
            products += x.to(tl.float32)[None, :] * w.to(tl.float32)  # [N, K]
        y = tl.sum(products, axis=1)  # [N]
        y += _bias(sibling, n, in_width, bias0_ptr, bias1_ptr, bias2_ptr, bias3_ptr)
        tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=in_width)
    else:
        m = tl.arange(0, BLOCK_M)  # [M]
        in_tokens = first + m < tokens
        y = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            k = k0 + tl.arange(0, BLOCK_K)  # [K]
            in_k = k < K
            x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=in_tokens[:, None] & in_k[None, :], other=0.0)
            w = tl.load(w_rows[None, :] + k[:, None], mask=in_width[None, :] & in_k[:, None], other=0.0)  # [K, N]
            if x.dtype == tl.bfloat16:
                x = x.to(DOT)
                w = w.to(DOT)
            y = tl.dot(x, w, y, input_precision=PRECISION)
        y += _bias(sibling, n, in_width, bias0_ptr, bias1_ptr, bias2_ptr, bias3_ptr)[None, :]
        tl.store(
            y_ptr + m[:, None] * width + n[None, :],
            y.to(y_ptr.dtype.element_ty),
            mask=in_tokens[:, None] & in_width[None, :],
        )


@triton.jit
def _bias(sibling, n, in_width, bias0_ptr, bias1_ptr, bias2_ptr, bias3_ptr):
    """The sibling's bias at columns ``n``, 0 where it has none. Which are None the compiler knows."""
    bias = tl.zeros(n.shape, dtype=tl.float32)
    if bias0_ptr is not None:  # noqa: SIM102
        if sibling == 0:
            bias = tl.load(bias0_ptr + n, mask=in_width, other=0.0).to(tl.float32)
    if bias1_ptr is not None:  # noqa: SIM102
        if sibling == 1:
            bias = tl.load(bias1_ptr + n, mask=in_width, other=0.0).to(tl.float32)
    if bias2_ptr is not None:  # noqa: SIM102
        if sibling == 2:
            bias = tl.load(bias2_ptr + n, mask=in_width, other=0.0).to(tl.float32)
    if bias3_ptr is not None:  # noqa: SIM102
        if sibling == 3:
            bias = tl.load(bias3_ptr + n, mask=in_width, other=0.0).to(tl.float32)
    return bias
