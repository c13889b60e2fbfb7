"""``lorafx inspect``: what is in an adapter."""

from __future__ import annotations

from pathlib import Path

from lorafx.cli.contents import read_contents
from lorafx.cli.output import print_json, print_lines, print_table
from lorafx.errors import AdapterFormatError
from lorafx.formats import detect

ROWS_LIMIT = 60  # a hostile file may name each of its layers differently


def run(path: Path, *, as_json: bool = False) -> int:
    """Print it. Returns 1 where something is wrong with the adapter, else 0. AdapterFormatError: not an adapter"""
    kind = detect(path)
    if kind != "peft":
        raise AdapterFormatError(
            f"{str(path)!r} is a {kind} file; inspect reads PEFT folders. Make one of it: lorafx convert {path} FOLDER"
            " --to peft --model MODEL"
        )
    contents = read_contents(path)
    facts = contents.to_dict()
    if as_json:
        print_json(facts)
        return 1 if contents.problems else 0
    layers, config = contents.layers.values(), contents.config
    print_lines(f"adapter {path}", style="bold")
    ranks = ", ".join(map(str, sorted({layer.rank for layer in layers}))) or "none"
    print_lines(
        f"base model: {config.base_model_name_or_path or 'not said'}",
        f"{len(layers)} adapted layer(s), rank {ranks}, {facts['bytes']:,} bytes in {contents.tensors} tensors"
        + (", rank-stabilized (rsLoRA)" if config.use_rslora else ""),
    )
    rows = contents.table()
    if rows:
        print_table(rows[:ROWS_LIMIT])
    if len(rows) > ROWS_LIMIT:
        print_lines(f"and {len(rows) - ROWS_LIMIT:,} more kinds of layers; --json lists all")
    for feature in contents.left_to_peft:
        print_lines(f"left to PEFT: {feature}. Load it with PEFT and pass the PeftModel.", style="yellow")
    for note in contents.notes:
        print_lines(f"note: {note}", style="yellow")
    for problem in contents.problems:
        print_lines(f"problem: {problem}", style="red")
    if not contents.problems:
        print_lines("sound", style="green")
    return 1 if contents.problems else 0
