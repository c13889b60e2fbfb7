"""Lets siblings see that they read the same ``x``, where one of them reads it through something that does nothing.

    k = site(wk(x), x, ...)                          k = site(wk(x), x, ...)
    same = x.to(float32)  # which x is        ->     w = site(proj(x), x, ...)
    w = site(proj(same), same, ...)

A cast to the dtype that a tensor has, and a dropout that is off, give back the very tensor: as DeepSeek-V3.2's indexer
does, which casts to the dtype of one layer's weight.
"""

from __future__ import annotations

from collections import Counter

from torch import fx

from lorafx.passes.context import PassContext
from lorafx.passes.graph_reading import dropout_state, example, is_cast
from lorafx.passes.group_markers import is_marker


def share_inputs(gm: fx.GraphModule, context: PassContext) -> int:
    """Returns how many nodes that do nothing were taken out: those behind which markers read what others read."""
    idle: dict[fx.Node, list[fx.Node]] = {}  # by what they give back in the end
    reading: Counter[fx.Node] = Counter()
    for x in dict.fromkeys(marker.args[1] for marker in gm.graph.nodes if is_marker(marker)):
        steps, source = [], x
        while gives_its_input(gm, source):
            steps.append(source)
            source = source.args[0]
        reading[source] += 1
        idle.setdefault(source, []).extend(steps)
    done = 0
    for source, steps in idle.items():
        if reading[source] > 1:
            for node in dict.fromkeys(steps):
                node.replace_all_uses_with(source)
                gm.graph.erase_node(node)
                done += 1
    return done


def gives_its_input(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` is known to give back the tensor that it reads, and no copy of it."""
    if dropout_state(gm, node) == "idle":
        return isinstance(node.args[0], fx.Node)
    if not is_cast(node) or node.kwargs.keys() - {"dtype"} or len(node.args) > 2:  # it may copy, or lay out anew
        return False
    if node.op == "call_function" and node.target.__name__.startswith(("_to_copy", "convert_element")):
        return False
    before, after = example(node.args[0]), example(node)
    return before is not None and after is not None and before.dtype == after.dtype
