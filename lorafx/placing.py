"""Which rank rows of each site an adapter gets. Pure: nothing is written here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorafx.adapters import SiteShape
from lorafx.passes.context import SiteGeometry


@dataclass(frozen=True)
class Window:
    """The rows of one adapter at one site: ``start .. start + rank`` of A and B, and the row of B with its bias."""

    start: int
    rank: int
    bias_row: int = -1


Taken = Sequence[Mapping[str, Window]]  # by slot, by site


@dataclass(frozen=True)
class Room:
    """windows: the adapter's rows at each of its sites

    moved: by site and slot, where rows of other adapters have to go first: enough rows are free, but not in one piece
    """

    windows: dict[str, Window] = field(default_factory=dict)
    moved: dict[str, dict[int, Window]] = field(default_factory=dict)


def find_room(
    geometry: Mapping[str, SiteGeometry], taken: Taken, shapes: Mapping[str, SiteShape], instead_of: int | None = None
) -> Room | None:
    """Rows for an adapter of these shapes, as if slot ``instead_of`` were empty; None if some site has too few left."""
    room = Room()
    for path, shape in shapes.items():
        if path not in geometry:
            return None
        others = {slot: held[path] for slot, held in enumerate(taken) if slot != instead_of and path in held}
        site = geometry[path]
        bias_row = _free_bias_row(site, others) if shape.bias else -1
        if bias_row is None or sum(w.rank for w in others.values()) + shape.rank > site.capacity:
            return None
        start = _first_gap(others, shape.rank, site.capacity)
        if start is None:
            room.moved[path], start = _close_up(others)
        room.windows[path] = Window(start, shape.rank, bias_row)
    return room


def _free_bias_row(site: SiteGeometry, others: Mapping[int, Window]) -> int | None:
    used = {window.bias_row for window in others.values()}
    return next((row for row in range(site.capacity, site.lanes) if row not in used), None)


def _first_gap(others: Mapping[int, Window], rank: int, capacity: int) -> int | None:
    start = 0
    for window in sorted(others.values(), key=lambda w: w.start):
        if start + rank <= window.start:
            return start
        start = window.start + window.rank
    return start if start + rank <= capacity else None


def _close_up(others: Mapping[int, Window]) -> tuple[dict[int, Window], int]:
    """(the windows that move, so that all stand next to each other from row 0; the first free row then)"""
    moved, start = {}, 0
    for slot, window in sorted(others.items(), key=lambda item: item[1].start):
        if window.start != start:
            moved[slot] = Window(start, window.rank, window.bias_row)
        start += window.rank
    return moved, start
