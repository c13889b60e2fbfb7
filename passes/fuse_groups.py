"""Replaces each group of markers by one op.

    q = lorafx.site(q0, x, 1, 0)                     a = storage[A rows of q, k and v]
    k = lorafx.site(k0, x, 1, 1)            ->       q, k, v = lorafx.routed_lora([q0, k0, v0], x, [a], [bq, bk, bv],
    v = lorafx.site(v0, x, 1, 2)                                                  ...routing and tables...)

    q = lorafx.branch(q0, x, Aq, Bq, ...)   ->       q, v = lorafx.fused_lora([q0, v0], x, [Aq, Av], [Bq, Bv], ...)
    v = lorafx.branch(v0, x, Av, Bv, ...)

Weights from the bank are constant windows of one flat storage, which is an input of the graph: edits in place are seen,
and nothing is copied.
"""

from __future__ import annotations

import itertools
import operator

import torch
from torch import fx

from lorafx.kernels.ops import choose_lowering, resolve_lowering
from lorafx.passes.attach_inputs import LAST, ROUTING, RoutedInput, attach_input
from lorafx.passes.context import PassContext, SiteGeometry
from lorafx.passes.graph_reading import KEPT_META, example, size_hint, traced_name
from lorafx.passes.group_markers import SITE, Group, group_markers
from lorafx.passes.record import STANDS_FOR, FusedBranch, FusedGroup, StandIn


def fuse_groups(gm: fx.GraphModule, context: PassContext) -> int:
    """Returns how many groups were fused. Markers of another bank stay, and run eagerly.

    So do those whose site is a symbol: where Dynamo compiles the hook of a layer as a frame of its own, one graph
    serves the hooks of all layers.
    """

    def is_known(marker: fx.Node) -> bool:
        mine = marker.args[2] == context.bank_key and isinstance(marker.args[3], int)
        return mine and traced_name(marker) not in context.refused

    def parent_of(marker: fx.Node) -> str:
        if marker.target is SITE:
            return context.sites[marker.args[3]].parent if is_known(marker) else f"unknown: {marker.name}"
        return marker.meta["lorafx"]["parent"]

    fused = 0
    for group in group_markers(gm, parent_of):
        anchor = group.anchor
        if anchor.target is SITE and not is_known(anchor):
            continue
        for node in group.hoist:
            if anchor < node:  # not there yet, for another group
                anchor.prepend(node)
        with gm.graph.inserting_before(anchor):
            outs = _routed(gm, group, context) if anchor.target is SITE else _fused(gm, group, context)
            outs.meta = {key: value for key, value in anchor.meta.items() if key in KEPT_META}
            outs.meta["lorafx_group"] = context.record.groups[-1]
            outs.meta["example_value"] = [example(marker) for marker in group.markers]
            for i, marker in enumerate(group.markers):
                out = gm.graph.call_function(operator.getitem, (outs, i))
                out.meta = {STANDS_FOR: _stand_in(marker, context), **marker.meta}
                marker.replace_all_uses_with(out)
        for marker in group.markers:
            gm.graph.erase_node(marker)
        fused += 1
    return fused


def _routed(gm: fx.GraphModule, group: Group, context: PassContext) -> fx.Node:
    # in the order of the storage, so that the A's of the group are one matrix
    group.markers.sort(key=lambda marker: context.sites[marker.args[3]].column)
    sites = [context.sites[marker.args[3]] for marker in group.markers]
    # an op that Inductor does not look into needs no inputs of its own: few inputs make short calls
    opaque = example(group.x) is not None and resolve_lowering(context.lowering, example(group.x)) == "cpp"
    adjacent = all(
        left.a_offset + left.capacity * left.in_features == right.a_offset
        and left.lane + left.lanes == right.lane
        and left.column + 1 == right.column
        for left, right in itertools.pairwise(sites)
    )

    def window(offset: int, rows: int, columns: int) -> fx.Node:
        storage = attach_input(gm, RoutedInput("storage"))
        return gm.graph.call_function(torch.as_strided, (storage, (rows, columns), (columns, 1), offset))

    def joined(parts: list[fx.Node], dim: int) -> fx.Node:
        return parts[0] if len(parts) == 1 else gm.graph.call_function(torch.cat, (parts, dim))

    def narrow(name: str, dim: int, run: tuple[int, int]) -> fx.Node:
        return gm.graph.call_function(torch.narrow, (attach_input(gm, RoutedInput(name)), dim, *run))

    def table(name: str, dim: int, runs: list[tuple[int, int]]) -> fx.Node:
        """These runs (start, length) of a table, as one tensor."""
        if adjacent:
            runs = [(runs[0][0], sum(length for _, length in runs))]
        if opaque:
            return joined([narrow(name, dim, run) for run in runs], dim)
        return joined([attach_input(gm, RoutedInput(name, *run)) for run in runs], dim)

    first = sites[0]
    if adjacent:
        a = [window(first.a_offset, sum(site.capacity for site in sites), first.in_features)]
    else:
        a = [window(site.a_offset, site.capacity, site.in_features) for site in sites]
    b = [window(site.b_offset, site.lanes, site.out_features) for site in sites]
    columns = [(site.column, 1) for site in sites]
    runs = [(first.column, len(sites))] if adjacent else columns
    windows = [narrow("windows", 1, run) for run in runs]
    x = group.x
    routing = [attach_input(gm, RoutedInput(name)) for name in ROUTING]
    late = any(site.name in context.late for site in sites)
    _record(context, "routed_lora", first.parent, x, [_site_branch(site) for site in sites])
    if (value := example(x)) is not None:
        for site in sites:
            context.record.shapes[site.name] = tuple(size_hint(size) for size in value.shape)
    return gm.graph.call_function(
        torch.ops.lorafx.routed_lora.default,
        (
            [marker.args[0] for marker in group.markers],
            x,
            a,
            b,
            [site.capacity for site in sites],
            *routing,
            table("owner", 0, [(site.lane, site.lanes) for site in sites]),
            table("scale", 1, columns),
            joined(windows, 1),
            None,
            context.lowering,
        ),
        {"last": attach_input(gm, RoutedInput(LAST))} if late else {},
    )


def _fused(gm: fx.GraphModule, group: Group, context: PassContext) -> fx.Node:
    markers = group.markers
    told = [marker.meta["lorafx"] for marker in markers]
    branches = [
        FusedBranch(one["name"], one["in_features"], one["out_features"], _rank(marker))
        for one, marker in zip(told, markers, strict=True)
    ]
    _record(context, "fused_lora", told[0]["parent"], group.x, branches)
    columns = zip(*(marker.args for marker in markers), strict=True)
    ys, _, a, b, biases, scales, scale_tensors = (list(column) for column in columns)
    # a scale that is a number of Python (SymFloat) goes among the floats, one that is a tensor among the tensors
    for i, node in enumerate(scale_tensors):
        if isinstance(node, fx.Node) and example(node) is None:
            scales[i] = gm.graph.call_function(operator.mul, (node, scales[i]))
            scale_tensors[i] = None
    return gm.graph.call_function(
        torch.ops.lorafx.fused_lora.default,
        (ys, group.x, a, b, biases, scales, scale_tensors, context.lowering),
    )


def _stand_in(marker: fx.Node, context: PassContext) -> StandIn | None:
    """Of a site, whose marker was traced; a branch's was put by a pass, which has said it."""
    if marker.target is not SITE:
        return None
    name = traced_name(marker)
    return StandIn(context.sites[marker.args[3]].name, name, name)


def _rank(marker: fx.Node) -> int | None:
    matrix = example(marker.args[2])
    return None if matrix is None else size_hint(matrix.shape[0])


def _site_branch(site: SiteGeometry) -> FusedBranch:
    return FusedBranch(site.name, site.in_features, site.out_features)


def _record(context: PassContext, op: str, parent: str, x: fx.Node, branches: list[FusedBranch]) -> None:
    value = example(x)
    if value is None:
        group = FusedGroup(parent, tuple(branches), context.lowering, op, "known when it runs")
    else:
        chosen = choose_lowering(context.lowering, value, op=op)
        group = FusedGroup(parent, tuple(branches), chosen[0], op, chosen[1], value.element_size())
    context.record.groups.append(group)
