"""Shows this project's docstrings as they are meant: lines of ``name: what it is`` as a list, indented code as code."""

from __future__ import annotations

import re
import textwrap

import griffe

ITEM = re.compile(r"(\w+(?:, \w+)*): (.*)")


def as_markdown(text: str) -> str:
    """Every paragraph that begins with ``name: ...`` as a list, one item for each such line."""
    return "\n\n".join(_paragraph(part) for part in re.split(r"\n\s*\n", text))


def _paragraph(text: str) -> str:
    if all(line.startswith("    ") for line in text.split("\n")):  # code; left indented, it would join a list above it
        return f"```python\n{textwrap.dedent(text)}\n```"
    lines = text.split("\n")
    if not ITEM.match(lines[0]):
        return text
    items: list[str] = []
    for line in lines:
        if found := ITEM.match(line):
            names = ", ".join(f"`{name}`" for name in found[1].split(", "))
            items.append(f"- {names}: {found[2]}")
        else:
            items[-1] += f" {line.strip()}"
    return "\n".join(items)


class Lists(griffe.Extension):
    """What mkdocstrings calls for each object of the package."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
