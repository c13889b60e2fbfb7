"""Charts: seconds for each token of a generation, and ratios of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib.pyplot as plt
import numpy
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from notebooks.steps import Shown
from notebooks.style import COLOURS, FAINT, INK, STRONG

OUTLIER = 3.0


@dataclass(frozen=True)
class Token:
    """text: what it reads as; adapter: in use when it was made, in words; seconds: of its decode step"""

    text: str
    adapter: str
    seconds: float


@dataclass(frozen=True)
class Event:
    """Something done to the bank before token ``at``, and how long it took."""

    at: int
    what: str
    seconds: float


def latency(tokens: Sequence[Token], events: Sequence[Event], colours: Mapping[str, str]) -> Figure:
    """A bar for each token, from zero, coloured by the adapter in use; a line and a label for each event.

    What took more than ``OUTLIER`` times the median is cut there, with its time above it.
    """
    figure, axes = plt.subplots(figsize=(8.6, 4.2))
    milliseconds = [token.seconds * 1e3 for token in tokens]
    axes.bar(range(len(tokens)), milliseconds, width=0.85, color=[colours[token.adapter] for token in tokens])
    median = numpy.median(milliseconds)
    axes.axhline(median, color=INK, linewidth=0.8, linestyle=":")
    axes.text(len(tokens) - 0.3, median, f"median {median:.0f} ms", va="bottom", fontsize=8)
    top = min(max(milliseconds), OUTLIER * median)
    for at, value in enumerate(milliseconds):
        if value > top:
            axes.text(at, top * 1.01, f"{value:.0f}", ha="center", va="bottom", fontsize=7)
    for event in events:
        axes.axvline(event.at - 0.5, color=FAINT, linewidth=0.8)
        label = f"{event.what}  ({event.seconds * 1e3:.1f} ms)"
        axes.text(event.at - 0.4, top * 1.12, label, rotation=35, ha="left", va="bottom", fontsize=8)
    axes.set(xlim=(-0.7, len(tokens) + 6), ylim=(0, top * 1.08), xlabel="token", ylabel="ms of its decode step")
    shown = dict.fromkeys(token.adapter for token in tokens)
    axes.legend(
        handles=[Patch(color=colours[name], label=name) for name in shown],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=3,
        frameon=False,
    )
    return figure


def coloured(tokens: Sequence[Token], colours: Mapping[str, str]) -> Shown:
    """The text, each token on the colour of the adapter that it was made with."""
    spans = []
    for token in tokens:
        text = escape(token.text).replace("\n", "<br>")
        style = f"background:{colours[token.adapter]};color:#111;padding:2px 0"
        spans.append(f'<span style="{style}">{text}</span>')
    return Shown(f'<p style="font-size:15px;line-height:1.9;max-width:52em">{"".join(spans)}</p>')


def answers(rows: Sequence[tuple[str, str]], colours: Mapping[str | None, str]) -> Shown:
    """Who said what: (adapter, text), each name on its adapter's colour, on the base model's if it has none."""
    lines = []
    for name, text in rows:
        chip = f"background:{colours.get(name, colours[None])};color:#111;padding:2px 8px;border-radius:6px"
        cells = f'<span style="{chip};white-space:nowrap">{escape(name)}</span>', escape(text)
        lines.append("<tr>" + "".join(f"<td style='text-align:left'>{cell}</td>" for cell in cells) + "</tr>")
    return Shown(f"<table style='font-size:14px'><tbody>{''.join(lines)}</tbody></table>")


Ratios = Mapping[str, tuple[float, float, float]]  # of each contender: first quartile, median, third quartile


def ratios(cases: Mapping[str, Ratios], ours: Sequence[str], longest: float | None = None) -> Figure:
    """Dots with quartiles, to the base at 1, one block for each case; ``ours`` in blue. longest: where the axis ends;
    what lies beyond is written at its end."""
    figure, axes = plt.subplots(figsize=(8.6, 0.22 * sum(len(case) + 1.8 for case in cases.values())))
    longest = longest or 1.05 * max(high for case in cases.values() for _, _, high in case.values())
    y, places, labels = 0.0, [], []
    for title, case in cases.items():
        axes.text(0.005, y, title, weight="bold", fontsize=9.5, va="center", transform=axes.get_yaxis_transform())
        y += 1
        axes.plot([1, 1], [y - 0.5, y + len(case) - 0.5], color=INK, linewidth=0.9)
        for name, (low, median, high) in case.items():
            colour, at = (STRONG, 3) if name == ours[0] else (COLOURS[0], 2) if name in ours else (FAINT, 1)
            shown = min(median, longest)
            axes.plot([1, shown], [y, y], color=colour, linewidth=1, alpha=0.45)
            axes.plot([low, min(high, longest)], [y, y], color=colour, linewidth=4, alpha=0.45, solid_capstyle="butt")
            axes.plot([shown], [y], "o" if median <= longest else ">", color=colour, markersize=6, zorder=at)
            axes.text(1.01, y, f"{median:.2f}", va="center", fontsize=9, transform=axes.get_yaxis_transform())
            places.append(y)
            labels.append(name)
            y += 1
        y += 0.8
    axes.set(ylim=(y - 0.5, -0.8), xlim=(axes.get_xlim()[0], longest), xlabel="time, to the base without LoRA")
    axes.set_yticks(places, labels, fontsize=9)
    axes.tick_params(axis="y", length=0)
    for name, tick in zip(labels, axes.get_yticklabels(), strict=True):
        tick.set(weight="bold" if name == ours[0] else "normal", color=INK if name in ours else "#57606a")
    return figure


def faster(cases: Mapping[str, Ratios], ours: Sequence[str]) -> list[dict[str, str]]:
    """Every case in which something else, the base (1.00) too, took less time than the first of ``ours`` in it."""
    rows = []
    for title, case in cases.items():
        mine = next((name for name in ours if name in case), None)
        if mine is None:
            continue
        others = {"base": 1.0} | {name: median for name, (_, median, _) in case.items() if name not in ours}
        ahead = {name: median for name, median in others.items() if median < case[mine][1]}
        if ahead:
            texts = (f"{name} {median:.2f}" for name, median in sorted(ahead.items(), key=lambda item: item[1]))
            rows.append({"case": title, mine: f"{case[mine][1]:.2f}", "faster": ", ".join(texts)})
    return rows
