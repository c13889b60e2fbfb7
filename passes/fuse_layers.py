"""Replaces the marker of each adapted embedding and convolution by the op that reads the bank.

    e = lorafx.layer_site(e0, ids, None, "embedding", [], 1, 0)
                                    ->  e = lorafx.routed_layer(e0, ids, None, "embedding", [], a, b, ...tables...)

Each by itself: such layers hardly ever share an input, and where they do there is no A that could be one matrix.
"""

from __future__ import annotations

import torch
from torch import fx

from lorafx.kernels.layer_ops import choose_lowering, rows_shape
from lorafx.passes.attach_inputs import ROUTING, RoutedInput, attach_input
from lorafx.passes.context import PassContext, SiteGeometry
from lorafx.passes.graph_reading import example, size_hint, traced_name
from lorafx.passes.record import STANDS_FOR, FusedBranch, FusedGroup, StandIn

LAYER_SITE, ROUTED_LAYER = torch.ops.lorafx.layer_site.default, torch.ops.lorafx.routed_layer.default


def fuse_layers(gm: fx.GraphModule, context: PassContext) -> int:
    """Returns how many markers were replaced. Those of another bank, or of a site that is a symbol, run eagerly."""
    done = 0
    for marker in gm.graph.find_nodes(op="call_function", target=LAYER_SITE):
        *_, bank, site = marker.args
        name = traced_name(marker)
        if bank != context.bank_key or not isinstance(site, int) or name in context.refused:
            continue
        with gm.graph.inserting_before(marker):
            out = _routed(gm, marker, context.sites[site], context.lowering)
        out.meta = {**marker.meta, STANDS_FOR: StandIn(context.sites[site].name, name, name)}
        marker.replace_all_uses_with(out)
        gm.graph.erase_node(marker)
        _record(context, context.sites[site], out)
        out.meta["lorafx_group"] = context.record.groups[-1]
        done += 1
    return done


def _routed(gm: fx.GraphModule, marker: fx.Node, site: SiteGeometry, lowering: str) -> fx.Node:
    storage = attach_input(gm, RoutedInput("storage"))

    def window(offset: int, rows: int, columns: int) -> fx.Node:
        return gm.graph.call_function(torch.as_strided, (storage, (rows, columns), (columns, 1), offset))

    return gm.graph.call_function(
        ROUTED_LAYER,
        (
            *marker.args[:5],
            window(site.a_offset, site.capacity, site.in_features),
            window(site.b_offset, site.lanes, site.out_features),
            *(attach_input(gm, RoutedInput(name)) for name in ROUTING),
            attach_input(gm, RoutedInput("owner", site.lane, site.lanes)),
            attach_input(gm, RoutedInput("scale", site.column, 1)),
            gm.graph.call_function(torch.narrow, (attach_input(gm, RoutedInput("windows")), 1, site.column, 1)),
            None,
            lowering,
        ),
    )


def _record(context: PassContext, site: SiteGeometry, node: fx.Node) -> None:
    x, kind = example(node.args[1]), node.args[3]
    chosen, reason = choose_lowering(context.lowering)
    branch = FusedBranch(site.name, site.in_features, site.out_features)
    size = 4 if x is None else x.element_size()
    context.record.groups.append(FusedGroup(site.parent, (branch,), chosen, f"routed_{kind}", reason, size))
    if x is not None:
        context.record.shapes[site.name] = rows_shape(kind, tuple(map(size_hint, x.shape)))
