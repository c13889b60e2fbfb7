"""Removes what a rewrite left without users."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from lorafx.passes.graph_reading import (
    CAST_FUNCTIONS,
    CAST_METHODS,
    COPY_FUNCTIONS,
    COPY_METHODS,
    DIV,
    DIV_METHODS,
    DROPOUT,
    DROPOUT_MODULES,
    MUL,
    MUL_METHODS,
    VIEW_FUNCTIONS,
    VIEW_METHODS,
    dropout_state,
    module_of,
)
from lorafx.passes.linear_layers import (
    ADDMM,
    LINEAR,
    MATMUL,
    MATMUL_METHODS,
    PERMUTE,
    TRANSPOSE,
    TRANSPOSE_METHODS,
)
from lorafx.passes.memory import is_in_place

# What branches are made of. Nothing else is removed: a call that has no users may be there for what it does.
PURE_FUNCTIONS = LINEAR | MATMUL | ADDMM | MUL | DIV | DROPOUT | TRANSPOSE | PERMUTE | {operator.getitem, getattr}
PURE_FUNCTIONS |= CAST_FUNCTIONS | COPY_FUNCTIONS | VIEW_FUNCTIONS | {torch.permute}
PURE_METHODS = CAST_METHODS | COPY_METHODS | VIEW_METHODS | TRANSPOSE_METHODS | MUL_METHODS | DIV_METHODS
PURE_METHODS |= MATMUL_METHODS | {"permute", "addmm"}
PURE_MODULES = (nn.Linear, nn.Identity, *DROPOUT_MODULES)


def clean_up(gm: fx.GraphModule, context: object = None) -> int:
    """Returns how many nodes were removed."""
    before = len(gm.graph.nodes)
    gm.graph.eliminate_dead_code(is_impure_node=lambda node: not _is_removable(gm, node))
    return before - len(gm.graph.nodes)


def _is_removable(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    if is_in_place(node) or dropout_state(gm, node) == "active":  # a draw moves all later ones
        return False
    if node.op == "call_module":
        module = module_of(gm, node)
        return type(module) in PURE_MODULES and not module._forward_hooks and not module._forward_pre_hooks
    return node.target in (PURE_FUNCTIONS if node.op == "call_function" else PURE_METHODS)
