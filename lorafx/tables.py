"""Small tables, as text and as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Columns padded to their widest entry; numbers with thousands separated, to the right."""
    if not rows:
        return ""
    cells = [{key: _text(value) for key, value in row.items()} for row in rows]
    widths = {key: max(len(key), *(len(row[key]) for row in cells)) for key in cells[0]}
    lines = ["  ".join(key.ljust(width) for key, width in widths.items()).rstrip()]
    for row, cell in zip(rows, cells, strict=True):
        aligned = (
            cell[key].rjust(width) if isinstance(row[key], (int, float)) else cell[key].ljust(width)
            for key, width in widths.items()
        )
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def html_table(rows: Sequence[dict[str, Any]]) -> str:
    """The same as a table of HTML, every text escaped."""
    if not rows:
        return "<p>nothing</p>"
    head = "".join(f"<th style='text-align:left'>{escape(key)}</th>" for key in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:left'>{escape(_text(v))}</td>" for v in row.values()) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
