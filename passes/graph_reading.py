"""What a node of an FX graph is, seen from LoRA: a linear layer, a cast, a scaling, an addition. Reads, never writes.

The same thing has many spellings: Dynamo leaves ``F.linear``, ``symbolic_trace`` leaves ``call_module``, transformers'
Conv1D an ``addmm``, hand-written code ``x @ A``. All of that is told apart here and nowhere else.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

aten = torch.ops.aten

LINEAR = {F.linear, torch._C._nn.linear, aten.linear.default}
MATMUL = {torch.matmul, torch.mm, operator.matmul, aten.matmul.default, aten.mm.default}
ADDMM = {torch.addmm, aten.addmm.default}
ADD = {operator.add, operator.iadd, torch.add, aten.add.Tensor, aten.add_.Tensor}
MUL = {operator.mul, operator.imul, torch.mul, torch.multiply, aten.mul.Tensor, aten.mul_.Tensor}
DROPOUT = {F.dropout, torch.dropout, aten.dropout.default}
TRANSPOSE = {torch.t, torch.transpose, torch.adjoint, aten.t.default, aten.transpose.int}
CAST_METHODS = {"to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous"}
CAST_FUNCTIONS = {aten._to_copy.default, aten.to.dtype, torch.ops.prims.convert_element_type.default}
VIEW_METHODS = {"view", "reshape", "flatten", "unflatten"}
VIEW_FUNCTIONS = {torch.reshape, torch.flatten, aten.view.default, aten.reshape.default, aten._unsafe_view.default}
DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)


@dataclass(frozen=True)
class Weight:
    """A weight matrix in a graph: a node, or ``attr``, the parameter of a module that is called.

    stored as ``[out, in]``, or ``[in, out]`` when ``transposed``
    """

    node: fx.Node | None
    attr: str | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Linear:
    """``node = x @ weight.T (+ bias)``"""

    node: fx.Node
    x: fx.Node
    weight: Weight
    bias: Weight | None = None


def is_function(node: object, targets: set) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def is_method(node: object, names: set[str]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_method" and node.target in names


def module_of(gm: fx.GraphModule, node: object) -> nn.Module | None:
    return gm.get_submodule(node.target) if isinstance(node, fx.Node) and node.op == "call_module" else None


def example(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor that tracing left behind, if it did."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, torch.Tensor) else None


def argument(node: fx.Node, index: int, name: str, default: object = None) -> object:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def as_linear(gm: fx.GraphModule, node: object) -> Linear | None:
    """``node`` as a linear layer whose weight is a parameter (never an activation), or None."""
    if is_function(node, LINEAR):
        weight = _as_weight(argument(node, 1, "weight"))
        bias = argument(node, 2, "bias")
        if weight and isinstance(argument(node, 0, "input"), fx.Node):
            return Linear(node, argument(node, 0, "input"), weight, Weight(bias) if bias is not None else None)
    elif is_function(node, MATMUL) or is_method(node, {"matmul", "mm", "__matmul__"}):
        weight = _as_weight(node.args[1]) if len(node.args) > 1 else None
        if weight and isinstance(node.args[0], fx.Node):
            return Linear(node, node.args[0], _flip(weight))
    elif is_function(node, ADDMM) and not node.kwargs:
        bias, x, weight = node.args[0], node.args[1], _as_weight(node.args[2])
        if weight and isinstance(x, fx.Node) and is_parameter(bias):
            return Linear(node, x, _flip(weight), Weight(bias))
    elif isinstance(module := module_of(gm, node), nn.Linear):
        bias = Weight(None, f"{node.target}.bias") if module.bias is not None else None
        if len(node.args) == 1 and isinstance(node.args[0], fx.Node):
            return Linear(node, node.args[0], Weight(None, f"{node.target}.weight"), bias)
    return None


def is_parameter(node: object) -> bool:
    """A graph input or attribute: the only things that can be a weight."""
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")


def _as_weight(node: object) -> Weight | None:
    transposed = False
    while isinstance(node, fx.Node) and not is_parameter(node):
        if _is_transpose(node):
            transposed = not transposed
        elif not is_cast(node):
            return None
        node = node.args[0]
    if not is_parameter(node):
        return None
    value = example(node)
    return Weight(node, None, transposed) if value is None or value.dim() == 2 else None


def _flip(weight: Weight) -> Weight:
    return Weight(weight.node, weight.attr, not weight.transposed)


def _is_transpose(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("T", "mT")
    if is_function(node, TRANSPOSE) or is_method(node, {"t", "transpose", "permute", "adjoint"}):
        dims = node.args[1:]
        dims = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
        return dims in ((), (0, 1), (1, 0), (-1, -2), (-2, -1))
    return False


def is_cast(node: object) -> bool:
    """A change of dtype or strides: the same numbers, up to rounding."""
    return is_method(node, CAST_METHODS) or is_function(node, CAST_FUNCTIONS)


def is_view(node: object) -> bool:
    return is_method(node, VIEW_METHODS) or is_function(node, VIEW_FUNCTIONS)


def dropout_state(gm: fx.GraphModule, node: object) -> str | None:
    """``"idle"`` for a dropout or identity that passes its input on, ``"active"`` for one that draws, else None."""
    if is_function(node, DROPOUT):
        p = argument(node, 1, "p", 0.5)
        training = argument(node, 2, "training", True)
        return "idle" if p == 0 or training is False else "active"
    module = module_of(gm, node)
    if isinstance(module, nn.Identity):
        return "idle"
    if isinstance(module, DROPOUT_MODULES):
        return "active" if module.training and module.p > 0 else "idle"
    return None


def as_scaling(node: object) -> tuple[fx.Node, float | fx.Node] | None:
    """``node = tensor * scalar`` as (tensor, scalar); the scalar is a number or a node that holds one number."""
    if not (is_function(node, MUL) or is_method(node, {"mul", "multiply", "mul_"})) or len(node.args) < 2:
        return None
    left, right = node.args[:2]
    if _is_scalar(right) and isinstance(left, fx.Node):
        return left, right
    if _is_scalar(left) and isinstance(right, fx.Node):
        return right, left
    return None


def _is_scalar(value: object) -> bool:
    if isinstance(value, (int, float)):
        return True
    if not isinstance(value, fx.Node):
        return False
    held = value.meta.get("example_value", value.meta.get("val"))
    if isinstance(held, (torch.SymFloat, torch.SymInt, float, int)):
        return True
    return isinstance(held, torch.Tensor) and held.dim() == 0


def as_addition(node: object) -> tuple[object, object] | None:
    """``node = left + right`` as (left, right)."""
    if (is_function(node, ADD) or is_method(node, {"add", "add_"})) and len(node.args) == 2 and not node.kwargs:
        return node.args[0], node.args[1]
    return None


def is_in_place(node: fx.Node) -> bool:
    """Whether running ``node`` may change a tensor that exists already."""
    if node.op == "call_method":
        return (node.target.endswith("_") and not node.target.endswith("__")) or node.target == "__setitem__"
    if node.op == "call_function":
        if isinstance(node.target, torch._ops.OpOverload):
            return node.target._schema.is_mutable
        name = getattr(node.target, "__name__", "")
        return (name.endswith("_") and not name.startswith("_")) or node.target in IN_PLACE
    return False


IN_PLACE = {operator.iadd, operator.imul, operator.setitem, operator.isub, operator.itruediv}
