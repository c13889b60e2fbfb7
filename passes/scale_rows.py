"""Writes the markers of DoRA out as arithmetic, which Inductor fuses with what comes after.

    q = lorafx.magnitude(q1, bias, 1, 0)    ->    q = lorafx.scaled_rows(q1, bias, factors, slots, count)

``factors`` is the site's own table, a part of one tensor of the bank: edits in place are seen, nothing is copied.
"""

from __future__ import annotations

import torch
from torch import fx

import lorafx.kernels.row_factors  # noqa: F401  (defines the ops)
from lorafx.passes.attach_inputs import RoutedInput, attach_input
from lorafx.passes.context import PassContext
from lorafx.passes.graph_reading import KEPT_META, traced_name
from lorafx.passes.record import STANDS_FOR, StandIn

MAGNITUDE = torch.ops.lorafx.magnitude.default


def scale_rows(gm: fx.GraphModule, context: PassContext) -> int:
    """Returns how many markers were written out. Those of another bank, or of a site that is a symbol, run eagerly."""
    done = 0
    for node in gm.graph.find_nodes(op="call_function", target=MAGNITUDE):
        y, bias, key, index = node.args
        name = traced_name(node)
        if key != context.bank_key or not isinstance(index, int) or name in context.refused:
            continue
        site = context.sites[index]
        rows, start = context.factors[site.name]
        factors, slots, count = (
            attach_input(gm, wanted)
            for wanted in (
                RoutedInput("factors", start, rows * site.out_features),
                RoutedInput("slots"),
                RoutedInput("count"),
            )
        )
        with gm.graph.inserting_before(node):
            table = gm.graph.call_function(
                torch.as_strided, (factors, (rows, site.out_features), (site.out_features, 1))
            )
            out = gm.graph.call_function(torch.ops.lorafx.scaled_rows.default, (y, bias, table, slots, count))
        out.meta = {name: value for name, value in node.meta.items() if name in (*KEPT_META, "example_value")}
        out.meta[STANDS_FOR] = StandIn(site.name, name, name)
        node.replace_all_uses_with(out)
        gm.graph.erase_node(node)
        done += 1
    return done
