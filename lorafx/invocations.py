"""Where in each row of a call an aLoRA adapter begins: at its invocation tokens, as PEFT looks for them.

PEFT (``calculate_alora_offsets`` in ``peft/tuners/lora/variants.py``) takes the last place at which all of them stand,
counts from there to the end of the row, and keeps that number through all of ``generate``: a token decoded later is
its row's last position, so it is behind that place. A row without them gets the base model.

That holds where a forward has the whole prompt, and then one token behind a cache. In chunks of a prompt, without a
cache and in prompt lookup, the number counts from the end of whatever the forward has: PEFT's results, but not those of
the run in one piece.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from lorafx.config_fields import show
from lorafx.errors import AdapterMismatchError, CapacityError
from lorafx.routing import EVERYWHERE, MAX_ROWS
from lorafx.selection import Selection

Tokens = tuple[int, ...]
NONE = 0  # of the row's positions


class Prompt:
    """What a call, or a generate with all its forwards, begins with.

    ids: ``[rows, tokens]``, or None where the call has none; offsets: ``alora_offsets`` as ``read_offsets`` takes
    them, an empty list where all is off; None: they are looked for in ``ids``
    """

    def __init__(self, ids: Tensor | None = None, offsets: Any = None) -> None:
        self.ids, self.offsets = ids, None if offsets is None else read_offsets(offsets)
        self._read: numpy.ndarray | None = None
        self._found: dict[tuple[int, Tokens], int] = {}

    @classmethod
    def of_call(
        cls, args: Sequence[Any], kwargs: Mapping[str, Any], offsets: Any = None, rows: int | None = None
    ) -> Prompt:
        """Of these arguments of the model, or of its generate.

        AdapterMismatchError: ``offsets`` are not one for each of ``rows`` rows
        """
        if offsets is not None:
            offsets = read_offsets(offsets, rows)
        candidates = [kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1]]
        ids = next((value for value in candidates if _are_ids(value)), None)
        return cls(ids[None] if ids is not None and ids.dim() == 1 else ids, offsets)

    def last(self, row: int, rows: int, tokens: Tokens) -> int:
        """How many of the last positions of row ``row`` of ``rows`` an adapter with these invocation tokens has; rows
        that generate repeats for beams follow each other."""
        if self.offsets is not None:
            offset = self.offsets[row * len(self.offsets) // rows] if len(self.offsets) else None
            return NONE if offset is None else max(NONE, offset)
        if self.ids is None:
            return NONE
        if self._read is None:
            self._read = self.ids.detach().cpu().numpy()
        key = row * len(self._read) // rows, tokens
        if key not in self._found:
            self._found[key] = offset_in(self._read[key[0]], tokens)
        return self._found[key]


def read_offsets(offsets: Any, rows: int | None = None) -> list[int | None]:
    """PEFT's ``alora_offsets``, a list, tensor or array: of each row how many of its last positions have the adapter,
    None where it is off.

    AdapterMismatchError: not one whole number, or None, for each of ``rows`` rows (None: of any number of rows)
    """
    values = offsets.tolist() if isinstance(offsets, (Tensor, numpy.ndarray)) else offsets
    try:
        if not isinstance(values, (list, tuple)) or any(isinstance(one, bool) for one in values):
            raise TypeError
        read = [None if one is None else operator.index(one) for one in values]
    except TypeError:
        read = None
    if read is None or (rows is not None and len(read) != rows):
        raise AdapterMismatchError(
            f"got alora_offsets={show(offsets)} for a batch of {'some' if rows is None else rows} rows; expected one"
            " whole number for each row, how many of its last positions the adapter has, or None for none of them"
        )
    return read


def offset_in(ids: numpy.ndarray, tokens: Tokens) -> int:
    """How far before the end of ``ids`` the last of all places begins at which ``tokens`` stand; 0: there is none."""
    places = len(ids) - len(tokens) + 1
    if places < 1:
        return NONE
    matches = numpy.ones(places, dtype=bool)
    for i, token in enumerate(tokens):
        matches &= ids[i : i + places] == token
    found = numpy.flatnonzero(matches)
    return len(ids) - int(found[-1]) if len(found) else NONE


def row_by_row(
    selection: Selection, rows: int, tokens: Mapping[str, Tokens], prompt: Prompt
) -> tuple[Selection, tuple[int, ...]]:
    """``selection`` with one entry for each of ``rows`` rows of a batch, and of each how many last positions have it.

    tokens: of the aLoRA adapters, by name. CapacityError: more rows than can differ
    """
    if rows > MAX_ROWS:
        raise CapacityError(
            f"an aLoRA adapter begins at a place of its own in each of {rows} rows, at most {MAX_ROWS} can differ."
            " Split the batch."
        )
    chosen = tuple(selection[row * len(selection) // rows] for row in range(rows))
    named = [row[0][0] if row else None for row in chosen]
    places = (prompt.last(i, rows, tokens[name]) if name in tokens else EVERYWHERE for i, name in enumerate(named))
    return chosen, tuple(places)


def _are_ids(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dim() in (1, 2)
        and value.numel() > 0
        and value.dtype in (torch.int64, torch.int32)
    )
