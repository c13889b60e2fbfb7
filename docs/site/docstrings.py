"""Shows the docstrings of this project as they are meant: lines of ``name: what it is`` become a list."""

from __future__ import annotations

import re

import griffe

ITEM = re.compile(r"(\w+(?:, \w+)*): (.*)")


def as_markdown(text: str) -> str:
    """Every paragraph that begins with ``name: ...`` as a list, one item for each such line."""
    return "\n\n".join(_paragraph(part) for part in re.split(r"\n\s*\n", text))


def _paragraph(text: str) -> str:
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
