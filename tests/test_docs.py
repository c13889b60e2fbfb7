"""The code on every page runs and prints what the page says; links lead somewhere; the site builds strictly."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "demo/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"(?:<!-- needs: (?P<needs>.*?) -->\n+)?```(?P<kind>\w+)[^\n]*\n(?P<text>.*?)```", re.DOTALL)
PRINTED = {  # what a page's code prints somewhere, where no block of text behind it says so
    "README.md": [r"AdapterBank: 2 adapter\(s\)", "0 skipped", r"AdapterStore\n(.*\n)*  misses: 2"],
}
SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """One fenced block of Python. needs: packages without which it is left out; shows: the ``text`` block behind it"""

    code: str
    line: int
    needs: tuple[str, ...]
    shows: str | None


def python_blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    fences = list(FENCE.finditer(text))
    for fence, after in zip_longest(fences, fences[1:]):
        if fence["kind"] == "python":
            output = after is not None and after["kind"] == "text" and not text[fence.end() : after.start()].strip()
            line = text[: fence.start("text")].count("\n")
            needs = tuple((fence["needs"] or "").split(", ")) if fence["needs"] else ()
            yield Block(fence["text"], line, needs, after["text"] if output else None)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if list(python_blocks(p))], ids=lambda page: str(page.relative_to(ROOT))
)
def test_code_runs(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFX_VALIDATE", "0")  # as a reader has it
    names: dict[str, object] = {"__name__": "page"}  # a reader goes from one block to the next
    left_out: list[str] = []
    everything = ""
    for block in python_blocks(page):
        left_out += [name for name in block.needs if find_spec(name) is None]
        if left_out:
            continue
        capsys.readouterr()
        code = re.sub(r"/tmp/lorafx-\w+", str(tmp_path), block.code)
        exec(compile("\n" * block.line + code, str(page), "exec"), names)
        printed = capsys.readouterr().out
        everything += printed
        if block.shows is not None:
            assert doctest.OutputChecker().check_output(block.shows, printed, SAME), f"line {block.line}:\n{printed}"
    for pattern in PRINTED.get(str(page.relative_to(ROOT)), ()):
        assert re.search(pattern, everything)
    if left_out:
        how = "; `make quantised` runs it" if "bitsandbytes" in left_out else ""
        pytest.skip(f"not installed: {', '.join(left_out)}{how}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_point_at_files(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))  # and the page for what is not found
    for page in pages:  # it reads without a network: nothing is fetched from elsewhere
        html = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=[\"']?(https?:[^\"' >]*)", html)
        fetched += re.findall(r"<link[^>]*rel=[\"']?stylesheet[^>]*href=[\"']?(https?:[^\"' >]*)", html)
        assert not fetched, f"{page.name} fetches {fetched}"


def test_documented_names_are_the_public_ones() -> None:
    import lorafx

    shown = set(
        re.findall(
            r"^::: lorafx(?:\.\w+)?\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE
        )
    )
    assert shown == {*lorafx.__all__, "StoreStats"}  # of store.stats


def test_tables_of_what_is_covered_are_those_of_the_tests() -> None:
    from tests.coverage_page import PAGE, written

    page = PAGE.read_text(encoding="utf-8")
    assert written(page) == page, "out of date: python -m tests.coverage_page"
