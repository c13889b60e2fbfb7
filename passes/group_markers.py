"""Decides which markers become one op. Pure: the graph is only read.

Siblings read the same ``x`` and belong to the same parent module: q/k/v, gate/up, k/v of a cross-attention, or a single
one. The fused op takes the place of the first sibling, so what computes the others' base outputs has to move up there;
a sibling for which that would change a result starts a group of its own.

    q = branch(q0, x, ...)                      k0 = linear(x, Wk)           # hoisted
    q1 = rope(q)                        ->      q, k = fused([q0, k0], x, ...)
    k0 = linear(x, Wk)                          q1 = rope(q)
    k = branch(k0, x, ...)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from lorafx.passes.memory import Timeline, is_movable

SITE, BRANCH = torch.ops.lorafx.site.default, torch.ops.lorafx.branch.default


@dataclass(eq=False)
class Group:
    """Markers to fuse, in graph order; ``hoist``: nodes to move before the first of them, in graph order."""

    markers: list[fx.Node]
    hoist: list[fx.Node] = field(default_factory=list)

    @property
    def anchor(self) -> fx.Node:
        return self.markers[0]

    @property
    def x(self) -> fx.Node:
        return self.anchor.args[1]


def group_markers(gm: fx.GraphModule, parent_of: Callable[[fx.Node], str]) -> list[Group]:
    """All groups of ``gm``. ``parent_of`` names the module that a marker's siblings share."""
    timeline = Timeline(gm.graph)
    groups: list[Group] = []
    group_of: dict[fx.Node, Group] = {}
    alike: dict[tuple, list[Group]] = {}
    for node in gm.graph.nodes:
        if not is_marker(node):
            continue
        # the number of the bank, for markers that have one
        key = (node.target, node.args[1], parent_of(node), node.args[2] if node.target is SITE else None)
        for group in alike.setdefault(key, []):
            needed = _to_hoist(gm, timeline, node, group, group_of)
            if needed is not None:
                group.markers.append(node)
                group.hoist = sorted({*group.hoist, *needed}, key=timeline.order.__getitem__)
                break
        else:
            group = Group([node])
            groups.append(group)
            alike[key].append(group)
        group_of[node] = group
    return groups


def is_marker(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (SITE, BRANCH)


def _to_hoist(
    gm: fx.GraphModule, timeline: Timeline, marker: fx.Node, group: Group, group_of: dict[fx.Node, Group]
) -> set[fx.Node] | None:
    """What must move before ``group.anchor`` for ``marker`` to be computed there; None if it can't."""
    order = timeline.order
    anchor = order[group.anchor]
    needed: set[fx.Node] = set()
    stack = list(marker.all_input_nodes)
    while stack:
        node = stack.pop()
        if node in group_of:  # computed where its own group will be
            if order[group_of[node].anchor] >= anchor:
                return None
        elif order[node] > anchor and node not in needed:
            if not is_movable(gm, node):
                return None
            needed.add(node)
            stack += node.all_input_nodes
    read = {arg for node in (marker, *needed) for arg in node.all_input_nodes}
    return needed if timeline.is_quiet(group.anchor, marker, read) else None
