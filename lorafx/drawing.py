"""One layer's graph before and after, as Graphviz source. Graphviz draws it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lorafx.errors import LorafxError
from lorafx.passes.record import FusedGroup

BASE, LORA, FUSED = "#e8eef7", "#f7d9c4", "#cfe8cf"


def layer_dot(groups: Sequence[FusedGroup]) -> str:
    """Every group of the first layer that has any; on the left as PEFT computes it, on the right as lorafx does."""
    if not groups:
        return 'digraph lorafx { label="nothing was fused" }'
    layer = _layer(groups[0].parent)
    shown = [group for group in groups if _layer(group.parent) == layer]
    lines = [
        "digraph lorafx {",
        '  rankdir=TB; node [shape=box, style="rounded,filled", fontname="Helvetica", fontsize=11];',
        '  edge [color="#555555"]; fontname="Helvetica";',
    ]
    lines += _side("before", f"before: {layer or 'model'}", shown, _branch_before)
    lines += _side("after", f"after: {layer or 'model'}", shown, _group_after)
    return "\n".join([*lines, "}"])


def _side(name: str, label: str, groups: Sequence[FusedGroup], draw) -> list[str]:
    lines = [f"  subgraph cluster_{name} {{", f'    label="{label}"; color="#bbbbbb";']
    for i, group in reversed(list(enumerate(groups))):  # Graphviz draws the last one first
        lines += [f"    {line}" for line in draw(f"{name}_{i}", group)]
    return [*lines, "  }"]


def _branch_before(prefix: str, group: FusedGroup) -> list[str]:
    lines = [_node(f"{prefix}_x", "x", "#ffffff")]
    for branch in group.branches:
        short = branch.name.rpartition(".")[2]
        at = f"{prefix}_{_safe(short)}"
        lines += [
            _node(f"{at}_base", f"{short}\\n{branch.in_features} -> {branch.out_features}", BASE),
            _node(f"{at}_a", "lora_A", LORA),
            _node(f"{at}_b", "lora_B", LORA),
            _node(f"{at}_mul", "* scale", LORA),
            _node(f"{at}_add", "+", LORA),
            f"{prefix}_x -> {at}_base -> {at}_add;",
            f"{prefix}_x -> {at}_a -> {at}_b -> {at}_mul -> {at}_add;",
        ]
    return lines


def _group_after(prefix: str, group: FusedGroup) -> list[str]:
    names = [branch.name.rpartition(".")[2] for branch in group.branches]
    lines = [
        _node(f"{prefix}_x", "x", "#ffffff"),
        _node(f"{prefix}_lora", f"lorafx.{group.op}\\n{', '.join(names)}", FUSED),
        f"{prefix}_x -> {prefix}_lora;",
    ]
    for branch, short in zip(group.branches, names, strict=True):
        at = f"{prefix}_{_safe(short)}"
        lines += [
            _node(f"{at}_base", f"{short}\\n{branch.in_features} -> {branch.out_features}", BASE),
            f"{prefix}_x -> {at}_base -> {prefix}_lora;",
            _node(f"{at}_out", f"{short} out", "#ffffff"),
            f"{prefix}_lora -> {at}_out;",
        ]
    return lines


def _node(name: str, label: str, color: str) -> str:
    return f'{name} [label="{label}", fillcolor="{color}"];'


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def _layer(parent: str) -> str:
    """The path up to and with the first number: ``model.layers.0``."""
    parts = parent.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else parent


def write_svg(dot: str, path: Path) -> Path:
    """LorafxError: the program ``dot`` is not there, or fails."""
    program = shutil.which("dot")
    if program is None:
        raise LorafxError(
            "drawing needs Graphviz's program 'dot', which is not installed (Debian: apt-get install graphviz)."
            " report.dot() gives the source, which any Graphviz viewer draws."
        )
    done = subprocess.run([program, "-Tsvg", "-o", str(path)], input=dot, text=True, capture_output=True, check=False)
    if done.returncode:
        raise LorafxError(f"Graphviz could not draw to {path}: {done.stderr.strip()}")
    return path
