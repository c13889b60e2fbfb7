"""What the shrink and the expand share: values by sibling, and the routing entry of a token.

Nothing here may return what was loaded from memory and then reaches the address of a store: Inductor asks which
arguments a kernel writes, follows a store's address back through such a call into the call's pointers, and takes the
tables for written. It then hands each kernel a copy, and the copies were wrong (seen on an H100, torch 2.11).
"""

import triton
import triton.language as tl


@triton.jit
def pick(sibling, VALUES: tl.constexpr, DTYPE: tl.constexpr = tl.int64):
    """``VALUES[sibling]`` for siblings known only at run time."""
    value = tl.cast(VALUES[0], DTYPE)
    for i in tl.static_range(1, len(VALUES)):
        value = tl.where(sibling == i, tl.cast(VALUES[i], DTYPE), value)
    return value


@triton.jit
def pick_ptr(sibling, ptr0, ptr1, ptr2, ptr3, SIBLINGS: tl.constexpr):
    """The pointer of each sibling; those past ``SIBLINGS`` are None."""
    ptr = ptr0
    if SIBLINGS > 1:
        ptr = tl.where(sibling == 1, ptr1, ptr)
    if SIBLINGS > 2:
        ptr = tl.where(sibling == 2, ptr2, ptr)
    if SIBLINGS > 3:
        ptr = tl.where(sibling == 3, ptr3, ptr)
    return ptr


@triton.jit
def first_token(tile, row_tokens, BLOCK_M: tl.constexpr, SPANS: tl.constexpr):
    """The first token of a tile. Unless a tile may span rows of the batch, every row begins a new one."""
    if SPANS:
        first = tile * BLOCK_M
    else:
        tiles = tl.cdiv(row_tokens, BLOCK_M)
        first = (tile // tiles) * row_tokens + (tile % tiles) * BLOCK_M
    return first


@triton.jit
def last_token(first, tokens, row_tokens, BLOCK_M: tl.constexpr, SPANS: tl.constexpr):
    """The last token of a tile."""
    if SPANS:
        end = tokens
    else:
        end = (first // row_tokens + 1) * row_tokens
    return tl.minimum(first + BLOCK_M, end) - 1


@triton.jit
def entry_of(token, row_tokens, rows, count_ptr):
    """The routing entry of a token: rows repeated by beams follow the row that they came from."""
    if count_ptr is None:
        entry = token * 0
    else:
        entry = ((token // row_tokens).to(tl.int64) * tl.load(count_ptr) // rows).to(tl.int32)
    return entry
