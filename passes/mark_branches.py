"""Replaces each branch that ``find_branches`` found by one marker.

    s = linear(x, A)
    d = linear(s, B)                ->      out = lorafx.branch(y, x, A, B, None, 2.0, None)
    out = y + d * 2.0

A bf16 base under a float32 adapter: the sum is float32 and cast back, which the marker does by itself.

    out = y + linear(linear(x.float(), A), B) * 2.0
    z = out.to(bfloat16)            ->      z = lorafx.branch(y, x, A, B, None, 2.0, None)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from lorafx.passes.branch import Branch
from lorafx.passes.context import PassContext
from lorafx.passes.find_branches import find_branches
from lorafx.passes.graph_reading import KEPT_META, example, is_cast, traced_name
from lorafx.passes.linear_layers import Weight
from lorafx.passes.naming import layer_name, module_path
from lorafx.passes.record import STANDS_FOR, StandIn


def mark_branches(gm: fx.GraphModule, context: PassContext) -> int:
    """Returns how many markers were put; what was refused goes to the record."""
    found = find_branches(gm)
    context.record.skipped += found.skipped
    named = _names(gm, found.branches)
    replaced: dict[fx.Node, fx.Node] = {}
    done = 0
    for branch, meta in zip(found.branches, named, strict=True):
        if traced_name(branch.out) not in context.refused:
            _mark(gm, branch, replaced, meta["name"]).meta["lorafx"] = meta
            done += 1
    return done


def _names(gm: fx.GraphModule, branches: Sequence[Branch]) -> list[dict[str, Any]]:
    """Name, parent and widths of every branch.

    Where a module's forward adds branches to several layers, it is what these have in common. Where it adds to one, it
    is an adapted layer itself, and its parent is.
    """
    layers: dict[str, set[fx.Node]] = defaultdict(set)
    for branch in branches:
        layers[module_path(branch.out)].add(branch.base)
    named = []
    for branch in branches:
        module = module_path(branch.out)
        parent = module if len(layers[module]) > 1 else module.rpartition(".")[0]
        widths = {"in_features": branch.a.in_features, "out_features": branch.b.out_features}
        named.append({"name": layer_name(gm, branch.base), "parent": parent, **widths})
    return named


def _mark(gm: fx.GraphModule, branch: Branch, replaced: dict[fx.Node, fx.Node], name: str) -> fx.Node:
    out, y, x = branch.out, replaced.get(branch.y, branch.y), replaced.get(branch.x, branch.x)
    with gm.graph.inserting_before(out):
        promoted = _promotion(branch.y, out)
        # of two casts each is a tensor of its own, which may be written to
        users = list(out.users)
        casts_back = promoted is not None and len(users) == 1 and _casts_to(users[0], out, example(branch.y).dtype)
        if promoted is not None and not casts_back:
            y = gm.graph.call_method("to", (y, promoted))
        scale = branch.scale_node
        if (value := example(scale)) is not None and value.dim() > 0:
            scale = gm.graph.call_method("reshape", (scale, ()))
            scale.meta["example_value"] = value.reshape(())
        marker = gm.graph.call_function(
            torch.ops.lorafx.branch.default,
            (
                y,
                x,
                _matrix(gm, branch.a),
                _matrix(gm, branch.b),
                _matrix(gm, branch.bias) if branch.bias else None,
                branch.scale,
                scale,
            ),
        )
    marker.meta = {key: value for key, value in out.meta.items() if key in KEPT_META}
    results = [*(users if casts_back else ()), out]
    # of what it replaces, whose memory later writes are known by; y's is another
    if (value := example(results[0])) is not None:
        marker.meta["example_value"] = value
    marker.meta[STANDS_FOR] = StandIn(
        name,
        traced_name(results[0]),
        traced_name(out),
        traced_name(branch.y),
        tuple(map(traced_name, branch.inside)),
        branch.b.path,
        branch.bias.path if branch.bias else None,
        branch.scale,
    )
    for node in results:
        node.replace_all_uses_with(marker)
        gm.graph.erase_node(node)  # an in-place sum would survive dead code elimination
        replaced[node] = marker
    return marker


def _promotion(y: fx.Node, out: fx.Node) -> torch.dtype | None:
    """The dtype of the sum where it is wider than that of ``y`` (a bf16 base and float32 adapters)."""
    before, after = example(y), example(out)
    return after.dtype if before is not None and after is not None and before.dtype != after.dtype else None


def _casts_to(node: fx.Node, source: fx.Node, dtype: torch.dtype) -> bool:
    value = example(node)
    return is_cast(node) and node.args[0] is source and value is not None and value.dtype == dtype


def _matrix(gm: fx.GraphModule, weight: Weight) -> fx.Node:
    """The weight as a node that holds ``[out, in]``."""
    node = weight.node if weight.attr is None else gm.graph.get_attr(weight.attr)
    return gm.graph.call_method("t", (node,)) if weight.transposed else node
