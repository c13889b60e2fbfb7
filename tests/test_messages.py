"""docs/troubleshooting.md quotes what the sources say, and leaves no message out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import lorafx

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = sorted(path for folder in ("lorafx", "passes", "kernels") for path in (ROOT / folder).glob("*.py"))
QUOTES = re.findall(r"^\| `(.+?)` \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
SPEAKERS = {name for name in lorafx.__all__ if name.endswith("Error")} | {"warn", "warn_once", "warning"}
HOLE = "\0"  # where the source puts a value


def text_of(node: ast.expr) -> str | None:
    """A literal text, with ``HOLE`` for each value in it; None if it is something else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sd]", HOLE, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or HOLE for part in node.values)
    return None


@cache
def literals() -> tuple[str, ...]:
    """Every literal text in the sources but docstrings."""
    found = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found += [text for node in ast.walk(tree) if id(node) not in docs and (text := text_of(node))]
    return tuple(found)


def messages() -> Iterator[tuple[str, str]]:
    """(where, text) of each error of ours and each warning whose text stands where it is made."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args:
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                if name in SPEAKERS and (text := text_of(node.args[0])):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def quotes(quote: str, text: str) -> bool:
    """Whether ``text`` holds the parts of ``quote`` between its ``...``, in order."""
    at = 0
    for part in filter(None, (part.strip() for part in quote.split("..."))):
        at = text.find(part, at) + len(part)
        if at < len(part):
            return False
    return True


@pytest.mark.parametrize("quote", QUOTES)
def test_what_is_quoted_stands_in_the_sources(quote: str) -> None:
    assert len(quote.replace("...", "").strip()) >= 12 or quote == "is not fused yet", "too short to tell anything"
    assert any(quotes(quote, text) for text in literals()), f"no message says {quote!r}"


def test_no_message_is_left_out() -> None:
    all_messages = list(messages())
    assert len(all_messages) > 80
    missing = [f"{where}: {text}" for where, text in all_messages if not any(quotes(q, text) for q in QUOTES)]
    assert not missing, "docs/troubleshooting.md lacks\n" + "\n".join(missing).replace(HOLE, "...")
