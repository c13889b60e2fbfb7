"""Folds the siblings' own layers into the fused op, whose kernels then compute them too: those in C++ always, those in
Triton where few tokens share the weights (``sgmv.folds``).

    q0 = linear(x, Wq, bias)                            q, k = lorafx.routed_lora([], x, ..., [Wq, Wk], [bias, None])
    k0 = linear(x, Wk)                          ->
    q, k = lorafx.routed_lora([q0, k0], x, ...)

All of a group's layers or none, and none where an adapter may begin at a later position, before which the layers' own
output is wanted: each a linear layer of the same ``x`` and dtype, whose output nobody else reads. How many tokens there
are is asked of the example: a graph that serves several batch sizes keeps what suited the first.
"""

from __future__ import annotations

import math

from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorafx.kernels.ops import resolve_lowering
from lorafx.passes.context import PassContext
from lorafx.passes.graph_reading import example, size_hint
from lorafx.passes.linear_layers import Linear, as_linear
from lorafx.passes.memory import Timeline
from lorafx.passes.share_routing import LOWERING, ROUTED, X

YS = 0


def fold_layers(gm: fx.GraphModule, context: PassContext) -> int:
    """Returns how many layers were folded."""
    if not context.fold:
        return 0
    timeline = Timeline(gm.graph)
    folded = 0
    for node in gm.graph.find_nodes(op="call_function", target=ROUTED):
        x = example(node.args[X])
        lowering = None if x is None else resolve_lowering(node.args[LOWERING], x)
        if lowering not in ("cpp", "triton") or node.kwargs.get("last") is not None:
            continue
        layers = find_layers(gm, timeline, node)
        if layers is None or (lowering == "triton" and not _suits_triton(x, layers, context)):
            continue
        weights = [layer.weight.node for layer in layers]
        biases = [layer.bias.node if layer.bias is not None else None for layer in layers]
        node.args = ([], *node.args[1 : LOWERING + 1], weights, biases)
        folded += len(layers)
    context.record.folded += folded
    return folded


def _suits_triton(x: Tensor, layers: list[Linear], context: PassContext) -> bool:
    from lorafx.kernels import sgmv  # needs Triton, which is not on every machine

    weights = [example(layer.weight.node) for layer in layers]
    if len({weight.stride(0) for weight in weights}) != 1:
        return False  # one stride for all
    tokens = math.prod(size_hint(size) for size in x.shape[:-1])
    return sgmv.folds(tokens, x.shape[-1], [weight.shape[0] for weight in weights], x.dtype, x.device)


def find_layers(gm: fx.GraphModule, timeline: Timeline, node: fx.Node) -> list[Linear] | None:
    """What computed the base outputs that ``node`` takes, if all of it can be folded."""
    layers = [_layer(gm, timeline, node, y) for y in node.args[YS]]
    return None if None in layers else layers


def _layer(gm: fx.GraphModule, timeline: Timeline, node: fx.Node, y: fx.Node) -> Linear | None:
    layer = as_linear(gm, y)
    if layer is None or layer.x is not node.args[X] or set(y.users) != {node}:
        return None
    parts = [part for part in (layer.weight, layer.bias) if part is not None]
    if layer.weight.transposed or any(part.node is None or part.node not in y.all_input_nodes for part in parts):
        return None  # transposed, of a called module, or behind a cast
    read = [layer.x, *(part.node for part in parts)]
    values = [example(value) for value in (y, *read)]
    if any(value is None for value in values) or len({value.dtype for value in values}) != 1:
        return None  # autocast, or unknown
    if any(is_traceable_wrapper_subclass(value) for value in values):
        return None  # a quantised weight, of which only its own class knows the numbers
    if example(layer.weight.node).stride(1) != 1:
        return None
    return layer if timeline.is_quiet(y, node, read) else None
