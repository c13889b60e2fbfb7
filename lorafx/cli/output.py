"""What goes to the terminal, or into a pipe: no codes there, and no column cut."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDE = 100_000  # columns of a file
TEXT_LIMIT = 200


def console(stderr: bool = False) -> Console:
    """rich takes a pipe for 80 columns wide, and would fold what stands in it."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else WIDE, highlight=False, soft_wrap=False)


def printable(value: Any, limit: int | None = TEXT_LIMIT) -> str:
    """``value`` for a terminal: what a file says may hold control characters, or be very long."""
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}..."
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """One line for each dict, a column for each key; numbers to the right."""
    table = Table(box=box.SIMPLE if sys.stdout.isatty() else None, pad_edge=False)
    for key, value in rows[0].items():
        table.add_column(key, justify="right" if isinstance(value, (int, float)) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(value)) for value in row.values()))
    console().print(table)


def print_lines(*lines: str, style: str = "") -> None:
    for line in lines:
        console().print(Text(printable(line, limit=1000), style=style))


def print_json(value: Any) -> None:
    """Plain ASCII, so that any pipe takes it."""
    print(json.dumps(value, indent=2))
