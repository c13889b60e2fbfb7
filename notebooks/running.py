"""Runs notebooks from a clean kernel, and says what is wrong with outputs that are to be committed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
MAX_BYTES = 300_000  # of a file: what a page of GitHub shows at once
TIME_LIMIT = 600  # seconds for a cell
# Home and scratch folders, wherever a notebook was run; matched at the start of a path only.
MACHINE_PATH = re.compile(r"""(?<![\w.~/-])/(?:root|home|tmp|work|Users|mnt|opt|usr)/[^\s"'<>\\]*""")


def notebooks() -> list[Path]:
    """All of them, in the order in which they are to be read."""
    return sorted(FOLDER.glob("*.ipynb"))


def execute(path: Path) -> NotebookNode:
    """A copy with fresh outputs, from a kernel of its own that starts in the notebook's folder.

    nbclient.exceptions.CellExecutionError: a cell raised
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(
        notebook,
        timeout=TIME_LIMIT,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if svg := output.get("data", {}).get("image/svg+xml"):
                output.data["image/svg+xml"] = _smaller(svg)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},  # without the version of whoever ran it last
    }
    return notebook


def _smaller(svg: str) -> str:
    """No line for each number, and no more digits in a path than can be seen."""
    one_line = re.sub(r"\s*\n\s*", " ", svg)
    return re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), one_line)


def problems(notebook: NotebookNode) -> list[str]:
    """What keeps this notebook, outputs included, from being committed; nothing if it may be."""
    found = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("not run from the first cell to the last in a clean kernel")
    if not any(cell.outputs for cell in code):
        found.append("no outputs")
    for number, cell in enumerate(code, 1):
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"cell {number} raised {output.ename}")
            elif output.output_type == "stream" and output.name == "stderr":
                found.append(f"cell {number} wrote to stderr: {output.text[:80]!r}")
            if "Traceback (most recent call last)" in str(output):
                found.append(f"cell {number} shows a traceback")
        for text in (cell.source, *(_texts(output) for output in cell.outputs)):
            found += [f"cell {number} names a path of a machine: {path}" for path in MACHINE_PATH.findall(text)]
    if (size := len(nbformat.writes(notebook).encode())) > MAX_BYTES:
        found.append(f"{size:,} bytes, at most {MAX_BYTES:,} are wanted")
    return found


def _texts(output: NotebookNode) -> str:
    """What can be read in an output: not the pixels of its pictures."""
    kept = {kind: data for kind, data in output.get("data", {}).items() if not kind.startswith("image/png")}
    return output.get("text", "") + "\n".join(v if isinstance(v, str) else json.dumps(v) for v in kept.values())
