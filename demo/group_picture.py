"""Draws docs/group.svg: one group's weights as the bank holds them. Called by ``python -m demo.picture``."""

from __future__ import annotations

from pathlib import Path

TARGET = Path(__file__).parent.parent / "docs" / "group.svg"
CELL = 16  # pixels
WIDTHS = {"q": 8, "k": 4, "v": 4}
HIDDEN = 8
ROWS = {"q": ["sql"] * 2 + ["json"] * 3, "k": ["json"] * 2, "v": ["sql"] * 1}  # whose each rank row is
FILLS = {"sql": "#f9cfae", "json": "#bfe3bf"}


def draw() -> str:
    """SVG source: A's rank rows on top of each other, B's blocks on a diagonal whose other places don't exist."""
    parts = [
        _text(16, 24, "x"),
        _rect(40, 10, HIDDEN, 1, "#eeeeee"),
        _text(16, 60, "A: all rank rows, one matrix"),
    ]
    top, left = 76, 40
    b_left = left + HIDDEN * CELL + 150
    parts.append(_text(b_left, 60, "B: one block for each layer; beside them nothing is stored"))
    column, row = 0, 0
    total = sum(map(len, ROWS.values()))
    for layer, owners in ROWS.items():
        parts.append(_text(16, top + row * CELL + 12, layer))
        for owner in owners:
            parts.append(_rect(left, top + row * CELL, HIDDEN, 1, FILLS[owner]))
            parts.append(_rect(left + HIDDEN * CELL + 40, top + row * CELL, 1, 1, FILLS[owner]))
            parts.append(_rect(b_left + column * CELL, top + row * CELL, WIDTHS[layer], 1, FILLS[owner]))
            row += 1
        parts.append(_text(b_left + column * CELL, top + total * CELL + 20, f"{layer}: {WIDTHS[layer]} wide"))
        column += WIDTHS[layer]
    width, height = sum(WIDTHS.values()) * CELL, total * CELL
    parts.append(_frame(b_left, top, width, height))
    parts.append(_text(left + HIDDEN * CELL + 8, top + height / 2 + 4, "x Aᵀ"))
    parts.append(_text(left + HIDDEN * CELL + 44, 60, "s"))
    legend = top + height + 52
    for at, (name, fill) in enumerate(FILLS.items()):
        parts += [_rect(16 + at * 250, legend - 12, 1, 1, fill), _text(40 + at * 250, legend, _ranks(name))]
    size = f'width="{b_left + width + 100:.0f}" height="{legend + 16:.0f}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
            '<rect width="100%" height="100%" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _ranks(name: str) -> str:
    ranks = {layer: owners.count(name) for layer, owners in ROWS.items()}
    return f"{name}: " + ", ".join(f"rank {rank} in {layer}" for layer, rank in ranks.items() if rank)


def _rect(x: float, y: float, columns: int, rows: int, fill: str) -> str:
    size = f'width="{columns * CELL}" height="{rows * CELL}"'
    return f'<rect x="{x:.0f}" y="{y:.0f}" {size} fill="{fill}" stroke="#888888" stroke-width="0.7"/>'


def _frame(x: float, y: float, width: float, height: float) -> str:
    dashes = 'fill="none" stroke="#aaaaaa" stroke-dasharray="3 3"'
    return f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}" {dashes}/>'


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="12" font-family="sans-serif" fill="#222222">{text}</text>'


def main() -> None:
    TARGET.write_text(draw(), encoding="utf-8")
    print(TARGET)
