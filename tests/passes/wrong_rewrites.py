"""Passes with a bug put in: each makes one fused op, or what stands around it, compute something else.

A bug finds its victim by name, as a real one finds it by its form: what is undone is not touched again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from lorafx.passes import PassContext
from lorafx.passes.attach_inputs import KEY
from lorafx.passes.record import STANDS_FOR
from lorafx.passes.share_routing import COUNT, LOWERING, ROUTED, SLOTS, SPREAD, WEIGHTS

FUSED = torch.ops.lorafx.fused_lora.default
SPREADING = torch.ops.lorafx.row_weights.default
X, A, B, BIASES, SCALES = 1, 2, 3, 4, 5  # of lorafx.fused_lora; x, a and b stand there in lorafx.routed_lora too
SCALE_TABLE, LAYERS = 9, LOWERING + 1  # of lorafx.routed_lora
Bug = Callable[[fx.GraphModule, fx.Node, dict[str, int]], None]


def as_pass(bug: Bug, victim: str) -> Callable[[fx.GraphModule, PassContext], int]:
    """``bug``, done to the op that ``victim`` (the end of a layer's path) is fused into, and told where each stands."""

    def wrong(gm: fx.GraphModule, context: PassContext) -> int:
        for op in gm.graph.nodes:
            if op.target in (FUSED, ROUTED):
                outs = [out for out in op.users if STANDS_FOR in out.meta]
                places = {out.meta[STANDS_FOR].name: out.args[1] for out in outs}
                if any(name.endswith(victim) for name in places):
                    bug(gm, op, {name.rpartition(".")[2]: place for name, place in places.items()})
                    return 1
        return 0

    return wrong


def outs(op: fx.Node, places: dict[str, int], *names: str) -> list[fx.Node]:
    by_place = {out.args[1]: out for out in op.users if out.target is operator.getitem}
    return [by_place[places[name]] for name in names]


def change(op: fx.Node, position: int, index: int, value: object) -> None:
    values = list(op.args[position])
    values[index] = value
    op.update_arg(position, values)


def swap(op: fx.Node, position: int, places: dict[str, int]) -> None:
    values = list(op.args[position])
    q, k = places["q"], places["k"]
    values[q], values[k] = values[k], values[q]
    op.update_arg(position, values)


def before(gm: fx.GraphModule, op: fx.Node, function: Callable, *args: object) -> fx.Node:
    with gm.graph.inserting_before(op):
        return gm.graph.call_function(function, args)


def swapped_weights(gm: fx.GraphModule, op: fx.Node, places: dict[str, int]) -> None:
    swap(op, A, places)
    swap(op, B, places)


def swapped_outputs(gm: fx.GraphModule, op: fx.Node, places: dict[str, int]) -> None:
    q, k = outs(op, places, "q", "k")
    q.args, k.args = k.args, q.args


def swapped_readers(gm: fx.GraphModule, op: fx.Node, places: dict[str, int]) -> None:
    q, k = outs(op, places, "q", "k")
    of_q, of_k = list(q.users), list(k.users)
    for user in of_q:
        user.replace_input_with(q, k)
    for user in of_k:
        user.replace_input_with(k, q)


def lost_scale(gm: fx.GraphModule, op: fx.Node, places: dict[str, int]) -> None:
    change(op, SCALES, places["k"], 1.0)


def scale_twice(gm: fx.GraphModule, op: fx.Node, places: dict[str, int]) -> None:
    change(op, SCALES, places["k"], op.args[SCALES][places["k"]] ** 2)


def missing_bias(gm: fx.GraphModule, op: fx.Node, places: dict[str, int]) -> None:
    change(op, BIASES, places["k"], None)


def other_x(gm: fx.GraphModule, op: fx.Node, places: dict[str, int]) -> None:
    op.update_arg(X, before(gm, op, torch.roll, op.args[X], 1, 0))


def rounded_x(gm: fx.GraphModule, op: fx.Node, places: dict[str, int]) -> None:
    narrow = before(gm, op, torch.Tensor.to, op.args[X], torch.bfloat16)
    op.update_arg(X, before(gm, op, torch.Tensor.to, narrow, torch.float32))


def dropped_sum(gm: fx.GraphModule, op: fx.Node, places: dict[str, int]) -> None:
    change(op, 0, places["k"], before(gm, op, torch.zeros_like, op.args[0][places["k"]]))


def doubled_base(gm: fx.GraphModule, op: fx.Node, places: dict[str, int]) -> None:
    change(op, 0, places["k"], before(gm, op, torch.mul, op.args[0][places["k"]], 2.0))


def wrong_shape(gm: fx.GraphModule, op: fx.Node, places: dict[str, int]) -> None:
    (k,) = outs(op, places, "k")
    k.args = (k.args[0], 7)


def shifted(window: fx.Node, by: int) -> None:
    storage, size, stride, offset = window.args
    window.args = (storage, size, stride, max(offset + by * stride[0], 0))


def a_row_late(gm: fx.GraphModule, op: fx.Node, places: dict[str, int]) -> None:
    shifted(op.args[A][0], 1)


def b_row_early(gm: fx.GraphModule, op: fx.Node, places: dict[str, int]) -> None:
    shifted(op.args[B][places["k"]], -1)


def b_of_another(gm: fx.GraphModule, op: fx.Node, places: dict[str, int]) -> None:
    swap(op, B, places)


def change_routing(gm: fx.GraphModule, op: fx.Node, changed: Callable[[fx.Node], fx.Node], *positions: int) -> None:
    for position in positions:
        op.update_arg(position, changed(op.args[position]))
    if op.args[SPREAD] is not None:  # made of it, for all groups
        like, *_, windows = op.args[SPREAD].args
        routing = (op.args[position] for position in (SLOTS, WEIGHTS, COUNT))
        op.update_arg(SPREAD, before(gm, op, SPREADING, like, *routing, windows))


def routing_of_the_row_above(gm: fx.GraphModule, op: fx.Node, places: dict[str, int]) -> None:
    change_routing(gm, op, lambda table: before(gm, op, torch.roll, table, 1, 0), SLOTS, WEIGHTS)


def routing_weights_lost(gm: fx.GraphModule, op: fx.Node, places: dict[str, int]) -> None:
    change_routing(gm, op, lambda table: before(gm, op, torch.ones_like, table), WEIGHTS)


def shared_routing_doubled(gm: fx.GraphModule, op: fx.Node, places: dict[str, int]) -> None:
    op.update_arg(SPREAD, before(gm, op, torch.mul, op.args[SPREAD], 2.0))


def scales_of_other_sites(gm: fx.GraphModule, op: fx.Node, places: dict[str, int]) -> None:
    op.update_arg(SCALE_TABLE, before(gm, op, torch.roll, op.args[SCALE_TABLE], 1, 1))


def layer_of_another(gm: fx.GraphModule, op: fx.Node, places: dict[str, int]) -> None:
    swap(op, LAYERS, places)


def layers_bias_lost(gm: fx.GraphModule, op: fx.Node, places: dict[str, int]) -> None:
    change(op, LAYERS + 1, places["k"], None)


def forgotten_write(gm: fx.GraphModule, op: fx.Node, places: dict[str, int]) -> None:
    """Takes out what writes to an input of the graph."""
    for node in gm.graph.find_nodes(op="call_method", target="add_"):
        if node.args[0].op == "placeholder" and KEY not in node.args[0].meta:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


# bug: what is undone for it. All of a group, where the bug is in what its siblings share.
IN_BRANCHES = {
    swapped_weights: "qk",
    swapped_outputs: "qk",
    swapped_readers: "qk",
    lost_scale: "k",
    scale_twice: "k",
    missing_bias: "k",
    other_x: "qkv",
    rounded_x: "qkv",
    dropped_sum: "k",
    doubled_base: "k",
    wrong_shape: "k",
}
IN_SITES = {
    swapped_outputs: "qk",
    swapped_readers: "qk",
    other_x: "qkv",
    rounded_x: "qkv",
    a_row_late: "qkv",
    b_row_early: "k",
    b_of_another: "qk",
    routing_of_the_row_above: "qkv",
    routing_weights_lost: "qkv",
    scales_of_other_sites: "qkv",
}
IN_SITES_OF = {
    "aten": {**IN_SITES, dropped_sum: "k", shared_routing_doubled: "qkv"},
    "cpp": {**IN_SITES, layer_of_another: "qk", layers_bias_lost: "k"},
}
