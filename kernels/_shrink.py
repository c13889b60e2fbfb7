"""``S = x @ A.T`` for every (token, pair, sibling) window of a group, in one launch."""

import triton
import triton.language as tl

from lorafx.kernels._routing import entry_of, pick, pick_ptr, window_of


@triton.jit
def shrink_kernel(
    x_ptr,  # [tokens, K]
    a0_ptr,  # [rank rows of the sibling, K]
    a1_ptr,
    a2_ptr,
    a3_ptr,
    s_ptr,  # [SPLIT_K, tokens, LANES], float32; only the lanes of the windows in use are written
    slots_ptr,  # [entries, pairs]
    windows_ptr,  # [slots, siblings, 3]: first row, rank, bias row
    count_ptr,  # []
    tokens,
    row_tokens,  # tokens of one row of the batch
    rows,
    pairs,
    K: tl.constexpr,
    RANKS: tl.constexpr,  # of each sibling, where there is no routing
    FIRST_LANES: tl.constexpr,  # where each sibling's lanes start in s
    LANES: tl.constexpr,
    FIRST_SIBLING: tl.constexpr,  # of this launch, in windows
    WINDOW_STRIDE: tl.constexpr,  # from slot to slot
    BLOCK_M: tl.constexpr,  # tokens of a program; 1: sums of products, else tl.dot
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    UPCAST: tl.constexpr,  # x and A differ in dtype
    PRECISION: tl.constexpr,
):
    """Grid: (token tiles, siblings * pairs, SPLIT_K)."""
    SIBLINGS: tl.constexpr = len(FIRST_LANES)
    sibling = tl.program_id(1) % SIBLINGS
    pair = tl.program_id(1) // SIBLINGS
    split = tl.program_id(2)
    a_ptr = pick_ptr(sibling, a0_ptr, a1_ptr, a2_ptr, a3_ptr, SIBLINGS)

    first = tl.program_id(0) * BLOCK_M
    last = tl.minimum(first + BLOCK_M, tokens) - 1
    token = first + tl.arange(0, BLOCK_M)  # [BM]
    entry = entry_of(token, row_tokens, rows, count_ptr)  # [BM]
    x_ptr += first.to(tl.int64) * K
    s_ptr += (split.to(tl.int64) * tokens + first) * LANES + pick(sibling, FIRST_LANES)
    m = tl.arange(0, BLOCK_M)  # [BM]; offsets within a tile fit 32 bits

    # A tile may span rows of the batch: one pass for each routing entry in it, other tokens masked.
    first_entry = entry_of(first, row_tokens, rows, count_ptr)
    last_entry = entry_of(last, row_tokens, rows, count_ptr)
    for current in range(first_entry, last_entry + 1):
        start, rank, _ = window_of(
            current, pair, pairs, sibling, slots_ptr, windows_ptr, FIRST_SIBLING, WINDOW_STRIDE, RANKS, RANKS
        )
        mine = (token <= last) & (entry == current)  # [BM]
        for r0 in range(0, rank, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)  # [BR]
            a_rows = a_ptr + (start + r) * K  # [BR]; start is int64
            s_lanes = s_ptr + start + r  # [BR]
            if BLOCK_M == 1:
                products = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
                for k0 in range(split * BLOCK_K, K, SPLIT_K * BLOCK_K):
                    k = k0 + tl.arange(0, BLOCK_K)
                    x = tl.load(x_ptr + k, mask=k < K, other=0.0)  # [BK]
                    a = tl.load(a_rows[:, None] + k[None, :], mask=(r < rank)[:, None] & (k < K)[None, :], other=0.0)
                    products += x.to(tl.float32)[None, :] * a.to(tl.float32)  # [BR, BK]
                tl.store(s_lanes, tl.sum(products, axis=1), mask=r < rank)
            else:
                s = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
                for k0 in range(split * BLOCK_K, K, SPLIT_K * BLOCK_K):
                    k = k0 + tl.arange(0, BLOCK_K)
                    x = tl.load(
                        x_ptr + m[:, None] * K + k[None, :], mask=mine[:, None] & (k < K)[None, :], other=0.0
                    )  # [BM, BK]
                    a = tl.load(
                        a_rows[None, :] + k[:, None], mask=(r < rank)[None, :] & (k < K)[:, None], other=0.0
                    )  # [BK, BR]
                    if UPCAST:
                        x = x.to(tl.float32)
                        a = a.to(tl.float32)
                    s = tl.dot(x, a, s, input_precision=PRECISION)
                tl.store(s_lanes[None, :] + m[:, None] * LANES, s, mask=mine[:, None] & (r < rank)[None, :])
