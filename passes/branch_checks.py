"""What keeps a candidate from being a branch, with the words for it. Pure: the graph is only read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lorafx.passes.graph_reading import as_product, as_scaling, example, is_cast, is_copy
from lorafx.passes.linear_layers import Linear, as_linear
from lorafx.passes.memory import Timeline, is_in_place


@dataclass
class Walk:
    """From the sum up to A: the nodes on the way, and the factors met there."""

    gm: fx.GraphModule
    scale: float
    nodes: list[fx.Node] = field(default_factory=list)  # factors that are known only at run time
    inside: list[fx.Node] = field(default_factory=list)
    casts: bool = False
    is_vector: bool = False  # scaled by a tensor of several elements

    @property
    def factors(self) -> tuple[float, int]:
        return self.scale, len(self.nodes)

    def up(self, node: fx.Node) -> fx.Node:
        """Past casts and scalings, which become part of the branch."""
        while True:
            if is_cast(node) or is_copy(node):
                inner, self.casts = node.args[0], self.casts or is_cast(node)
            elif (scaling := as_scaling(node)) is not None:
                inner, factor = scaling
                if isinstance(factor, fx.Node):
                    self.nodes.append(factor)
                else:
                    self.scale *= factor
            elif (inner := self._scaled_by_vector(node)) is not None:
                self.is_vector = True
            else:
                return node
            self.inside.append(node)
            node = inner

    def _scaled_by_vector(self, node: fx.Node) -> fx.Node | None:
        """The linear layer or scaling in a product of two tensors."""
        inner = [side for side in as_product(node) or () if as_linear(self.gm, side) or as_scaling(side)]
        return inner[0] if len(inner) == 1 else None


@dataclass(frozen=True)
class Candidate:
    """``out = y + factors * B(A(x))`` beside ``base(x)``; the rest decides whether it may be fused."""

    out: fx.Node
    y: fx.Node
    chain: Sequence[fx.Node]  # from what A reads up to where that comes from
    a: Linear
    b: Linear
    walk: Walk
    after_b: tuple[float, int]  # the factors behind B; others stand between A and B
    dropping: bool
    base: fx.Node
    plain: bool  # y is a linear layer of the same x as it stands, without casts and views


def refusal(gm: fx.GraphModule, timeline: Timeline, c: Candidate) -> str | None:
    """Why ``c`` is not to be fused; None if it is."""
    if c.dropping:
        return "dropout is active: each branch draws a mask of its own, so siblings share no input"
    if c.a.bias is not None:
        return "A has a bias: y + B(Ax + a) is not of the form y + B(Ax)"
    if c.walk.is_vector:
        return "the branch is scaled by a tensor of several elements (as in DoRA), not by one number"
    if c.b.bias is not None and c.after_b != c.walk.factors:
        return "the scale stands before B's bias, which it would multiply once fused"
    if len(c.walk.nodes) > 1:
        return "more than one scale is computed at run time"
    members = {*c.walk.inside, c.out}
    if any(user not in members for node in c.walk.inside for user in node.users):
        return "an intermediate result of the branch is used outside it"
    casts = c.walk.casts or any(map(is_cast, c.chain))
    if (example(c.y) is None or example(c.out) is None) and (casts or not c.plain):
        return "shapes and dtypes are not known here, and the branch casts or reshapes: give example inputs"
    if not _shapes_agree(c):
        return "the branch is broadcast onto the base output"
    if is_in_place(c.out) and not timeline.owns(c.y, c.out):
        return "the base output is changed in place while something else reads it"
    first = min((*c.walk.inside, *c.chain[:-1]), key=timeline.order.__getitem__)
    read = [*c.chain, c.a.weight.node, c.b.weight.node, *c.walk.nodes]
    if not timeline.is_quiet(first, c.out, [node for node in read if node is not None]):
        return "what the branch reads is changed in place, or the context (autocast, grad mode) is, before the sum"
    return None


def _shapes_agree(c: Candidate) -> bool:
    """No broadcasting on the way from x to the sum, where shapes are known; else the widths alone are."""
    y, out, shrunk = example(c.y), example(c.out), example(c.a.node)
    if y is None or out is None or shrunk is None:
        linear = as_linear(c.walk.gm, c.base)
        return linear is None or linear.weight.out_features == c.b.weight.out_features
    expanded = (*shrunk.shape[:-1], c.b.weight.out_features)
    return _equal(y.shape, out.shape) and _equal(y.shape, expanded)


def _equal(left: Sequence, right: Sequence) -> bool:
    return len(left) == len(right) and all(statically_known_true(p == q) for p, q in zip(left, right, strict=True))
