"""What the shrink and the expand share: how a program finds its sibling, its routing entry and its window.

Without routing (``slots_ptr`` and what goes with it are None) one adapter, known to the host, serves every row.
"""

import triton
import triton.language as tl


@triton.jit
def pick(sibling, VALUES: tl.constexpr, DTYPE: tl.constexpr = tl.int64):
    """``VALUES[sibling]`` for a sibling known only at run time."""
    value = tl.cast(VALUES[0], DTYPE)
    for i in tl.static_range(1, len(VALUES)):
        value = tl.where(sibling == i, tl.cast(VALUES[i], DTYPE), value)
    return value


@triton.jit
def pick_ptr(sibling, ptr0, ptr1, ptr2, ptr3, SIBLINGS: tl.constexpr):
    """The pointer of a sibling; those past ``SIBLINGS`` are None."""
    ptr = ptr0
    if SIBLINGS > 1:
        ptr = tl.where(sibling == 1, ptr1, ptr)
    if SIBLINGS > 2:
        ptr = tl.where(sibling == 2, ptr2, ptr)
    if SIBLINGS > 3:
        ptr = tl.where(sibling == 3, ptr3, ptr)
    return ptr


@triton.jit
def entry_of(token, row_tokens, rows, count_ptr):
    """The routing entry of a token: rows repeated by beams follow the row that they came from."""
    if count_ptr is None:
        entry = token * 0
    else:
        entry = ((token // row_tokens).to(tl.int64) * tl.load(count_ptr) // rows).to(tl.int32)
    return entry


@triton.jit
def window_of(
    entry, pair, pairs, sibling, slots_ptr, windows_ptr, FIRST_SIBLING: tl.constexpr, WINDOW_STRIDE: tl.constexpr,
    RANKS: tl.constexpr, BIAS_ROWS: tl.constexpr,
):  # fmt: skip
    """(first row, rank, bias row) of an entry's adapter at a sibling; rank 0 on the base model, bias row -1 if none."""
    if slots_ptr is None:
        start = tl.cast(0, tl.int64)
        rank = pick(sibling, RANKS, tl.int32)
        bias_row = pick(sibling, BIAS_ROWS)
    else:
        slot = tl.load(slots_ptr + entry * pairs + pair)
        window_ptr = windows_ptr + slot * WINDOW_STRIDE + (FIRST_SIBLING + sibling) * 3
        start = tl.load(window_ptr, mask=slot >= 0, other=0).to(tl.int64)
        rank = tl.load(window_ptr + 1, mask=slot >= 0, other=0).to(tl.int32)
        bias_row = tl.load(window_ptr + 2, mask=slot >= 0, other=-1).to(tl.int64)
    return start, rank, bias_row
