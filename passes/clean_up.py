"""Removes what a rewrite left without users, checks the graph and makes its code anew."""

from __future__ import annotations

import operator

from torch import fx

from lorafx.passes.graph_reading import (
    CAST_FUNCTIONS,
    CAST_METHODS,
    DROPOUT,
    LINEAR,
    MATMUL,
    MUL,
    TRANSPOSE,
    VIEW_FUNCTIONS,
    VIEW_METHODS,
    is_in_place,
)

# What branches are made of. Nothing else is removed: a call that has no users may be there for what it does.
PURE_FUNCTIONS = (
    LINEAR | MATMUL | MUL | DROPOUT | TRANSPOSE | CAST_FUNCTIONS | VIEW_FUNCTIONS | {operator.getitem, getattr}
)
PURE_METHODS = CAST_METHODS | VIEW_METHODS | {"t", "transpose", "permute", "mul", "matmul", "mm"}


def clean_up(gm: fx.GraphModule, context: object = None) -> int:
    """Returns how many nodes were removed."""
    before = len(gm.graph.nodes)
    gm.graph.eliminate_dead_code(is_impure_node=lambda node: not _is_removable(gm, node))
    gm.graph.lint()
    gm.recompile()
    return before - len(gm.graph.nodes)


def _is_removable(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    if node.op == "call_module":
        return not node.is_impure() and not _may_change_state(gm, node)
    if is_in_place(node):
        return False
    return node.target in (PURE_FUNCTIONS if node.op == "call_function" else PURE_METHODS)


def _may_change_state(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Modules with buffers (batch norm) may count calls."""
    return any(True for _ in gm.get_submodule(str(node.target)).buffers())
