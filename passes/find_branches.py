"""Finds every LoRA branch in a graph. Pure: the graph is only read.

A branch is, in any spelling that ``graph_reading`` knows:

    y   = base(x)
    s   = linear(dropout(cast(x)), A)          # A: [r, in], no bias
    d   = linear(s, B, bias)                   # B: [out, r]
    out = y + d * scale                        # the scale may stand between A and B too

where dropout is idle and nothing else reads ``s`` or ``d``. That ``base`` reads the same ``x`` is what tells a LoRA
branch from any other pair of small layers, an adapter bottleneck on the residual stream for one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from lorafx.passes.graph_reading import (
    ADDMM,
    Linear,
    Weight,
    as_addition,
    as_linear,
    as_scaling,
    dropout_state,
    example,
    is_cast,
    is_function,
    is_in_place,
    is_view,
)


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


@dataclass(frozen=True)
class Skipped:
    """What looks like a branch and is left as it is."""

    name: str
    reason: str


@dataclass
class Found:
    branches: list[Branch] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def find_branches(gm: fx.GraphModule) -> Found:
    """All branches of ``gm`` in graph order, and what was refused, with reasons."""
    found = Found()
    matched: dict[fx.Node, Branch] = {}
    for node in gm.graph.nodes:
        for y, delta, scale in _sums(node):
            result = _match(gm, node, y, delta, scale, matched)
            if isinstance(result, Branch):
                found.branches.append(result)
                matched[node] = result
                break
            if isinstance(result, Skipped):
                found.skipped.append(result)
                break
    return found


def _sums(node: fx.Node) -> list[tuple[fx.Node, object, float]]:
    """``node`` as ``y + scale * delta``, both ways round; an addmm is the sum and the product by B in one."""
    if (sides := as_addition(node)) is not None:
        left, right = sides
        ways = [(left, right, 1.0)]
        if not is_in_place(node):  # y += d changes y; d += y would change d
            ways.append((right, left, 1.0))
        return [way for way in ways if isinstance(way[0], fx.Node) and isinstance(way[1], fx.Node)]
    if is_function(node, ADDMM) and node.kwargs.get("beta", 1) == 1 and isinstance(node.args[0], fx.Node):
        return [(node.args[0], node, float(node.kwargs.get("alpha", 1)))]
    return []


def _match(
    gm: fx.GraphModule, out: fx.Node, y: fx.Node, delta: fx.Node, scale: float, matched: dict[fx.Node, Branch]
) -> Branch | Skipped | None:
    inside: list[fx.Node] = []
    nodes: list[fx.Node] = []

    def peel(node: object) -> object:
        """Walk up through casts and scalings, which become part of the branch."""
        nonlocal scale
        while True:
            if is_cast(node):
                inner = node.args[0]
            elif (scaling := as_scaling(node)) is not None:
                inner, factor = scaling
                if isinstance(factor, fx.Node):
                    nodes.append(factor)
                else:
                    scale *= factor
            else:
                return node
            inside.append(node)
            node = inner

    if delta is out:  # addmm(y, s, B)
        b = _addmm_product(gm, out)
    else:
        b = as_linear(gm, peel(delta))
        if b is not None:
            inside.append(b.node)
    if b is None:
        return None
    outer = (scale, len(nodes))
    a = as_linear(gm, peel(b.x))
    if a is None:
        return None
    inside.append(a.node)
    x, dropping = _source(gm, a.x)
    base = _base(gm, y, x, matched)
    if base is None:
        return None

    name = _name(base)
    if dropping:
        return Skipped(name, "dropout is active: each branch draws a mask of its own, so siblings share no input")
    if a.bias is not None:
        return Skipped(name, "A has a bias: y + B(Ax + a) is not of the form y + B(Ax)")
    if b.bias is not None and outer != (scale, len(nodes)):
        return Skipped(name, "the scale stands before B's bias, which it would multiply once fused")
    if len(nodes) > 1:
        return Skipped(name, "more than one scale is computed at run time")
    members = {*inside, out}
    if any(user not in members for node in inside for user in node.users):
        return Skipped(name, "an intermediate result of the branch is used outside it")
    if is_in_place(out) and any(user is not out and user not in members for user in y.users):
        return Skipped(name, "the base output is changed in place while something else reads it")
    if not _shapes_agree(y, out, a.node):
        return Skipped(name, "the branch is broadcast onto the base output")
    return Branch(out, y, x, a.weight, b.weight, b.bias, scale, nodes[0] if nodes else None, base)


def _addmm_product(gm: fx.GraphModule, node: fx.Node) -> Linear | None:
    """``addmm(y, s, B)`` as the product alone: a linear without bias, whose sum is the node itself."""
    from lorafx.passes.graph_reading import _as_weight, _flip

    weight = _as_weight(node.args[2])
    return Linear(node, node.args[1], _flip(weight)) if weight and isinstance(node.args[1], fx.Node) else None


def _source(gm: fx.GraphModule, node: fx.Node, through_views: bool = False) -> tuple[fx.Node, bool]:
    """Where a value comes from, seen through casts and dropout; and whether some dropout is active on the way."""
    active = False
    while isinstance(node, fx.Node):
        state = dropout_state(gm, node)
        if state is None and not is_cast(node) and not (through_views and is_view(node)):
            break
        active = active or state == "active"
        node = node.args[0]
    return node, active


def _base(gm: fx.GraphModule, y: fx.Node, x: fx.Node, matched: dict[fx.Node, Branch]) -> fx.Node | None:
    """The node below ``y`` that reads ``x``: the adapted layer, whatever it is (a GEMM, an opaque quantised module)."""
    node, _ = _source(gm, y, through_views=True)
    if node in matched:  # another adapter on the same layer
        return matched[node].base if matched[node].x is x else None
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_module", "call_method"):
        return None
    if (sides := as_addition(node)) is not None:  # x @ W.T + bias
        inner = [side for side in sides if isinstance(side, fx.Node) and as_linear(gm, _source(gm, side, True)[0])]
        return _base(gm, inner[0], x, matched) if len(inner) == 1 else None
    origin = _source(gm, x, through_views=True)[0]
    linear = as_linear(gm, node)
    read = [linear.x] if linear else list(node.args)
    sources = [_source(gm, arg, through_views=True)[0] for arg in read if isinstance(arg, fx.Node)]
    return node if origin in sources else None


def _shapes_agree(y: fx.Node, out: fx.Node, shrunk: fx.Node) -> bool:
    """Where shapes are known: no broadcasting on the way from x to the sum."""
    known = [example(node) for node in (y, out, shrunk)]
    if any(value is None for value in known):
        return True
    base, total, rank = known
    return base.shape == total.shape and rank.shape[:-1] == base.shape[:-1]


def _name(base: fx.Node) -> str:
    """The module path of the adapted layer, as far as tracing kept it."""
    if base.op == "call_module":
        return str(base.target)
    stack = base.meta.get("nn_module_stack")
    if stack:
        return clean_path(list(stack.values())[-1][0])
    return base.name


def clean_path(path: str) -> str:
    """Dynamo writes ``L['self'].layers[0].q`` or ``L['self']._modules['q']``; a reader wants ``layers.0.q``."""
    import re

    path = re.sub(r"\._modules\['([^']+)'\]", r".\1", path)
    path = re.sub(r"\['?([^'\]]+)'?\]", r".\1", path)
    path = re.sub(r"^(L|G)\.(self\.?)?", "", path)
    return re.sub(r"\.base_layer$", "", path)
