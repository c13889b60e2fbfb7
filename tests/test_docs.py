"""The README's code runs; what the docs show is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_readme_code_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = python_blocks(ROOT / "README.md")
    assert blocks
    names: dict[str, object] = {}  # a reader goes from one to the next
    for block in blocks:
        exec(compile(block.replace("/tmp/lorafx-readme", str(tmp_path)), "README.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "AdapterBank: 2 adapter(s)" in shown
    assert "0 skipped" in shown
    assert re.search(r"AdapterStore\n.*misses: 2", shown, flags=re.DOTALL)


def test_links_point_at_files() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "demo" / "README.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
