"""What the CPU benchmark found: tables in Markdown, and a plot. Losses are shown as plainly as wins.

``python -m benchmarks.cpu_report docs/cpu/cpu.json`` prints the table of docs/performance.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.cpu_cases import (
    BASE,
    BASE_EAGER,
    IDLE,
    LORAFX,
    MERGED,
    PEFT,
    PEFT_COMPILED,
    POLYLORA,
    RECOMPILE_TARGET,
    TITLES,
)

COLORS = {
    BASE: "black",
    BASE_EAGER: "0.4",
    IDLE: "lightsteelblue",
    PEFT: "0.8",
    PEFT_COMPILED: "0.65",
    MERGED: "0.75",
    POLYLORA: "0.88",
}


def duration(seconds: dict[str, float]) -> str:
    scale, unit = (1, "s") if seconds["median"] >= 10 else (1e3, "ms")
    return with_quartiles({name: value * scale for name, value in seconds.items()}, ".1f", unit)


def with_quartiles(values: dict[str, float], digits: str, unit: str = "") -> str:
    text = f"{values['median']:{digits}} {unit}".strip()
    if values["low"] == values["high"]:
        return text
    return f"{text} ({values['low']:{digits}} to {values['high']:{digits}})"


def verdict(target: dict, first: str) -> str:
    """Such as "at most 1.02: missed; aim 0.98: missed". Where the ratio is not to ``first``'s time, with the ratio."""
    told = {name: "met" if target[f"{name}_met"] else "**missed**" for name in ("must", "aim")}
    bound = "at least" if target["at_least"] else "at most"
    text = f"{bound} {target['must']:g}: {told['must']}; aim {target['aim']:g}: {told['aim']}"
    if target["to"] == first:
        return text
    return f"{target['found']:.3g} {'' if target['to'] == RECOMPILE_TARGET.to else 'x '}{target['to']}, {text}"


def time_table(number: int, result: dict) -> list[str]:
    """Markdown, one line for each contender, what is asked of it beside it."""
    lines = [
        f"\n**{number}. {result['title']}**\n",
        "| contender | median (quartiles) | ratio | asked |\n|---|---|---|---|",
    ]
    first = result["rows"][0]["contender"]
    for row in result["rows"]:
        name, ratio = row["contender"], with_quartiles(row["ratio"], ".3f")
        asked = "; ".join(verdict(target, first) for target in result["targets"] if target["of"] == name)
        lines.append(f"| {name} | {duration(row['seconds'])} | {ratio} | {asked} |")
    return [*lines, *(f"\n{text}" for text in result.get("notes", ()))]


def memory_table(results: dict[int, dict]) -> list[str]:
    """Markdown: bytes of parameters, buffers and lorafx's bank, and how many are not the adapters' own numbers."""
    lines = ["\n| case | contender | bytes | more than the base | more than base and adapters |\n|---|---|---|---|---|"]
    for number, result in results.items():
        for row in result["rows"]:
            if row.get("bytes") is None:
                continue
            above = row["bytes"] - row["base_bytes"]
            extra = f"{above - row['adapter_bytes']:,}" if above else ""
            lines.append(f"| {number} | {row['contender']} | {row['bytes']:,} | {above:,} | {extra} |")
    return lines if len(lines) > 1 else []


def summary(results: dict[int, dict]) -> list[str]:
    """Markdown, one line for each case that has the base in it: medians of the ratios, a column for each contender."""
    columns = (LORAFX, IDLE, BASE_EAGER, PEFT, PEFT_COMPILED, MERGED, POLYLORA)
    lines = [
        f"| | {BASE} | {' | '.join(columns)} | asked: at most (aim) |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for number, result in results.items():
        rows = {row["contender"]: row for row in result["rows"]}
        if BASE not in rows or int(number) in TITLES:
            continue
        ratios = (f"{rows[name]['ratio']['median']:.3f}" if name in rows else "" for name in columns)
        asked = next((f"{t['must']:g} ({t['aim']:g})" for t in result["targets"] if t["to"] == BASE), "")
        base = f"{rows[BASE]['seconds']['median'] * 1e3:.1f} ms"
        lines.append(f"| {result['title']} | {base} | {' | '.join(ratios)} | {asked} |")
    return lines


def plot(results: dict[int, dict], title: str, path: Path) -> None:
    """Bars of the ratios, by case; quartiles as whiskers, what lorafx must reach as a red tick."""
    from matplotlib import pyplot

    rows = [(number, result, row) for number, result in results.items() for row in result["rows"]]
    places, place, last = [], 0.0, None
    for number, _, _ in rows:
        place += 1 if number == last else 2.2
        places.append(place)
        last = number
    figure, axes = pyplot.subplots(figsize=(11, 1.5 + 0.21 * place), layout="constrained")
    for y, (number, result, row) in zip(places, rows, strict=True):
        ratio, name = row["ratio"], row["contender"]
        if row is result["rows"][0]:
            axes.text(0, y - 0.95, f"{number}. {result['title']}", fontsize=9, fontweight="bold", va="center")
        whiskers = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
        axes.barh(y, ratio["median"], 0.8, color=COLORS.get(name, "C0"), xerr=whiskers, error_kw={"linewidth": 0.7})
        axes.text(ratio["high"] + 0.02, y, f"{ratio['median']:.2f}", va="center", fontsize=8)
        for must in _ticks(result["targets"], name, result["rows"][0]["contender"]):
            axes.plot([must, must], [y - 0.45, y + 0.45], color="red", linewidth=1.5)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(places, [row["contender"] for _, _, row in rows], fontsize=8)
    axes.set_ylim(place + 1, 0)
    axes.set_xlabel("time, as a ratio to the first of each case; red: what lorafx may take at most")
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _ticks(targets: Iterable[dict], name: str, first: str) -> list[float]:
    return [t["must"] for t in targets if t["of"] == name and t["to"] == first]


if __name__ == "__main__":
    print("\n".join(summary(json.loads(Path(sys.argv[1]).read_text())["cases"])))
