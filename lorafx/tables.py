"""Small tables, as text and as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Columns padded to their widest entry; numbers with thousands separated, to the right."""
    if not rows:
        return ""
    cells = [{key: _text(value) for key, value in row.items()} for row in rows]
    widths = {key: max(len(key), *(len(row[key]) for row in cells)) for key in cells[0]}
    numbers = {key for key, value in rows[0].items() if _is_number(value)}

    def line(cell: Mapping[str, str]) -> str:
        padded = (cell[key].rjust(w) if key in numbers else cell[key].ljust(w) for key, w in widths.items())
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, [{key: key for key in widths}, *cells]))


def html_table(rows: Sequence[dict[str, Any]]) -> str:
    """The same as a table of HTML, every text escaped; its colours are the page's."""
    if not rows:
        return "<p>nothing</p>"
    sides = {key: "right" if _is_number(value) else "left" for key, value in rows[0].items()}
    style = {key: f"text-align:{side};padding:2px 8px" for key, side in sides.items()}
    head = "".join(f"<th style='{style[key]}'>{escape(key)}</th>" for key in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td style='{style[key]}'>{escape(_text(v))}</td>" for key, v in row.items()) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
