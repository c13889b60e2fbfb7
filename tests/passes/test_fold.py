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


def graph(change: str) -> fx.GraphModule:
    """``linear``, then the op that adapts it, with one thing changed."""
    g = fx.Graph()

    def value(node: fx.Node, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        node.meta["example_value"] = torch.zeros(shape, dtype=dtype)
        return node

    x, other = value(g.placeholder("x"), 2, 4), value(g.placeholder("other"), 2, 4)
    weight = value(g.placeholder("w"), *((4, 3) if change == "transposed" else (3, 4)))
    used = value(g.call_method("float", (weight,)), 3, 4) if change == "cast" else weight
    read = other if change == "another input" else x
    y = value(
        g.call_function(torch.matmul if change == "transposed" else F.linear, (read, used)),
        2,
        3,
        dtype=torch.bfloat16 if change == "autocast" else x.meta["example_value"].dtype,
    )
    if change == "written to":
        value(g.call_method("add_", (x, 1)), 2, 4)
    out = g.call_function(ROUTED, ([y], x, [], [], [], *[None] * 7, "aten" if change == "aten" else "auto"))
    g.output((out, y) if change == "read twice" else out)
    return fx.GraphModule(torch.nn.Module(), g)


def fold(change: str, **context: bool) -> tuple[int, fx.Node]:
    gm = graph(change)
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
