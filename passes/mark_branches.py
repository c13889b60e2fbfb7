"""Replaces each branch that ``find_branches`` found by one marker.

s = linear(x, A); d = linear(s, B); out = y + d * 2.0
->
out = lorafx.branch(y, x, A, B, None, 2.0, None)
"""

from __future__ import annotations

import torch
from torch import fx

from lorafx.passes.context import PassContext
from lorafx.passes.find_branches import Branch, Skipped, _name, clean_path, find_branches
from lorafx.passes.graph_reading import Weight, example, is_cast


def mark_branches(gm: fx.GraphModule, context: PassContext) -> int:
    """Returns how many markers were put; what was refused goes to the record."""
    found = find_branches(gm)
    context.record.skipped += found.skipped
    replaced: dict[fx.Node, fx.Node] = {}
    for branch in found.branches:
        _mark(gm, branch, replaced, context)
    return len(found.branches)


def _mark(gm: fx.GraphModule, branch: Branch, replaced: dict[fx.Node, fx.Node], context: PassContext) -> None:
    out, y = branch.out, replaced.get(branch.y, branch.y)
    with gm.graph.inserting_before(out):
        promoted = _promotion(branch.y, out)
        casts_back = promoted is not None and all(_casts_to(user, example(branch.y).dtype) for user in out.users)
        if promoted is not None and not casts_back:
            y = gm.graph.call_method("to", (y, promoted))
        marker = gm.graph.call_function(
            torch.ops.lorafx.branch.default,
            (
                y,
                branch.x,
                _matrix(gm, branch.a),
                _matrix(gm, branch.b),
                _matrix(gm, branch.bias) if branch.bias else None,
                branch.scale,
                branch.scale_node,
            ),
        )
    marker.meta = {key: value for key, value in out.meta.items() if key in ("stack_trace", "nn_module_stack")}
    value = example(branch.y) if promoted is None or casts_back else example(out)
    if value is not None:
        marker.meta["example_value"] = value
    marker.meta["lorafx"] = {"name": _name(branch.base), "parent": _parent(branch.base)}
    for user in list(out.users) if casts_back else []:
        user.replace_all_uses_with(marker)
        gm.graph.erase_node(user)
    out.replace_all_uses_with(marker)
    gm.graph.erase_node(out)  # an in-place sum would survive dead code elimination
    replaced[out] = marker


def _promotion(y: fx.Node, out: fx.Node) -> torch.dtype | None:
    """The dtype of the sum where it is wider than that of ``y`` (a bf16 base and float32 adapters)."""
    before, after = example(y), example(out)
    return after.dtype if before is not None and after is not None and before.dtype != after.dtype else None


def _casts_to(node: fx.Node, dtype: torch.dtype) -> bool:
    value = example(node)
    return is_cast(node) and value is not None and value.dtype == dtype


def _matrix(gm: fx.GraphModule, weight: Weight) -> fx.Node:
    """The weight as a node that holds ``[out, in]``."""
    node = weight.node if weight.attr is None else gm.graph.get_attr(weight.attr)
    return gm.graph.call_method("t", (node,)) if weight.transposed else node


def _parent(base: fx.Node) -> str:
    """The path of the module that holds the adapted layer: siblings share it."""
    name = _name(base)
    if base.op != "call_module" and not base.meta.get("nn_module_stack"):
        return ""
    stack = [clean_path(path) for path, _ in (base.meta.get("nn_module_stack") or {}).values()]
    # hand-written LoRA computes base and branch in one module: then that module is the parent already
    return name.rpartition(".")[0] if base.op == "call_module" or (stack and stack[-1] == name) else name


__all__ = ["Skipped", "mark_branches"]
