"""Linear layers in an FX graph, in any spelling. Reads, never writes.

F.linear(x, W, b)    nn.Linear called    x @ W.T    x.matmul(W.t())    torch.addmm(b, x, W)    aten.linear
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.nn import functional as F

from lorafx.passes.graph_reading import argument, example, is_cast, is_copy, is_function, is_method, module_of

aten = torch.ops.aten

LINEAR = {F.linear, torch._C._nn.linear, aten.linear.default}
MATMUL = {torch.matmul, torch.mm, operator.matmul, aten.matmul.default, aten.mm.default}
MATMUL_METHODS = {"matmul", "mm", "__matmul__"}
ADDMM = {torch.addmm, aten.addmm.default}
TRANSPOSE = {torch.t, torch.adjoint, torch.transpose, torch.swapaxes, aten.t.default, aten.transpose.int}
TRANSPOSE |= {aten.numpy_T.default, aten.mT.default}
TRANSPOSE_METHODS = {"t", "adjoint", "transpose", "swapaxes"}
PERMUTE = {torch.permute, aten.permute.default}
TRANSPOSED_ATTRIBUTES = {"T", "mT"}


@dataclass(frozen=True)
class Weight:
    """A weight in a graph: a node, or ``attr``, the parameter of a module that is called.

    shape: as it stands there; a matrix is stored ``[out, in]``, or ``[in, out]`` when ``transposed``
    """

    node: fx.Node | None
    attr: str | None = None
    transposed: bool = False
    shape: tuple | None = None

    @property
    def out_features(self) -> int:
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[0] if self.transposed else self.shape[1]

    @property
    def path(self) -> str:
        """The input or the attribute that holds it."""
        return self.attr if self.node is None else str(self.node.target)

    def flipped(self) -> Weight:
        return replace(self, transposed=not self.transposed)


@dataclass(frozen=True)
class Linear:
    """``node = x @ weight.T (+ bias)``"""

    node: fx.Node
    x: fx.Node
    weight: Weight
    bias: Weight | None = None


def as_linear(gm: fx.GraphModule, node: object) -> Linear | None:
    """``node`` as a linear layer whose weight is a parameter (never an activation), or None."""
    if is_function(node, LINEAR):
        bias = argument(node, 2, "bias")
        return _linear(node, argument(node, 0, "input"), argument(node, 1, "weight"), bias)
    if is_function(node, MATMUL) or is_method(node, MATMUL_METHODS):
        linear = _linear(node, *node.args) if len(node.args) == 2 and not node.kwargs else None
        return replace(linear, weight=linear.weight.flipped()) if linear else None
    if (sides := as_addmm(node)) is not None and is_parameter(sides[0]):
        bias, x, weight, beta, alpha = sides
        linear = _linear(node, x, weight, bias) if (beta, alpha) == (1, 1) else None
        return replace(linear, weight=linear.weight.flipped()) if linear else None
    return _called_module(gm, node)


def as_addmm(node: object) -> tuple[object, object, object, object, object] | None:
    """``node = beta * y + alpha * (x @ weight)`` as (y, x, weight, beta, alpha)."""
    if not (is_function(node, ADDMM) or is_method(node, {"addmm", "addmm_"})):
        return None
    if len(node.args) != 3 or not node.kwargs.keys() <= {"beta", "alpha"}:
        return None
    return (*node.args, node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1))


def product_of_addmm(node: fx.Node) -> Linear | None:
    """The product in ``addmm(y, x, weight)``, apart from the sum: a linear layer without bias."""
    _, x, weight, _, _ = as_addmm(node)
    linear = _linear(node, x, weight)
    return replace(linear, weight=linear.weight.flipped()) if linear else None


def is_parameter(node: object) -> bool:
    """A graph input or attribute: the only things that can be a weight."""
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")


def _linear(node: fx.Node, x: object, weight: object, bias: object = None) -> Linear | None:
    matrix = _as_weight(weight)
    if matrix is None or not isinstance(x, fx.Node) or (bias is not None and not isinstance(bias, fx.Node)):
        return None
    return Linear(node, x, matrix, Weight(bias) if bias is not None else None)


def _called_module(gm: fx.GraphModule, node: object) -> Linear | None:
    """Subclasses and modules with hooks may compute something else: they are opaque."""
    module = module_of(gm, node)
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return None
    if len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
        return None
    bias = Weight(None, f"{node.target}.bias") if module.bias is not None else None
    weight = Weight(None, f"{node.target}.weight", shape=tuple(module.weight.shape))
    return Linear(node, node.args[0], weight, bias)


def _as_weight(node: object) -> Weight | None:
    transposed = False
    while isinstance(node, fx.Node) and not is_parameter(node):
        swaps = _swaps(node)
        if swaps is None and not is_cast(node) and not is_copy(node):
            return None
        transposed ^= bool(swaps)
        node = node.args[0]
    value = example(node)
    # transposes are read as those of a matrix: of anything else, or of what is not known, nothing is said
    return Weight(node, None, transposed, tuple(value.shape)) if value is not None and value.dim() == 2 else None


def _swaps(node: fx.Node) -> bool | None:
    """Whether ``node`` swaps the two dimensions of a matrix; None if it is not of that kind."""
    if is_function(node, {getattr}):
        return True if node.args[1] in TRANSPOSED_ATTRIBUTES else None
    if is_function(node, TRANSPOSE) or is_method(node, TRANSPOSE_METHODS):
        dims = (argument(node, 1, "dim0"), argument(node, 2, "dim1"))
        dims = (0, 1) if dims == (None, None) else dims
        return len({d % 2 for d in dims}) == 2 if all(isinstance(d, int) for d in dims) else None
    if is_function(node, PERMUTE) or is_method(node, {"permute"}):
        dims = argument(node, 1, "dims")
        dims = dims if isinstance(dims, Sequence) else node.args[1:]
        return [d % 2 for d in dims] == [1, 0] if all(isinstance(d, int) for d in dims) else None
    return None
