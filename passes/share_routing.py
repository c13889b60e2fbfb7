"""Spreads the routing over the rows of the batch once, for all groups, where the lowering is ATen.

    q, v = lorafx.routed_lora(..., slots, ..., None, "aten")         w = lorafx.row_weights(x, slots, ...)
    o = lorafx.routed_lora(..., slots, ..., None, "aten")       ->   q, v = lorafx.routed_lora(..., w, "aten")
                                                                     o = lorafx.routed_lora(..., w, "aten")

Layers whose input has another leading size (an encoder beside a decoder, flattened tokens) get another ``w``.
"""

from __future__ import annotations

import torch
from torch import fx

from lorafx.kernels.ops import resolve_lowering
from lorafx.passes.context import PassContext
from lorafx.passes.graph_reading import example

ROUTED = torch.ops.lorafx.routed_lora.default
X, SLOTS, WEIGHTS, COUNT, WINDOWS, SPREAD, LOWERING = 1, 5, 6, 7, 10, 11, 12  # positions of its arguments


def share_routing(gm: fx.GraphModule, context: PassContext) -> int:
    """Returns how many ops were given what another one needs too, or the first of them."""
    made: dict[str, fx.Node] = {}
    done = 0
    for node in gm.graph.find_nodes(op="call_function", target=ROUTED):
        x = example(node.args[X])
        if x is None or x.dim() < 2 or resolve_lowering(node.args[LOWERING], x) != "aten":
            continue
        rows = str(x.shape[0])
        if rows not in made:
            with gm.graph.inserting_before(node):
                # all slots, not this group's: only the table's first size is read
                made[rows] = gm.graph.call_function(
                    torch.ops.lorafx.row_weights.default,
                    tuple(node.args[i] for i in (X, SLOTS, WEIGHTS, COUNT, WINDOWS)),
                )
        node.update_arg(SPREAD, made[rows])
        done += 1
    return done
