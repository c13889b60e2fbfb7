"""A layer before and after, side by side: as Graphviz source, and as SVG by Graphviz or, where it is not installed, by
``layout.py``."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lorafx.errors import LorafxError
from lorafx.layout import svg_of
from lorafx.passes.naming import told_apart
from lorafx.passes.record import Box, FusedGroup, Sketch

FILLS = {"base": "#dbe7f6", "lora": "#f9cfae", "fused": "#bfe3bf", "other": "#eeeeee", "edge": "#ffffff"}
TIME_LIMIT = 60  # seconds that Graphviz may take


def sketch_groups(groups: Sequence[FusedGroup]) -> tuple[Sketch, Sketch] | None:
    """What modules alone tell of the first layer, where no graph was seen yet: its groups, side by side."""
    if not groups:
        return None
    layer = _layer(groups[0].parent)
    shown = [group for group in groups if _layer(group.parent) == layer]
    before: list[Box] = []
    after: list[Box] = []
    for group in shown:
        x = len(before)
        before.append(Box("x", "edge", ()))
        for branch in group.branches:
            base = len(before)
            before.append(Box(_label(branch), "base", (x,)))
            for i, label in enumerate(("lora_A", "lora_B", "* scale")):
                before.append(Box(label, "lora", (base + i if i else x,)))
            before.append(Box("+", "lora", (base, base + 3)))
        x = len(after)
        after.append(Box("x", "edge", ()))
        after += [Box(_label(branch), "base", (x,)) for branch in group.branches]
        names = ", ".join(told_apart([branch.name for branch in group.branches]))
        after.append(Box(f"lorafx.{group.op}\n{names}", "fused", tuple(range(x, len(after)))))
    return Sketch(layer, tuple(before)), Sketch(layer, tuple(after))


def _label(branch) -> str:
    return f"{branch.name.rpartition('.')[2]}\n{branch.in_features} → {branch.out_features}"


def _layer(parent: str) -> str:
    parts = parent.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else parent


def titles(sketches: tuple[Sketch, Sketch], alike: int) -> tuple[str, str]:
    """What stands above the two sides. alike: how many layers have such groups, this one included"""
    layer = sketches[0].layer or "the model"
    more = f" (and {alike - 1} more like it)" if alike > 1 else ""
    return f"before: {layer}{more}", "after"


def dot_of(sketches: tuple[Sketch, Sketch] | None, alike: int = 1) -> str:
    """Graphviz source, each side a cluster. None: nothing was fused."""
    if sketches is None:
        return 'digraph lorafx { label="nothing was fused" }'
    lines = [
        "digraph lorafx {",
        '  bgcolor="#ffffff"; rankdir=TB; ranksep=0.3; nodesep=0.2; fontname="Helvetica"; fontsize=12;',
        '  node [shape=box, style="rounded,filled", color="#888888", fontname="Helvetica", fontsize=11];',
        '  node [margin="0.1,0.05"];',
        '  edge [color="#555555", arrowsize=0.7];',
    ]
    for side, sketch, title in zip(("before", "after"), sketches, titles(sketches, alike), strict=True):
        lines += [f"  subgraph cluster_{side} {{", f'    label={_quoted(title)}; color="#bbbbbb";']
        for i, box in enumerate(sketch.boxes):
            lines.append(f'    {side}_{i} [label={_quoted(box.label)}, fillcolor="{FILLS[box.kind]}"];')
            lines += [f"    {side}_{j} -> {side}_{i};" for j in box.inputs]
        lines.append("  }")
    return "\n".join([*lines, "}"])


def _quoted(text: str) -> str:
    """A string of the dot language: names of modules may hold anything."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def draw(sketches: tuple[Sketch, Sketch] | None, alike: int = 1) -> str:
    """SVG text, by Graphviz's program ``dot`` where there is one that works."""
    program = shutil.which("dot")
    if program is not None:
        source = dot_of(sketches, alike).encode()
        try:
            done = subprocess.run([program, "-Tsvg"], input=source, capture_output=True, check=True, timeout=TIME_LIMIT)
            text = done.stdout.decode()
            return text[text.index("<svg") :]  # without the head of a file of its own, so that it can stand in a page
        except (OSError, subprocess.SubprocessError, ValueError):
            pass
    if sketches is None:
        sketches = (Sketch("", (Box("nothing was fused", "edge", ()),)),) * 2
    return svg_of([sketch.boxes for sketch in sketches], titles(sketches, alike), FILLS)


def write_svg(text: str, path: Path) -> Path:
    """The whole file or none of it. LorafxError: it can't be written."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".svg")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise LorafxError(
            f"can't write the drawing to {path}: {error.strerror}. Name a file in a folder that is there."
        ) from error
    return path
