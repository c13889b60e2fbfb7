"""Which adapters each row of a batch uses: small tensors that belong to one call and that the fused ops read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from lorafx.errors import CapacityError

MAX_ROWS = 256  # rows of one batch that name their adapters one by one
MAX_PAIRS = 4  # adapters on one row

Pairs = tuple[tuple[int, float], ...]  # (slot, weight) of each adapter of a row


@dataclass(frozen=True)
class Routing:
    """Immutable, so calls and threads may share one.

    slots ``[MAX_ROWS, MAX_PAIRS]`` int32, -1: none; weights, the same shape, float32; count ``[]`` int64: rows that
    are filled. Row i of a tensor with n rows takes entry ``i * count // n``, which repeats entries for beams. Shapes
    never change, so nothing compiled depends on them.
    """

    slots: Tensor
    weights: Tensor
    count: Tensor
    rows: tuple[Pairs, ...]

    @property
    def idle(self) -> bool:
        """No row uses an adapter."""
        return not any(self.rows)


def make_routing(rows: Sequence[Pairs], device: torch.device) -> Routing:
    """``rows``: for each row its (slot, weight) pairs, none for the base model.

    CapacityError: more rows or more adapters on a row than fit
    """
    if len(rows) > MAX_ROWS:
        raise CapacityError(
            f"{len(rows)} rows name their adapters, at most {MAX_ROWS} can. Split the batch, or give one name for it."
        )
    most = max(map(len, rows), default=0)
    if most > MAX_PAIRS:
        raise CapacityError(
            f"{most} adapters on one row, at most {MAX_PAIRS} can be weighted together. PEFT's add_weighted_adapter"
            " makes one adapter of many."
        )
    # NumPy, since a new list of names comes with every batch: torch's own constructors take several times as long
    slots = numpy.full((MAX_ROWS, MAX_PAIRS), -1, dtype=numpy.int32)
    weights = numpy.zeros((MAX_ROWS, MAX_PAIRS), dtype=numpy.float32)
    for column in range(most):
        filled = [pairs[column] if len(pairs) > column else (-1, 0.0) for pairs in rows]
        slots[: len(rows), column] = numpy.array([slot for slot, _ in filled], dtype=numpy.int32)
        weights[: len(rows), column] = numpy.array([weight for _, weight in filled], dtype=numpy.float32)
    tensors = [torch.from_numpy(array) for array in (slots, weights, numpy.array(len(rows), dtype=numpy.int64))]
    if device.type != "cpu":
        tensors = [tensor.to(device) for tensor in tensors]
    return Routing(*tensors, tuple(rows))
