"""What ``find_branches`` finds: plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from lorafx.passes.linear_layers import Weight


@dataclass(frozen=True)
class Branch:
    """One branch: ``out = y + scale * scale_node * (linear(linear(x, a), b) + bias)``."""

    out: fx.Node  # what computes the sum
    y: fx.Node
    x: fx.Node
    a: Weight
    b: Weight
    bias: Weight | None
    scale: float
    scale_node: fx.Node | None
    base: fx.Node  # the layer that is adapted
    origin: fx.Node  # where base and branch part: what ``x`` is a cast of, or ``x``
    inside: tuple[fx.Node, ...]  # what the branch computes, from the sum up to ``origin``


@dataclass(frozen=True)
class Skipped:
    """What looks like a branch and is left as it is."""

    name: str
    reason: str


@dataclass
class Found:
    branches: list[Branch] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
