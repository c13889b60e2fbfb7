"""Finds every LoRA branch in a graph. Pure: the graph is only read.

A branch is, in any spelling that ``graph_reading`` and ``linear_layers`` know:

    y   = base(x)
    s   = linear(dropout(cast(x)), A)          # A: [r, in], no bias
    d   = linear(s, B, bias)                   # B: [out, r]
    out = y + d * scale                        # the scale may stand between A and B too

where dropout is idle and nothing else reads ``s`` or ``d``. That ``base`` reads the same ``x`` is what tells a LoRA
branch from any other pair of small layers, an adapter bottleneck on the residual stream for one.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from lorafx.passes.branch import Branch, Found, Skipped
from lorafx.passes.branch_checks import Candidate, Walk, refusal
from lorafx.passes.graph_reading import as_addition, dropout_state, example, is_cast, is_copy, is_view
from lorafx.passes.linear_layers import Linear, as_addmm, as_linear, is_parameter, product_of_addmm
from lorafx.passes.memory import Timeline, is_in_place
from lorafx.passes.naming import layer_name

NO_BASE = "no layer beside it reads the same input: not of the form base(x) + B(Ax)"


def find_branches(gm: fx.GraphModule) -> Found:
    """All branches of ``gm`` in graph order, and what was refused, with reasons."""
    found = Found()
    matched: dict[fx.Node, Branch] = {}
    parted: dict[tuple, fx.Node] = {}
    timeline = Timeline(gm.graph)
    for node in gm.graph.nodes:
        results = [_match(gm, timeline, node, *way, matched, parted) for way in _ways(node)]
        branch = next((result for result in results if isinstance(result, Branch)), None)
        if branch is not None:
            found.branches.append(branch)
            matched[node] = branch
        else:
            found.skipped += [result for result in results if result is not None][:1]
    return found


def _ways(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, float]]:
    """``node`` as ``y + scale * delta``, both ways round; an addmm is the sum and the product by B in one."""
    if (addition := as_addition(node)) is not None:
        left, right, alpha = addition
        if isinstance(left, fx.Node) and isinstance(right, fx.Node) and isinstance(alpha, (int, float)):
            yield left, right, float(alpha)
            if alpha == 1 and not is_in_place(node):  # y += d changes y; d += y would change d
                yield right, left, 1.0
    elif (sides := as_addmm(node)) is not None:
        y, _, _, beta, alpha = sides
        if isinstance(y, fx.Node) and not is_parameter(y) and beta == 1 and isinstance(alpha, (int, float)):
            yield y, node, float(alpha)


def _match(
    gm: fx.GraphModule,
    timeline: Timeline,
    out: fx.Node,
    y: fx.Node,
    delta: fx.Node,
    scale: float,
    matched: dict[fx.Node, Branch],
    parted: dict[tuple, fx.Node],
) -> Branch | Skipped | None:
    walk = Walk(gm, scale)
    b = product_of_addmm(out) if delta is out else as_linear(gm, walk.up(delta))
    if b is None:
        return None
    walk.inside += [b.node] if b.node is not out else []
    after_b = walk.factors
    a = as_linear(gm, walk.up(b.x))
    if a is None:
        return None
    walk.inside.append(a.node)
    chain, dropping = passed_on(gm, a.x)
    base = _base(gm, y, chain[-1], matched)
    if base is None:
        low_rank = a.weight.out_features < min(a.weight.in_features, b.weight.out_features)
        is_sum = not is_parameter(y) or y is chain[-1]  # rather than a bias that is added
        is_look_alike = low_rank and a.bias is None and is_sum and not walk.is_vector
        return Skipped(layer_name(gm, a.node), NO_BASE) if is_look_alike else None
    plain = _base(gm, y, chain[-1], matched, exactly=True) is not None
    chain = _written_since(gm, timeline, out, base, chain)
    candidate = Candidate(out, y, chain, a, b, walk, after_b, dropping, base, plain)
    if reason := refusal(gm, timeline, candidate):
        return Skipped(layer_name(gm, base), reason)
    x = _parting(gm, timeline, out, base, chain, parted)
    node = walk.nodes[0] if walk.nodes else None
    inside = (*walk.inside, *chain)
    return Branch(out, y, x, a.weight, b.weight, b.bias, walk.scale, node, base, chain[-1], inside)


def passed_on(gm: fx.GraphModule, node: fx.Node, views: bool = False, casts: bool = True) -> tuple[list[fx.Node], bool]:
    """From ``node`` up to where its value comes from, seen through casts and dropout; is some dropout active?"""
    chain, active = [node], False
    while True:
        state = dropout_state(gm, node)
        if not (state or is_copy(node) or (casts and is_cast(node)) or (views and is_view(node))):
            return chain, active
        if not node.args or not isinstance(node.args[0], fx.Node):
            return chain, active
        active = active or state == "active"
        node = node.args[0]
        chain.append(node)


def _base(
    gm: fx.GraphModule, y: fx.Node, origin: fx.Node, matched: dict[fx.Node, Branch], exactly: bool = False
) -> fx.Node | None:
    """The node below ``y`` that reads ``origin``: the adapted layer, whatever it is (a GEMM, an opaque module).

    exactly: only if it is a linear layer, with neither views nor casts on the way, so that dtype and shape are plain
    """
    node = passed_on(gm, y, views=not exactly, casts=not exactly)[0][-1]
    if node in matched:  # another adapter on the same layer
        return matched[node].base if matched[node].origin is origin else None
    if node.op not in ("call_function", "call_module", "call_method"):
        return None
    linear = as_linear(gm, node)
    if linear is None and (addition := as_addition(node)) is not None:  # x @ W.T + bias
        inner = [side for side in addition[:2] if isinstance(side, fx.Node) and _below(gm, side) is not None]
        return _base(gm, inner[0], origin, matched, exactly) if len(inner) == 1 else None
    if exactly and (linear is None or passed_on(gm, linear.x)[0][-1] is not origin):
        return None
    origin = passed_on(gm, origin, views=True)[0][-1]
    read = [linear.x] if linear else node.all_input_nodes
    return node if any(passed_on(gm, arg, views=True)[0][-1] is origin for arg in read) else None


def _below(gm: fx.GraphModule, node: fx.Node) -> Linear | None:
    return as_linear(gm, passed_on(gm, node, views=True)[0][-1])


def _written_since(
    gm: fx.GraphModule, timeline: Timeline, out: fx.Node, base: fx.Node, chain: list[fx.Node]
) -> list[fx.Node]:
    """``chain`` up to what the base layer reads, if that was written to since it was made of something else: then it is
    no cast of that any more, but what base and branch share as it stands."""
    linear = as_linear(gm, base)
    if linear is None or linear.x not in chain[:-1] or timeline.is_unwritten(linear.x, out, chain):
        return chain
    return chain[: chain.index(linear.x) + 1]


def _parting(
    gm: fx.GraphModule, timeline: Timeline, out: fx.Node, base: fx.Node, chain: list[fx.Node], parted: dict
) -> fx.Node:
    """The ``x`` that base and branch share: past all casts that both have, so that a bf16 base gives a bf16 ``x``."""
    linear = as_linear(gm, base)
    shared, origin = linear.x if linear else None, chain[-1]
    if shared not in chain or (value := example(shared)) is None or (top := example(origin)) is None:
        return origin
    if value.dtype == top.dtype:
        return origin
    # siblings that cast for themselves share the first one's cast, unless what it was made from has changed since
    first = parted.setdefault((origin, value.dtype), shared)
    return first if timeline.is_quiet(first, out, [origin, first]) else shared
