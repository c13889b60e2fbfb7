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

from lorafx.kernels.layer_ops import unbatched
from lorafx.kernels.ops import resolve_lowering
from lorafx.passes.context import PassContext
from lorafx.passes.fuse_layers import ROUTED_LAYER
from lorafx.passes.graph_reading import example

ROUTED = torch.ops.lorafx.routed_lora.default
X, SLOTS, WEIGHTS, COUNT, WINDOWS, SPREAD, LOWERING = 1, 5, 6, 7, 10, 11, 12  # positions of its arguments
LATER = 2  # these but x stand two further among those of the op for other layers
KIND = 3


def share_routing(gm: fx.GraphModule, context: PassContext) -> int:
    """Returns how many ops were given what another one needs too, or the first of them."""
    made: dict[str, fx.Node] = {}
    done = 0
    for node in list(gm.graph.nodes):
        x = example(node.args[X]) if node.target in (ROUTED, ROUTED_LAYER) else None
        if x is None or not _wants_spread(node, x):
            continue
        rows = str(x.shape[0])
        if rows not in made:
            made[rows] = _row_weights(gm, node, rows)
        node.update_arg(SPREAD + _later(node), made[rows])
        done += 1
    return done


def _wants_spread(node: fx.Node, x: torch.Tensor) -> bool:
    if node.target is ROUTED_LAYER:
        return not unbatched(node.args[KIND], x) and node.args[LOWERING + LATER] != "reference"
    return x.dim() >= 2 and resolve_lowering(node.args[LOWERING], x) == "aten"


def _later(node: fx.Node) -> int:
    return LATER if node.target is ROUTED_LAYER else 0


def _row_weights(gm: fx.GraphModule, node: fx.Node, rows: str) -> fx.Node:
    """For all groups with so many rows, of which ``node`` is the first."""
    like = next(one for one in gm.graph.nodes if one is node.args[X] or _has_rows(one, rows))
    later = _later(node)
    windows = node.args[WINDOWS + later]
    while windows.op != "placeholder":  # only its first size is read, which is the whole table's too
        windows = windows.all_input_nodes[0]
    behind = like if like.op != "placeholder" else gm.graph.find_nodes(op="placeholder")[-1]
    with gm.graph.inserting_after(behind):
        return gm.graph.call_function(
            torch.ops.lorafx.row_weights.default,
            (like, *(node.args[i + later] for i in (SLOTS, WEIGHTS, COUNT)), windows),
        )


def _has_rows(node: fx.Node, rows: str) -> bool:
    value = example(node)
    return value is not None and value.dim() > 1 and str(value.shape[0]) == rows
