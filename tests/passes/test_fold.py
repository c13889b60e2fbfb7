"""Which layers are folded into the op that adapts them, and which have to stay."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from lorafx.kernels import cpp
from lorafx.passes import PassContext
from lorafx.passes.fold_layers import fold_layers
from lorafx.passes.share_routing import ROUTED

pytestmark = pytest.mark.skipif(not cpp.is_built(), reason="no C++20 compiler")
FOLDED = 1


def graph(change: str, lowering: str = "auto", rows: int = 2, default: torch.dtype = torch.float32) -> fx.GraphModule:
    """``linear``, then the op that adapts it, with one thing changed."""
    g = fx.Graph()

    def value(node: fx.Node, *shape: int, dtype: torch.dtype = default) -> fx.Node:
        node.meta["example_value"] = torch.zeros(shape, dtype=dtype)
        return node

    x, other = value(g.placeholder("x"), rows, 4), value(g.placeholder("other"), rows, 4)
    weight = value(g.placeholder("w"), *((4, 3) if change == "transposed" else (3, 4)))
    used = value(g.call_method("float", (weight,)), 3, 4) if change == "cast" else weight
    read = other if change == "another input" else x
    y = value(
        g.call_function(torch.matmul if change == "transposed" else F.linear, (read, used)),
        rows,
        3,
        dtype=torch.bfloat16 if change == "autocast" else x.meta["example_value"].dtype,
    )
    if change == "written to":
        value(g.call_method("add_", (x, 1)), rows, 4)
    out = g.call_function(ROUTED, ([y], x, [], [], [], *[None] * 7, "aten" if change == "aten" else lowering))
    g.output((out, y) if change == "read twice" else out)
    return fx.GraphModule(torch.nn.Module(), g)


def fold(change: str, *how, **context: bool) -> tuple[int, fx.Node]:
    gm = graph(change, *how)
    done = fold_layers(gm, PassContext(**context))
    (node,) = gm.graph.find_nodes(op="call_function", target=ROUTED)
    return done, node


def test_a_plain_layer_goes_into_the_op():
    done, node = fold("nothing")
    assert done == FOLDED
    assert node.args[0] == []
    assert [weight.name for weight in node.args[-2]] == ["w"]
    assert node.args[-1] == [None]


@pytest.mark.parametrize(
    "change", ["transposed", "cast", "another input", "autocast", "written to", "aten", "read twice"]
)
def test_others_stay(change):
    done, node = fold(change)
    assert done == 0
    assert [y.target for y in node.args[0]] == [torch.matmul if change == "transposed" else F.linear]


def test_the_switch():
    assert fold("nothing", fold=False)[0] == 0


@pytest.mark.parametrize(
    ("rows", "dtype", "folded"),
    [(1, torch.bfloat16, True), (64, torch.float16, True), (2, torch.float32, False), (100_000, torch.bfloat16, False)],
)
def test_in_triton_where_few_tokens_share_the_weights(rows, dtype, folded):
    """The weights are 16-bit, and no more tokens read them than a program takes."""
    done, node = fold("nothing", "triton", rows, dtype)
    assert done == (FOLDED if folded else 0)
    assert (node.args[0] == []) == folded


@pytest.mark.parametrize(("apart", "folded"), [(4, 2), (6, 0)])
def test_in_triton_rows_of_all_weights_are_equally_far_apart(apart, folded):
    """The kernel takes one stride for all siblings; the second weight's is ``apart``."""
    g = fx.Graph()
    x, *weights = (g.placeholder(name) for name in ("x", "w0", "w1"))
    x.meta["example_value"] = torch.zeros(2, 4, dtype=torch.bfloat16)
    for weight, stride in zip(weights, (4, apart), strict=True):
        weight.meta["example_value"] = torch.empty_strided((3, 4), (stride, 1), dtype=torch.bfloat16)
    ys = [g.call_function(F.linear, (x, weight)) for weight in weights]
    for y in ys:
        y.meta["example_value"] = torch.zeros(2, 3, dtype=torch.bfloat16)
    g.output(g.call_function(ROUTED, (ys, x, [], [], [], *[None] * 7, "triton")))
    assert fold_layers(fx.GraphModule(torch.nn.Module(), g), PassContext()) == folded
