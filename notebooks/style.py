"""One look for all pictures: the colours of adapters, and what matplotlib is told."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib_inline.backend_inline import set_matplotlib_formats

# Told apart by people who see few colours (Okabe and Ito), light enough for black letters on them.
COLOURS = ("#56b4e9", "#e69f00", "#5cc9a0", "#cc79a7", "#f0e442")
BASE = "#d9dde2"  # the base model, and what no adapter has
MASKED = "#eef0f2"
INK = "#22272e"
STRONG = "#0b62a4"
FAINT = "#8b949e"


def use() -> None:
    """White paper, so that a picture looks the same on a dark page."""
    set_matplotlib_formats("svg", metadata={"Date": None})
    plt.rcParams.update(
        {
            "figure.facecolor": "white",
            "svg.fonttype": "none",  # letters stay letters, a third of the bytes
            "svg.hashsalt": "lorafx",
            "font.size": 10,
            "axes.edgecolor": FAINT,
            "axes.labelcolor": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "xtick.color": INK,
            "ytick.color": INK,
            "text.color": INK,
            "savefig.bbox": "tight",
        }
    )


def colours_of(names: Sequence[str]) -> dict[str | None, str]:
    """A colour for each adapter, and one for None, the base model."""
    return {None: BASE, **dict(zip(names, COLOURS, strict=False))}
