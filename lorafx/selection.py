"""What a user says about which adapter to use, in one normal form."""

from __future__ import annotations

from collections.abc import KeysView, Mapping, Sequence
from typing import Union

from lorafx.errors import AdapterMismatchError

BASE = "__base__"  # PEFT's name for the base model in a list of adapter names

Row = tuple[tuple[str, float], ...]  # (adapter name, weight), none for the base model
Selection = tuple[Row, ...]  # one row for the whole batch, or one for each row of it
Choice = Union[str, None, Mapping[str, float], Sequence[str | None | Mapping[str, float]]]

NOTHING: Selection = ((),)


def normalize(choice: Choice) -> Selection:
    """``"sql"``, ``None``, ``{"sql": .7, "json": .3}``, or a list of these, one per row of the batch.

    AdapterMismatchError: anything else, an empty list
    """
    if choice is None or isinstance(choice, (str, Mapping)):
        return (_row(choice),)
    if isinstance(choice, Sequence):
        if not choice:
            raise AdapterMismatchError("got an empty list of adapter names; expected one for each row of the batch")
        try:  # a batch of many rows names few: equal items become one object
            rows = {item: _row(item) for item in {*choice}}
        except TypeError:  # a dict among them
            return tuple(_row(item) for item in choice)
        return tuple(map(rows.__getitem__, choice))
    raise AdapterMismatchError(
        f"got {type(choice).__name__} for an adapter; expected a name, None, a dict name -> weight, or a list of these"
    )


def _row(item: object) -> Row:
    if item is None or item == BASE:
        return ()
    if isinstance(item, str):
        return ((item, 1.0),)
    if isinstance(item, Mapping) and all(isinstance(k, str) and isinstance(v, (int, float)) for k, v in item.items()):
        return tuple((name, float(weight)) for name, weight in item.items() if name != BASE)
    raise AdapterMismatchError(f"got {item!r} for a row's adapter; expected a name, None or a dict name -> weight")


def names_in(selection: Selection) -> KeysView[str]:
    """Each once, in the order in which they are named."""
    return dict.fromkeys([name for row in dict.fromkeys(selection) for name, _ in row]).keys()
