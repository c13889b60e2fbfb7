"""Draws boxes and arrows as SVG without any program, by the method of Sugiyama, Tagawa and Toda (1981): rows by the
longest way from the top, a point in each row that an arrow passes, and in each row the order of what is read."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from lorafx.passes.record import Box

CHARACTER, LINE, PAD = 6.7, 14, 8  # pixels: width of a letter at 11 pt, height of a line, around a text
GAP_X, GAP_Y, MARGIN, TITLE = 16, 26, 16, 26
SWEEPS = 4  # up and down over the rows; more change nothing that can be seen


def svg_of(sides: Sequence[Sequence[Box]], titles: Sequence[str], fills: Mapping[str, str]) -> str:
    """One SVG picture, ``sides`` next to each other, each under its title, on white. fills: colours by kind of box"""
    parts: list[str] = []
    left, height = float(MARGIN), 0.0
    for boxes, title in zip(sides, titles, strict=True):
        layout = _Layout(boxes)
        parts.append(f'<g transform="translate({left:.1f},{MARGIN})">')
        parts.append(f'<text x="0" y="12" font-size="12" fill="#222222">{escape(title)}</text>')
        parts += [f'<g transform="translate(0,{TITLE})">', *layout.arrows(), *layout.boxes(fills), "</g></g>"]
        left += max(layout.width, len(title) * CHARACTER) + 2 * MARGIN
        height = max(height, layout.height)
    width, height = left - MARGIN, height + TITLE + 2 * MARGIN
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}"'
        f' viewBox="0 0 {width:.0f} {height:.0f}" font-family="Helvetica, Arial, sans-serif">'
    )
    arrowhead = (
        '<defs><marker id="lorafx-arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6"'
        ' orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#555555"/></marker></defs>'
    )
    return "\n".join([head, arrowhead, '<rect width="100%" height="100%" fill="#ffffff"/>', *parts, "</svg>"])


@dataclass(eq=False)
class _Item:
    """A box (``box`` not None), or the point where an arrow crosses a row."""

    row: int
    width: float
    height: float
    box: Box | None = None
    above: list[_Item] = field(default_factory=list)
    below: list[_Item] = field(default_factory=list)
    x: float = 0.0  # of the middle
    y: float = 0.0  # of the top

    def wish(self, neighbours: list[_Item]) -> float:
        return sum(other.x for other in neighbours) / len(neighbours) if neighbours else self.x


class _Layout:
    def __init__(self, boxes: Sequence[Box]) -> None:
        self.items: list[_Item] = []  # of the boxes, in their order
        self.ways: list[list[_Item]] = []  # of the arrows, from box to box
        self.rows: list[list[_Item]] = []
        for box in boxes:
            lines = box.label.split("\n")
            row = 1 + max((self.items[i].row for i in box.inputs), default=-1)
            size = max(map(len, lines)) * CHARACTER + 2 * PAD, len(lines) * LINE + PAD
            item = self._put(_Item(row, *size, box))
            self.items.append(item)
            for i in box.inputs:
                self._connect(self.items[i], item)
        self._arrange()
        middles = [item for row in self.rows for item in row]
        shift = min((item.x - item.width / 2 for item in middles), default=0.0)
        for item in middles:
            item.x -= shift
        self.width = max((item.x + item.width / 2 for item in middles), default=0.0)
        self.height = 0.0
        for row in self.rows:
            tallest = max(item.height for item in row)
            for item in row:
                item.y = self.height
                item.height = item.height if item.box else tallest  # past the whole row
            self.height += tallest + GAP_Y
        self.height = max(self.height - GAP_Y, 0.0)

    def _put(self, item: _Item) -> _Item:
        self.rows += [[] for _ in range(item.row + 1 - len(self.rows))]
        self.rows[item.row].append(item)
        return item

    def _connect(self, start: _Item, end: _Item) -> None:
        way = [start, *(self._put(_Item(row, 0, 0)) for row in range(start.row + 1, end.row)), end]
        for upper, lower in itertools.pairwise(way):
            upper.below.append(lower)
            lower.above.append(upper)
        self.ways.append(way)

    def _arrange(self) -> None:
        for row in self.rows:
            _spread(row, [0.0] * len(row))
        for _ in range(SWEEPS):
            for row in self.rows[1:]:
                row.sort(key=lambda item: item.wish(item.above))
                _spread(row, [item.wish(item.above) for item in row])
            for row in self.rows[-2::-1]:
                _spread(row, [item.wish(item.below) for item in row])

    def arrows(self) -> list[str]:
        return [_arrow(way) for way in self.ways]

    def boxes(self, fills: Mapping[str, str]) -> list[str]:
        return [_drawn(item, fills[item.box.kind]) for item in self.items]


def _spread(row: list[_Item], wishes: list[float]) -> None:
    """Each where it wishes to be, as far as the order of the row and the widths let it; the rest is shared evenly."""
    edge = float("-inf")
    for item, wish in zip(row, wishes, strict=True):
        item.x = max(wish, edge + item.width / 2)
        edge = item.x + item.width / 2 + GAP_X
    moved = sum(item.x - wish for item, wish in zip(row, wishes, strict=True)) / len(row)
    for item in row:
        item.x -= moved


def _arrow(way: list[_Item]) -> str:
    """A curve from row to row, upright where it passes one."""
    x, y = way[0].x, way[0].y + way[0].height
    path = [f"M{x:.1f},{y:.1f}"]
    for item in way[1:]:
        bend = (item.y - y) / 2
        path.append(f"C{x:.1f},{y + bend:.1f} {item.x:.1f},{item.y - bend:.1f} {item.x:.1f},{item.y:.1f}")
        x, y = item.x, item.y + item.height
        if item is not way[-1]:
            path.append(f"V{y:.1f}")
    return f'<path d="{" ".join(path)}" fill="none" stroke="#555555" marker-end="url(#lorafx-arrow)"/>'


def _drawn(item: _Item, fill: str) -> str:
    lines = item.box.label.split("\n")
    first = item.y + item.height / 2 - (len(lines) - 1) * LINE / 2 + 4
    texts = "".join(
        f'<text x="{item.x:.1f}" y="{first + i * LINE:.1f}" text-anchor="middle" font-size="11"'
        f' fill="#222222">{escape(line)}</text>'
        for i, line in enumerate(lines)
    )
    rect = (
        f'<rect x="{item.x - item.width / 2:.1f}" y="{item.y:.1f}" width="{item.width:.1f}"'
        f' height="{item.height:.1f}" rx="5" fill="{fill}" stroke="#888888"/>'
    )
    return rect + texts
