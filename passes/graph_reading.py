"""What a node of an FX graph is, seen from LoRA: a cast, a view, a dropout, a scaling, a sum. Reads, never writes.

The same thing has many spellings: Dynamo leaves functions, ``symbolic_trace`` leaves modules that are called,
``torch.export`` leaves ATen ops, hand-written code uses operators. They are told apart here and in ``linear_layers``.
"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.nn import functional as F

aten = torch.ops.aten

ADD = {operator.add, operator.iadd, torch.add, aten.add.Tensor, aten.add_.Tensor}
ADD_METHODS = {"add", "add_", "__add__", "__iadd__"}
MUL = {operator.mul, operator.imul, torch.mul, torch.multiply, aten.mul.Tensor, aten.mul_.Tensor}
MUL_METHODS = {"mul", "multiply", "mul_"}
DIV = {operator.truediv, operator.itruediv, torch.div, torch.true_divide, aten.div.Tensor}
DIV_METHODS = {"div", "true_divide", "divide", "div_"}
DROPOUT = {F.dropout, torch.dropout, aten.dropout.default}
DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
CAST_METHODS = {"to", "float", "half", "bfloat16", "double", "type", "type_as"}
CAST_FUNCTIONS = {
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    torch.ops.prims.convert_element_type.default,
}
COPY_METHODS = {"contiguous", "clone"}  # never "detach", which would change gradients
COPY_FUNCTIONS = {aten.contiguous.default, aten.clone.default, torch.clone}
VIEW_METHODS = {"view", "reshape", "flatten", "unflatten"}
VIEW_FUNCTIONS = {torch.reshape, torch.flatten, aten.view.default, aten.reshape.default, aten._unsafe_view.default}

TRACED = "lorafx_traced"  # the name of a node in the graph as it was traced
KEPT_META = ("stack_trace", "nn_module_stack", TRACED)  # what a node that replaces another takes over


def traced_name(node: fx.Node) -> str:
    """The node of the traced graph that this one is, or has replaced."""
    return node.meta.get(TRACED, node.name)


def is_function(node: object, targets: set) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def is_method(node: object, names: set[str]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_method" and node.target in names


def module_of(gm: fx.GraphModule, node: object) -> nn.Module | None:
    return gm.get_submodule(node.target) if isinstance(node, fx.Node) and node.op == "call_module" else None


def example(node: object) -> torch.Tensor | None:
    """The fake tensor that tracing left behind, if it did; the tensor itself where the graph's module holds it."""
    if not isinstance(node, fx.Node):
        return None
    value = node.meta.get("example_value", node.meta.get("val"))
    if value is None and node.op == "get_attr" and node.graph.owning_module is not None:
        value = operator.attrgetter(node.target)(node.graph.owning_module)
    return value if isinstance(value, torch.Tensor) else None


def size_hint(size: int | torch.SymInt) -> int:
    """The size that the graph was traced with."""
    return size if isinstance(size, int) else int(size.node.hint)


def argument(node: fx.Node, index: int, name: str, default: object = None) -> object:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def is_cast(node: object) -> bool:
    """A change from one floating dtype to another: the same numbers, up to rounding."""
    if not (is_method(node, CAST_METHODS) or is_function(node, CAST_FUNCTIONS)) or not node.args:
        return False
    before, after = example(node.args[0]), example(node)
    if before is None or after is None:  # a cast to integers would say so
        named = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, torch.dtype)]
        return isinstance(node.args[0], fx.Node) and all(dtype.is_floating_point for dtype in named)
    return before.dtype.is_floating_point and after.dtype.is_floating_point and before.device == after.device


def is_copy(node: object) -> bool:
    """The same numbers in the same dtype, maybe laid out anew."""
    return is_method(node, COPY_METHODS) or is_function(node, COPY_FUNCTIONS)


def is_view(node: object) -> bool:
    return is_method(node, VIEW_METHODS) or is_function(node, VIEW_FUNCTIONS)


def dropout_state(gm: fx.GraphModule, node: object) -> str | None:
    """``"idle"`` for a dropout or identity that passes its input on, ``"active"`` for one that draws, else None."""
    if is_function(node, DROPOUT):
        p = argument(node, 1, "p", 0.5)
        training = argument(node, 2, "train" if node.target is aten.dropout.default else "training", True)
        return "idle" if p == 0 or training is False else "active"
    module = module_of(gm, node)
    if isinstance(module, nn.Identity):
        return "idle"
    if isinstance(module, DROPOUT_MODULES):
        return "active" if module.training and module.p > 0 else "idle"
    return None


def as_addition(node: object) -> tuple[object, object, object] | None:
    """``node = left + right * alpha`` as (left, right, alpha)."""
    if not (is_function(node, ADD) or is_method(node, ADD_METHODS)) or len(node.args) != 2:
        return None
    return (*node.args, node.kwargs.get("alpha", 1)) if node.kwargs.keys() <= {"alpha"} else None


def as_scaling(node: object) -> tuple[fx.Node, float | fx.Node] | None:
    """``node = tensor * scalar`` as (tensor, scalar); the scalar is a number or a node that holds one number.

    A tensor divided by a number counts too.
    """
    if not isinstance(node, fx.Node) or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if is_function(node, MUL) or is_method(node, MUL_METHODS):
        if is_scalar(right) and isinstance(left, fx.Node):
            return left, right
        if is_scalar(left) and isinstance(right, fx.Node):
            return right, left
    elif (is_function(node, DIV) or is_method(node, DIV_METHODS)) and isinstance(right, (int, float)) and right:
        return left, 1 / right
    return None


def as_product(node: object) -> tuple[fx.Node, fx.Node] | None:
    """``node = left * right`` of two tensors, neither known to be a scalar."""
    if not (is_function(node, MUL) or is_method(node, MUL_METHODS)) or as_scaling(node) is not None:
        return None
    return tuple(node.args) if len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args) else None


def is_scalar(value: object) -> bool:
    """One number, also if it is known only at run time: a SymFloat, what ``.item()`` gives, a tensor of one element."""
    if isinstance(value, (int, float)) or is_method(value, {"item"}):
        return True
    if not isinstance(value, fx.Node):
        return False
    held = value.meta.get("example_value", value.meta.get("val"))
    if isinstance(held, (torch.SymFloat, torch.SymInt, float, int)):
        return True
    held = example(value)
    return held is not None and (held.dim() == 0 or (held.dim() == 1 and held.shape[0] == 1))
