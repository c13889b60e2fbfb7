"""Cuts a graph into parts, of which one serves all repeats of a layer.

    head | layer | layer | layer | layer | tail      ->   parts [head, layer, tail]
                                                          steps [0, 1, 1, 1, 1, 2], each with the values it reads

Values are kept in one list: the inputs of the graph, then constant windows of the bank's tensors, then what each step
returns, in order. A step says which of them it reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lorafx.passes.find_repeats import MINIMUM, Repeat, Rows, find_repeats, reads
from lorafx.passes.graph_reading import argument
from lorafx.passes.graph_values import Values, is_bank_view
from lorafx.passes.memory import RANDOM, is_in_place, is_movable


@dataclass
class Part:
    """One graph to compile, and the values to compile it for.

    renamings: for each call but the first, the symbols of sizes that it has in the place of the first one's
    """

    module: fx.GraphModule
    inputs: list[Any]
    renamings: list[dict[Any, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Window:
    """``make(values[base], *args)``: a view of a tensor that keeps its address."""

    base: int
    make: Callable[..., Tensor]
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Step:
    """A call of a part. reads: positions of its inputs in the list of values; dead: those nobody reads later."""

    part: int
    reads: tuple[int, ...]
    dead: tuple[int, ...]


@dataclass
class Plan:
    """What runs in the place of a graph.

    windows, steps: in order, each appends to the values; results: a position for each output, None for a None
    repeats: calls that need no part of their own
    """

    parts: list[Part] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    results: list[int | None] = field(default_factory=list)
    repeats: int = 0


class NoOutline(Exception):
    """Why a graph is better compiled whole."""


def outline(gm: fx.GraphModule, inputs: Sequence[Any], minimum: int = MINIMUM) -> Plan:
    """The parts of ``gm``, which stays as it is.

    inputs: what it is compiled for, one for each placeholder

    NoOutline: nothing repeats, or it can't be cut
    """
    mode = torch._guards.detect_fake_mode(list(inputs))
    if mode is None:
        raise NoOutline("it was not traced")
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
        raise NoOutline("it needs gradients")
    check_nodes(gm)
    try:
        values = Values(gm, inputs, mode)
    except RuntimeError as error:  # of data, as fake values have none; compiled whole, the graph has its say again
        raise NoOutline(f"a node can't be run on fake values: {error}") from error
    rows = Rows(gm.graph, values)
    shared = Counter(key for node in gm.graph.find_nodes(op="placeholder") for key in values.storages(node))
    if any(shared[key] > 1 for key in rows.writes):
        raise NoOutline("inputs share memory that is written to")  # AOTAutograd guards on that, by their sources
    repeats = find_repeats(rows, minimum)
    if not repeats:
        raise NoOutline(f"nothing in it repeats {minimum} times")
    return _Cutter(gm, inputs, rows).cut(repeats)


def check_nodes(gm: fx.GraphModule) -> None:
    """NoOutline: a node that means something else in a part of the graph, or in another order."""
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op not in ("call_function", "call_method") or isinstance(node.target, torch._ops.HigherOrderOperator):
            raise NoOutline(f"{node.op} {name} has a graph or state of its own")
        if is_in_place(node):
            drawn = any(word in name for word in RANDOM)
        else:
            p = argument(node, 4, "dropout_p", 0.0) if name == "scaled_dot_product_attention" else 0.0
            drawn = not is_movable(gm, node) or p != 0.0
        if drawn:
            raise NoOutline(f"{name} draws random numbers or changes the mode of what follows")
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt) and value.node.hint is None:
            raise NoOutline(f"{name} gives a size that only data tells")


class _Cutter:
    """Makes a plan from what was found."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], rows: Rows) -> None:
        self.gm, self.rows, self.plan = gm, rows, Plan()
        placeholders = gm.graph.find_nodes(op="placeholder")
        self.place: dict[fx.Node, int] = {node: i for i, node in enumerate(placeholders)}  # in the list of values
        self.examples: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True))
        self.examples |= {n: v for n in placeholders if isinstance(v := rows.values[n], torch.SymInt)}
        self.sizes = {v.node.expr: n for n in placeholders if isinstance(v := rows.values[n], torch.SymInt)}
        self.last_step: dict[int, int] = {}

    def cut(self, repeats: list[Repeat]) -> Plan:
        for node in self.gm.graph.nodes:
            if is_bank_view(node):
                base, *constants = node.args
                self.plan.windows.append(Window(self.place[base], node.target, tuple(constants)))
                self._append(node)
        at = 0
        for repeat in repeats:
            self._add([(at, repeat.start)])
            self._add(repeat.bounds())
            at = repeat.stop
        self._add([(at, len(self.rows.nodes))])
        for result in self.gm.graph.output_node().args[0]:
            if isinstance(result, fx.Node):
                self.plan.results.append(self.place[result])
            elif result is None:
                self.plan.results.append(None)
            else:
                raise NoOutline(f"it returns the constant {result!r}")
        self._bury()
        return self.plan

    def _append(self, node: fx.Node) -> None:
        self.place[node] = len(self.place)
        self.examples[node] = self.rows.values[node]

    def _add(self, bounds: list[tuple[int, int]]) -> None:
        """One part for these rows, which are alike, and a step for each."""
        rows = self.rows
        start, stop = bounds[0]
        if start == stop:
            return
        # an input of the part for each tuple of nodes that its calls read at one place
        symbols = [list(dict.fromkeys(rows.symbols(*one))) for one in bounds]
        slots: dict[tuple[fx.Node, ...], int] = {}
        for same in zip(*symbols, strict=True):  # a part has to be told what its symbols are
            if not all(symbol in self.sizes for symbol in same):
                raise NoOutline(f"no input tells the size {same[0]}")
            slots.setdefault(tuple(self.sizes[symbol] for symbol in same), len(slots))
        wiring: list[tuple[fx.Node, int | None]] = []  # each argument of the first call, and its input
        for read in zip(*(reads(rows, *one) for one in bounds), strict=True):
            inside = rows.at.get(read[0], -1) >= start
            wiring.append((read[0], None if inside else slots.setdefault(read, len(slots))))
        returned = [
            i for i in range(stop - start) if any(rows.last_use.get(rows.nodes[a + i], -1) >= b for a, b in bounds)
        ]
        for first, last in bounds:
            for node in (rows.nodes[first + i] for i in returned):
                if not rows.can_cross(node, first, last):
                    raise NoOutline(f"{node.name} is read in several parts, and is written to or no tensor")
        module = self._part(rows.nodes[start:stop], [read[0] for read in slots], wiring, returned)
        renamings = [dict(zip(symbols[0], other, strict=True)) for other in symbols[1:]]
        self.plan.parts.append(Part(module, [self.examples[read[0]] for read in slots], renamings))
        for i, (first, _) in enumerate(bounds):
            places = tuple(self.place[read[i]] for read in slots)
            self.last_step.update(dict.fromkeys(places, len(self.plan.steps)))
            self.plan.steps.append(Step(len(self.plan.parts) - 1, places, ()))
            for offset in returned:
                self._append(rows.nodes[first + offset])
        self.plan.repeats += len(bounds) - 1

    def _part(
        self, nodes: list[fx.Node], slots: list[fx.Node], wiring: list[tuple[fx.Node, int | None]], returned: list[int]
    ) -> fx.GraphModule:
        """A copy of ``nodes`` as a graph of its own, as Dynamo would have made it."""
        graph = fx.Graph()
        inputs = [self._placeholder(graph, i, node) for i, node in enumerate(slots)]
        arguments = iter(wiring)
        copies: dict[fx.Node, fx.Node] = {}

        def copied(arg: fx.Node) -> fx.Node:
            expected, slot = next(arguments)
            assert expected is arg  # fx visits arguments in the order in which Rows did
            return copies[arg] if slot is None else inputs[slot]

        for node in nodes:
            args, kwargs = fx.map_arg(node.args, copied), fx.map_arg(node.kwargs, copied)
            copies[node] = graph.create_node(node.op, node.target, args, kwargs)
            copies[node].meta = dict(node.meta)
        graph.output(tuple(copies[nodes[i]] for i in returned))
        module = fx.GraphModule(nn.Module(), graph)
        module.meta = dict(self.gm.meta)
        if hasattr(self.gm, "_param_name_to_source"):
            module._param_name_to_source = {}
        return module

    def _placeholder(self, graph: fx.Graph, number: int, node: fx.Node) -> fx.Node:
        placeholder = graph.placeholder(f"input_{number}")
        value = self.rows.values[node]
        placeholder.meta["example_value"] = value
        # AOTAutograd reads it in a graph of Dynamo's; a part serves many sources, and None is "not from user code"
        placeholder._dynamo_source = None
        if node.op == "placeholder" and "tensor_dict" in node.meta:
            placeholder.meta["tensor_dict"] = node.meta["tensor_dict"]
        return placeholder

    def _bury(self) -> None:
        """Says of each step what nobody reads after it. Inputs belong to the caller, windows are kept."""
        first = len(self.gm.graph.find_nodes(op="placeholder")) + len(self.plan.windows)
        kept = set(self.plan.results)
        dead: list[list[int]] = [[] for _ in self.plan.steps]
        for place, step in self.last_step.items():
            if place >= first and place not in kept:
                dead[step].append(place)
        self.plan.steps = [replace(step, dead=tuple(d)) for step, d in zip(self.plan.steps, dead, strict=True)]


__all__ = ["NoOutline", "Part", "Plan", "Step", "Window", "check_nodes", "outline"]
