"""What every node of a traced graph is worth, as fake values: what tracing left behind, the rest computed here.

Nodes that our passes made carry no example. A part of the graph that is compiled alone needs one for each value that
it is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from lorafx.passes.attach_inputs import KEY

VIEWS = {torch.as_strided, torch.narrow}


class Values:
    """The values of the nodes of a graph.

    gm: its placeholders stand for ``inputs``
    inputs: what a backend is given; fake or real

    RuntimeError: a node has no example and can't be run on fake values
    """

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> None:
        self._values: dict[fx.Node, Any] = {}
        self._storages: dict[fx.Node, frozenset[int]] = {}
        given = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
        alike: dict[Any, Any] = {}  # windows of one tensor and of one size: only their place in it differs
        for node in gm.graph.nodes:
            if "example_value" in node.meta:
                self._values[node] = node.meta["example_value"]
            elif node in given:
                self._values[node] = given[node]
            elif node.op == "call_function":
                key = _size_of_view(node) if is_bank_view(node) else node
                if key not in alike:
                    alike[key] = self._run(node, mode)
                self._values[node] = alike[key]
        # two placeholders may be views of one tensor: the real ones say so where the fake ones don't
        for node, value in given.items():
            if isinstance(value, Tensor):
                self._storages[node] = storages(self._values[node]) | storages(value)

    def __getitem__(self, node: fx.Node) -> Any:
        return self._values.get(node)

    def storages(self, node: fx.Node) -> frozenset[int]:
        """The memory of its tensors, as keys to compare."""
        if node not in self._storages:
            self._storages[node] = storages(self._values.get(node))
        return self._storages[node]

    def _run(self, node: fx.Node, mode: FakeTensorMode) -> Any:
        def value_of(arg: fx.Node) -> Any:
            if arg not in self._values:
                raise RuntimeError(f"nothing is known of {arg.name}, which {node.name} reads")
            return self._values[arg]

        with mode, torch.no_grad():
            return node.target(*fx.map_arg(node.args, value_of), **fx.map_arg(node.kwargs, value_of))


def storages(value: Any) -> frozenset[int]:
    """Keys of the memory of all tensors in ``value``."""
    return frozenset(tensor.untyped_storage()._cdata for tensor in _tensors(value))


def is_bank_view(node: fx.Node) -> bool:
    """A constant window of one of the bank's tensors, which keeps its address: it can be made once and kept."""
    if node.op != "call_function" or node.target not in VIEWS or node.kwargs:
        return False
    base, *constants = node.args
    wanted = base.meta.get(KEY) if isinstance(base, fx.Node) else None
    return wanted is not None and not wanted.of_call and not any(_has_node(arg) for arg in constants)


def _size_of_view(node: fx.Node) -> tuple[Any, ...]:
    """What two windows have in common that differ in their place alone."""
    base, *constants = node.args
    if node.target is torch.narrow:
        dim, _, length = constants
        return node.target, base, dim, length
    size, stride, *_ = constants  # and the place, but for what begins where its base does
    return node.target, base, size, stride


def _has_node(arg: Any) -> bool:
    if isinstance(arg, (list, tuple)):
        return any(map(_has_node, arg))
    return isinstance(arg, fx.Node)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
