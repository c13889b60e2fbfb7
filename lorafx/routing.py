"""Which adapters each row of a batch uses: small tensors that belong to one call and that the fused ops read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy
import torch
from torch import Tensor

from lorafx.errors import CapacityError
from lorafx.selection import Row, Selection

MAX_ROWS = 256  # rows of one batch that name their adapters one by one
MAX_PAIRS = 4  # adapters on one row
EVERYWHERE = 2**31 - 1  # more positions than any row has
ROUTINGS_KEPT = 64  # made routings, by selection: 8 KiB each
ROWS_KEPT = 1024  # what different rows are made of: rows have weights, so there may be any number of them

Pairs = tuple[tuple[int, float], ...]  # (slot, weight) of each adapter of a row
Last = tuple[int, ...] | None  # see Routing
Entry = tuple[Pairs, bytes, bytes]  # a row: its pairs, and its part of a routing's slots and of its weights


@dataclass(frozen=True)
class Routing:
    """Immutable, so calls and threads may share one.

    slots ``[MAX_ROWS, MAX_PAIRS]`` int32, -1: none; weights, the same shape, float32; count ``[]`` int64: rows that
    are filled. Row i of a tensor with n rows takes entry ``i * count // n``, which repeats entries for beams. Shapes
    never change, so nothing compiled depends on them.

    last ``[MAX_ROWS]`` int64: how many of the last positions of a row its adapter has, EVERYWHERE where it begins with
    the row; None where no adapter of the bank is of another kind
    """

    slots: Tensor
    weights: Tensor
    count: Tensor
    rows: tuple[Pairs, ...]
    last: Tensor | None = None

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """What graphs read, in their order."""
        return (self.slots, self.weights, self.count) + (() if self.last is None else (self.last,))

    @property
    def idle(self) -> bool:
        """No row uses an adapter."""
        return not any(self.rows)


def make_routing(rows: Sequence[Pairs], device: torch.device, last: Sequence[int] | None = None) -> Routing:
    """``rows``: for each row its (slot, weight) pairs, none for the base model; ``last``: of each row, see Routing.

    CapacityError: more rows or more adapters on a row than fit
    """
    return _joined([_entry(pairs) for pairs in rows], device, last)


class Routings:
    """The routings of one bank. A new list of names comes with every batch, but its rows were seen before: what a row
    is made of is kept, so a list costs one look-up for each row.

    What is kept holds for one state of the bank's names: ``forget`` it when they change. Threads may share this.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._made: dict[tuple[Selection, Last], Routing] = {}
        self._entries: dict[Row, Entry] = {}

    def kept(self, selection: Selection, last: Last = None) -> Routing | None:
        return self._made.get((selection, last))

    def make(self, selection: Selection, slots: Mapping[str, int], device: torch.device, last: Last = None) -> Routing:
        """``slots``: by name; ``last``: as of ``make_routing``.

        KeyError: a name that has no slot; CapacityError as ``make_routing``
        """
        entries = self._entries if len(self._entries) < ROWS_KEPT else {}
        try:
            rows = list(map(entries.__getitem__, selection))
        except KeyError:
            for row in dict.fromkeys(selection):
                if row not in entries:
                    entries[row] = _entry(tuple([(slots[name], weight) for name, weight in row]))
            rows = list(map(entries.__getitem__, selection))
        routing = _joined(rows, device, last)
        made = self._made if len(self._made) < ROUTINGS_KEPT else {}
        made[selection, last] = routing
        self._entries, self._made = entries, made
        return routing


def _entry(pairs: Pairs) -> Entry:
    if len(pairs) > MAX_PAIRS:
        raise CapacityError(
            f"{len(pairs)} adapters on one row, at most {MAX_PAIRS} can be weighted together. PEFT's"
            " add_weighted_adapter makes one adapter of many."
        )
    slots = numpy.full(MAX_PAIRS, -1, dtype=numpy.int32)
    weights = numpy.zeros(MAX_PAIRS, dtype=numpy.float32)
    for i, (slot, weight) in enumerate(pairs):
        slots[i], weights[i] = slot, weight
    return pairs, slots.tobytes(), weights.tobytes()


def _joined(entries: Sequence[Entry], device: torch.device, last: Sequence[int] | None) -> Routing:
    if len(entries) > MAX_ROWS:
        raise CapacityError(
            f"{len(entries)} rows name their adapters, at most {MAX_ROWS} can. Split the batch, or give one name for"
            " it."
        )
    rows, slots, weights = zip(*entries, strict=True) if entries else ((), (), ())
    # bytes and NumPy, since torch's own constructors take several times as long; -1 is bytes of ones
    arrays = [
        numpy.ndarray((MAX_ROWS, MAX_PAIRS), numpy.int32, _filled(slots, b"\xff")),
        numpy.ndarray((MAX_ROWS, MAX_PAIRS), numpy.float32, _filled(weights, b"\0")),
        numpy.array(len(entries), dtype=numpy.int64),
    ]
    if last is not None:
        arrays.append(numpy.full(MAX_ROWS, EVERYWHERE, dtype=numpy.int64))
        arrays[-1][: len(last)] = last
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type != "cpu":
        tensors = [tensor.to(device) for tensor in tensors]
    return Routing(*tensors[:3], tuple(rows), *tensors[3:])


def _filled(parts: Sequence[bytes], fill: bytes) -> bytearray:
    """Four bytes for each pair of each row, in memory that may be written."""
    return bytearray(b"".join(parts).ljust(MAX_ROWS * MAX_PAIRS * 4, fill))
