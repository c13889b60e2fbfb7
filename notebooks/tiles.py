"""Draws a bank and what ``recording`` wrote down of the kernels that read it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import matplotlib.pyplot as plt
import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from lorafx.store import PackedStore
from notebooks.recording import OFF, Launch
from notebooks.style import BASE, COLOURS, FAINT, INK, MASKED

LOOKS = {slot: {"facecolor": colour} for slot, colour in enumerate(COLOURS)}
LOOKS |= {-1: {"facecolor": BASE}, OFF: {"facecolor": MASKED}}


def bank(store: PackedStore, names: Sequence[str]) -> Figure:
    """Every rank row of every layer, by who owns it (``store.owner``), and the windows (``store.windows``) below.

    names: of the adapters, by slot
    """
    figure, axes = plt.subplots(figsize=(11, 0.75 * len(store.sites) + 0.6))
    for index, site in enumerate(store.geometry):
        owner = store.owner[site.lane : site.lane + site.capacity].tolist()
        for row, slot in enumerate(owner):
            axes.add_patch(Rectangle((row, -index), 1, 0.5, edgecolor="white", linewidth=0.8, **LOOKS[slot]))
        for slot, name in enumerate(names):
            start, rank, _ = store.windows[slot, index].tolist()
            if rank:
                axes.plot([start + 0.15, start + rank - 0.15], [-index - 0.1] * 2, color=INK, linewidth=1.2)
                axes.text(
                    start + rank / 2, -index - 0.19, f"{name}: {start}, {rank}", ha="center", va="top", fontsize=8
                )
        axes.text(-0.6, -index + 0.25, site.name, ha="right", va="center")
    most = max(site.capacity for site in store.geometry)
    axes.set(xlim=(-5, most), ylim=(-len(store.sites) + 0.45, 0.6), title="the bank: rank rows, and their owners")
    axes.axis("off")
    return figure


def programs(launch: Launch, rows: Sequence[str], columns: Sequence[str], names: Sequence[str]) -> Figure:
    """A box for each program: the lanes of the block of weights that it loads, or what it does instead.

    rows, columns: labels of the grid's two axes; equal neighbours of columns, up to the last line, share one
    """
    launch = launch.in_rows_of(len(columns))
    height, width = launch.grid
    idle = "leaves" if launch.kernel == "shrink" else "copies y"
    figure, axes = plt.subplots(figsize=(11, 1.05 * height + 1.1))
    for i in range(height):
        for j in range(width):
            reads = launch.reads.get((i, j))
            if reads is None:
                axes.text(j + 0.5, -i - 0.5, idle, ha="center", va="center", color=FAINT, fontsize=7)
                axes.add_patch(Rectangle((j + 0.1, -i - 0.9), 0.8, 0.8, fill=False, edgecolor="#d0d7de", linestyle=":"))
                continue
            for turn, lanes in enumerate(reads):
                box = 0.8 / len(reads)
                _lanes(axes, lanes, j + 0.1 + turn * box, -i - 0.1, box, 0.8)
    for i, label in enumerate(rows):
        axes.text(-0.15, -i - 0.5, label, ha="right", va="center", fontsize=9)
    _headings(axes, columns)
    axes.set(xlim=(-1.6 * width / 12, width), ylim=(-height, 0.95))
    axes.axis("off")
    count = height * width - len(launch.reads)
    axes.set_title(f"{launch.kernel}: {height} x {width} programs, {count} of them read no weight", pad=14)
    _legend(figure, names)
    return figure


def tiles(
    launch: Launch, rows: Sequence[str], columns: Sequence[str], siblings: Sequence[str], names: Sequence[str]
) -> Figure:
    """A box for each program: the tile ``[tokens, lanes]`` of S that it stores, its lanes those of each sibling in
    turn."""
    launch = launch.in_rows_of(len(columns))
    height, width = launch.grid
    figure, every = plt.subplots(height, width, figsize=(9.6, 0.75 * height + 1.1), squeeze=False)
    for i in range(height):
        for j in range(width):
            axes = every[i, j]
            axes.spines[["top", "right"]].set_visible(True)
            stored = launch.tiles.get((i, j), ())
            for tile in stored:
                count, lanes = tile.shape
                done = 0
                for row, run in groupby(tile.tolist()):
                    alike = len(list(run))
                    _lanes(axes, numpy.array(row), 0, -done, lanes, alike, upright=False)
                    done += alike
                axes.set(xlim=(0, lanes), ylim=(-count, 0))
            if not stored:
                axes.text(
                    0.5, 0.5, "leaves", ha="center", va="center", color=FAINT, fontsize=7, transform=axes.transAxes
                )
                axes.spines[:].set(color="#d0d7de", linestyle=":")
            axes.set(xticks=[], yticks=[])
            if i == 0:
                axes.set_title(columns[j], fontsize=8, loc="center", pad=11)
                for k, sibling in enumerate(siblings if stored else ()):
                    at = (k + 0.5) / len(siblings)
                    axes.text(at, 1.02, sibling, ha="center", fontsize=6, color=FAINT, transform=axes.transAxes)
            if j == 0:
                axes.set_ylabel(rows[i], rotation=0, ha="right", va="center", fontsize=9)
    _legend(figure, names)
    return figure


def _lanes(
    axes: Axes, lanes: numpy.ndarray, left: float, top: float, width: float, height: float, upright: bool = True
) -> None:
    """Equal neighbours are one rectangle; those that are read show each lane."""
    done = 0
    borders: list[float] = []
    for slot, run in groupby(lanes.tolist()):
        count = len(list(run))
        step = (height if upright else width) / len(lanes)
        place = (left, top - (done + count) * step) if upright else (left + done * step, top - height)
        size = (width, count * step) if upright else (count * step, height)
        axes.add_patch(Rectangle(place, *size, edgecolor="none", linewidth=0, **LOOKS[slot]))
        if slot != OFF and upright:
            borders += [top - (done + lane) * step for lane in range(1, count)]
        done += count
    if upright:
        nan = float("nan")  # ends a line: all of them are one path
        points = [(x, y) for y in borders for x in (left, left + width, nan)]
        axes.plot(*zip(*points, strict=True), color="white", linewidth=0.35)
        axes.add_patch(Rectangle((left, top - height), width, height, fill=False, edgecolor=INK, linewidth=0.7))


def _headings(axes: Axes, columns: Sequence[str]) -> None:
    """The first line of a label over all neighbours that share it, the others over each."""
    done = 0
    for first, run in groupby(columns, key=lambda label: label.partition("\n")[0]):
        labels = list(run)
        axes.text(done + len(labels) / 2, 0.62, first, ha="center", va="bottom", weight="bold", fontsize=9)
        axes.plot([done + 0.1, done + len(labels) - 0.1], [0.58] * 2, color=FAINT, linewidth=0.8)
        for j, label in enumerate(labels):
            axes.text(done + j + 0.5, 0.05, label.partition("\n")[2], ha="center", va="bottom", fontsize=7)
        done += len(labels)


def _legend(figure: Figure, names: Sequence[str]) -> None:
    shown = [Patch(label=f"rows of {name}", **LOOKS[slot]) for slot, name in enumerate(names)]
    shown.append(Patch(label="masked: never read", **LOOKS[OFF]))
    figure.legend(handles=shown, loc="lower center", ncols=len(shown), frameon=False, bbox_to_anchor=(0.5, -0.04))
