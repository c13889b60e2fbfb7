"""Inputs to try a graph on: those it was traced with, made so that nothing hides in a zero.

A zero proves nothing: B of an adapter that was never trained is zero, and so is a fresh key/value cache. All-zero
tensors of floating dtype become signed noise, and so do zeros that the graph makes, where something is seen no other
way (the queries of DETR's decoder begin as such); everything else stays as it is, so that indices, masks and shapes
make sense. What a graph may write to is copied for each run; weights that nothing writes to are shared, never copied.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from lorafx.passes.memory import is_in_place, memory_of, written_by

PLAIN = (Tensor, nn.Parameter, nn.Buffer)  # others, such as quantised weights, are never looked into
SMALLEST, LARGEST = 1e-4, 1e4  # factors that keep half precision in its range


class NoProbe(Exception):
    """There is nothing to run the graph on."""


@dataclass(frozen=True)
class Held:
    """Stands for a tensor of a Probe: ``id`` of what the caller gave."""

    key: int


class Probe:
    """Probe inputs and weights of one traced graph.

    inputs: what the graph is called with, in its own form; noise: replace zeros

    NoProbe: some of them are fake, or of a size that nobody knows
    """

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], *, noise: bool = True) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._noise = noise
        self._given: dict[int, Tensor] = {}
        self._tensors: dict[int, Tensor] = {}  # what stands for them
        names = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
        values = [pytree.tree_map(self._take, value) for value in gm.graph.process_inputs(*inputs)]
        self._inputs = list(zip(names, values, strict=False))
        self._attributes = {path: self._take(tensor) for path, tensor in _attributes(gm)}
        self._written = _written(gm)

    def fresh(self) -> tuple[list[Any], dict[str, Tensor]]:
        """Inputs, and attributes by path, for one run. What may be written to is a copy, whose views stay views."""
        memo: dict[int, Any] = {}
        inputs = [pytree.tree_map(lambda v, p=path: self._copied(v, p, memo), value) for path, value in self._inputs]
        return inputs, {path: self._copied(value, path, memo) for path, value in self._attributes.items()}

    def rescale(self, path: str, factor: float) -> None:
        """Multiply the weight that the graph knows by this name."""
        held = self._find(path)
        if held is not None and _is_plain(self._tensors[held.key]):
            tensor = self._tensors[held.key].detach()
            self._tensors[held.key] = tensor * min(max(factor, SMALLEST), LARGEST)

    def size(self, path: str) -> float:
        """Root mean square of that weight; 0 where it is not known."""
        held = self._find(path)
        return rms(self._tensors[held.key]) if held is not None else 0.0

    def _find(self, path: str) -> Held | None:
        held = dict(self._inputs).get(path, self._attributes.get(path))
        return held if isinstance(held, Held) else None

    def _copied(self, value: Any, path: str, memo: dict[int, Any]) -> Any:
        if not isinstance(value, Held):
            return value
        tensor = self._tensors[value.key]
        is_weight = isinstance(self._given[value.key], nn.Parameter) or not _is_plain(tensor)
        if is_weight and path not in self._written:
            return tensor
        if value.key not in memo:
            memo[value.key] = copy.deepcopy(tensor.detach(), memo)  # the memo keeps storages shared
        return memo[value.key]

    def _take(self, value: Any) -> Any:
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            if value.node.hint is None:
                raise NoProbe(f"it has the size {value}, which is known only when it runs")
            return value.node.hint
        if not isinstance(value, Tensor):
            return value
        if isinstance(value, FakeTensor) or value.is_meta:
            raise NoProbe(f"real example inputs are needed, and one of shape {list(value.shape)} is fake")
        if id(value) not in self._tensors:
            self._given[id(value)] = value
            self._tensors[id(value)] = self._without_zeros(value)
        return Held(id(value))

    def _without_zeros(self, value: Tensor) -> Tensor:
        if not (self._noise and _is_plain(value) and value.is_floating_point() and value.numel()) or value.any():
            return value
        return noise_like(value, self._generator)


def noise_like(value: Tensor, generator: torch.Generator) -> Tensor:
    """Signed, of this shape, dtype and layout, and none of it near zero."""
    sign = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
    noise = sign * (0.5 + torch.rand(value.shape, generator=generator))
    return torch.empty_like(value, requires_grad=False).copy_(noise)


def rms(value: Tensor) -> float:
    """Root mean square of the finite elements."""
    value = value.detach().double()
    finite = value[value.isfinite()]
    return float(finite.square().mean().sqrt()) if finite.numel() else 0.0


def _is_plain(value: Tensor) -> bool:
    return type(value) in PLAIN


def _attributes(gm: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that nodes of the graph can read from its module, by path."""
    found = dict(gm.named_parameters(remove_duplicate=False))
    found.update(gm.named_buffers(remove_duplicate=False))
    for node in gm.graph.find_nodes(op="get_attr"):
        value = operator.attrgetter(node.target)(gm)
        if isinstance(value, Tensor):
            found.setdefault(node.target, value)
    yield from found.items()


def _written(gm: fx.GraphModule) -> set[str]:
    """Names of the inputs and attributes that some node may write to."""
    targets = [target for node in gm.graph.nodes if is_in_place(node) for target in written_by(node)]
    memory = set().union(*map(memory_of, targets))
    roots = (node for node in gm.graph.nodes if node.op in ("placeholder", "get_attr"))
    return {str(node.target) for node in roots if memory & memory_of(node)}
