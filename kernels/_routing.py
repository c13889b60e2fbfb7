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
def row_of(tile, row_tokens, BLOCK_M: tl.constexpr, SPANS: tl.constexpr):
    """The row of the batch that a tile belongs to, 0 where a tile may span rows."""
    if SPANS:
        row = tile * 0
    else:
        row = tile // tl.cdiv(row_tokens, BLOCK_M)
    return row


@triton.jit
def first_token(tile, row, row_tokens, BLOCK_M: tl.constexpr, SPANS: tl.constexpr):
    """The first token of a tile: of all tokens where a tile may span rows of the batch, else of those of its row."""
    if SPANS:
        first = tile * BLOCK_M
    else:
        first = row * row_tokens + tile % tl.cdiv(row_tokens, BLOCK_M) * BLOCK_M
    return first


@triton.jit
def last_token(first, row, tokens, row_tokens, BLOCK_M: tl.constexpr, SPANS: tl.constexpr):
    """The last token of a tile."""
    end = tokens if SPANS else (row + 1) * row_tokens
    return tl.minimum(first + BLOCK_M, end) - 1


@triton.jit
def entry_of(row, rows, count_ptr):
    """The routing entry of a row of the batch: rows repeated by beams follow the row that they came from."""
    if count_ptr is None:
        entry = row * 0
    else:
        entry = (row.to(tl.int64) * tl.load(count_ptr) // rows).to(tl.int32)
    return entry


@triton.jit
def pairs_of(entry, pairs, slots_ptr, PAIRS: tl.constexpr):
    """How many adapters a routing entry has; they fill its pairs from the left. Without routing 1."""
    if slots_ptr is None:
        count = pairs
    else:
        pair = tl.arange(0, PAIRS)
        slots = tl.load(slots_ptr + entry * pairs + pair, mask=pair < pairs, other=-1)
        count = tl.sum((slots >= 0).to(tl.int32), axis=0)
    return count


@triton.jit
def high_part(value, DOT: tl.constexpr):
    """The first 8 bits of float32 numbers' significands, as bfloat16; in ``DOT`` for a dot to take."""
    return value.to(tl.bfloat16).to(DOT)


@triton.jit
def low_part(value, DOT: tl.constexpr):
    """The next 8 bits: both parts together are ``value`` to 2^-17."""
    return (value - value.to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16).to(DOT)
