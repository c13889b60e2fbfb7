"""Decides which markers become one op. Pure: the graph is only read.

Siblings read the same ``x`` and belong to the same parent module: q/k/v, gate/up, k/v of a cross-attention, or a single
one. The fused op takes the place of the first sibling, so what computes the others' base outputs has to move up there;
a sibling for which that would change a result starts a group of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from lorafx.passes.graph_reading import is_cast, is_in_place, is_view

SITE, BRANCH = torch.ops.lorafx.site.default, torch.ops.lorafx.branch.default


@dataclass
class Group:
    """Markers to fuse, in graph order; ``hoist``: nodes to move before the first of them, in graph order."""

    markers: list[fx.Node]
    hoist: list[fx.Node] = field(default_factory=list)

    @property
    def x(self) -> fx.Node:
        return self.markers[0].args[1]


def group_markers(graph: fx.Graph, parent_of: Callable[[fx.Node], str]) -> list[Group]:
    """All groups of ``graph``. ``parent_of`` names the module that a marker's siblings share."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    in_place = [node for node in graph.nodes if is_in_place(node)]
    groups: list[Group] = []
    open_groups: dict[tuple, list[Group]] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in (SITE, BRANCH):
            continue
        key = (node.target, node.args[1], parent_of(node), node.args[2] if node.target is SITE else None)
        for group in open_groups.get(key, []):
            needed = _to_hoist(node, group.markers, order, in_place)
            if needed is not None:
                group.markers.append(node)
                group.hoist = sorted({*group.hoist, *needed}, key=order.__getitem__)
                break
        else:
            groups.append(Group([node]))
            open_groups.setdefault(key, []).append(groups[-1])
    return groups


def _to_hoist(
    marker: fx.Node, members: list[fx.Node], order: dict[fx.Node, int], in_place: Iterable[fx.Node]
) -> list[fx.Node] | None:
    """What must move before ``members[0]`` for ``marker`` to be computed there; None if it can't."""
    anchor = order[members[0]]
    needed: set[fx.Node] = set()
    stack = list(marker.all_input_nodes)
    while stack:
        node = stack.pop()
        if order[node] < anchor or node in needed:
            continue
        if node in members or is_in_place(node):
            return None
        needed.add(node)
        stack += node.all_input_nodes
    if needed:
        last = max(order[node] for node in needed)
        read = {_root(arg) for node in needed for arg in node.all_input_nodes}
        for writer in in_place:
            if anchor < order[writer] < last and any(_root(arg) in read for arg in writer.all_input_nodes):
                return None
    return list(needed)


def _root(node: fx.Node) -> fx.Node:
    """The tensor whose memory ``node`` may be a view of."""
    while (is_view(node) or is_cast(node) or node.op == "call_method") and node.args:
        if not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return node
