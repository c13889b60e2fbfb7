"""Spreads the routing over the rows of the batch once, for all groups, where the lowering is ATen.

    q, v = lorafx.routed_lora(..., slots, ..., None, "aten")         w = lorafx.row_weights(x, slots, ...)
    o = lorafx.routed_lora(..., slots, ..., None, "aten")       ->   q, v = lorafx.routed_lora(..., w, "aten")
                                                                     o = lorafx.routed_lora(..., w, "aten")

``w`` depends on sizes alone, and is made where the first value with as many rows is, so that the first layer is like
the others. Layers whose input has another leading size (an encoder beside a decoder, flattened tokens) get another.
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
            made[rows] = _row_weights(gm, node, rows)
        node.update_arg(SPREAD, made[rows])
        done += 1
    return done


def _row_weights(gm: fx.GraphModule, node: fx.Node, rows: str) -> fx.Node:
    """For all groups with so many rows, of which ``node`` is the first."""
    like = next(one for one in gm.graph.nodes if one is node.args[X] or _has_rows(one, rows))
    windows = node.args[WINDOWS]
    while windows.op != "placeholder":  # only its first size is read, which is the whole table's too
        windows = windows.all_input_nodes[0]
    behind = like if like.op != "placeholder" else gm.graph.find_nodes(op="placeholder")[-1]
    with gm.graph.inserting_after(behind):
        return gm.graph.call_function(
            torch.ops.lorafx.row_weights.default, (like, *(node.args[i] for i in (SLOTS, WEIGHTS, COUNT)), windows)
        )


def _has_rows(node: fx.Node, rows: str) -> bool:
    value = example(node)
    return value is not None and value.dim() > 1 and str(value.shape[0]) == rows
