"""Every notebook runs from a clean kernel, and what is committed of it may be shown."""

from __future__ import annotations

import copy
from pathlib import Path

import nbformat
import pytest

from notebooks.running import MAX_BYTES, execute, notebooks, problems

NOTEBOOKS = notebooks()
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@every
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFX_VALIDATE", "0")  # as a reader has it
    fresh = execute(path)
    assert problems(fresh) == []
    for now, committed in zip(fresh.cells, nbformat.read(path, as_version=4).cells, strict=True):
        assert [kinds(output) for output in now.get("outputs", ())] == [
            kinds(output) for output in committed.get("outputs", ())
        ], f"run `make notebooks`: the outputs of this cell are old:\n{now.source}"


@every
def test_what_is_committed_may_be_shown(path: Path) -> None:
    assert problems(nbformat.read(path, as_version=4)) == []


def test_they_are_read_in_order() -> None:
    assert [path.stem[0] for path in NOTEBOOKS] == ["1", "2", "3", "4", "5"]


def kinds(output: nbformat.NotebookNode) -> tuple[str, ...]:
    return output.output_type, *sorted(output.get("data", ()))


def changed(**fields: object) -> nbformat.NotebookNode:
    """A notebook of one cell that printed "fine", and what is wrong with it."""
    output = nbformat.v4.new_output("stream", name="stdout", text="fine\n")
    cell = nbformat.v4.new_code_cell("print('fine')", execution_count=1, outputs=[output])
    cell.update(fields)
    return nbformat.v4.new_notebook(cells=[cell])


ERROR = nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=["no"])


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({}, None),
        ({"outputs": []}, "no outputs"),
        ({"execution_count": None}, "clean kernel"),
        ({"execution_count": 3}, "clean kernel"),
        ({"outputs": [ERROR]}, "raised ValueError"),
        ({"outputs": [nbformat.v4.new_output("stream", name="stderr", text="a warning")]}, "stderr: 'a warning'"),
        ({"outputs": [nbformat.v4.new_output("stream", text="Traceback (most recent call last):")]}, "a traceback"),
        ({"outputs": [nbformat.v4.new_output("stream", text="saved to /root/x.svg")]}, "/root/x.svg"),
        ({"outputs": [nbformat.v4.new_output("display_data", {"text/html": "<a href='/tmp/made/a'>"})]}, "/tmp/made/a"),
        ({"outputs": [nbformat.v4.new_output("display_data", {"image/svg+xml": "<a>/home/me/a</a>"})]}, "/home/me/a"),
        ({"outputs": [nbformat.v4.new_output("stream", text="see docs/usr/x and https://a.org/opt/x")]}, None),
        ({"source": "open('/home/me/x')"}, "/home/me/x"),
        ({"outputs": [nbformat.v4.new_output("stream", text="x" * MAX_BYTES)]}, "bytes"),
    ],
)
def test_what_must_not_be_committed_is_found(fields: dict, complaint: str | None) -> None:
    found = problems(changed(**copy.deepcopy(fields)))
    assert len(found) == (complaint is not None), found
    assert complaint is None or complaint in found[0]
