"""One layer of a graph, as a reader wants to see it: few boxes, in the order of the data. Reads, never writes.

Each linear layer, each marker and each fused op is a box of its own; what else a module computes is one box, or several
where one would make a circle. A marker is shown as the branch that it stands for: lora_A, lora_B, scale and sum.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from lorafx.passes.attach_inputs import KEY
from lorafx.passes.context import PassContext
from lorafx.passes.graph_reading import example
from lorafx.passes.group_markers import SITE, is_marker
from lorafx.passes.linear_layers import as_linear
from lorafx.passes.naming import layer_name, module_path, told_apart
from lorafx.passes.record import Box, Sketch, op_name

SPREAD = torch.ops.lorafx.row_weights.default
LAYERS = 13  # position of the folded layers among the arguments of lorafx.routed_lora
OPS_SHOWN = 2  # a box of so few ops says which; one of more, how many


@dataclass
class _Box:
    """A box that nodes still join. ``after``: the boxes that it reads."""

    label: str
    kind: str
    ops: list[str] = field(default_factory=list)
    after: set[_Box] = field(default_factory=set)

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def reaches(self, other: _Box) -> bool:
        """Whether ``other`` reads this box, straight or through others."""
        seen, stack = {other}, [other]
        while stack:
            box = stack.pop()
            if box is self:
                return True
            stack += box.after - seen
            seen |= box.after
        return False


def first_layer(gm: fx.GraphModule, context: PassContext) -> str | None:
    """The layer of the first marker, ``model.layers.0``: its path up to and with the first number. "" where the path
    has none: then the graph is taken whole. None: there is no marker."""
    marker = next((node for node in gm.graph.nodes if is_marker(node)), None)
    if marker is None:
        return None
    parts = (module_path(marker) or _marker_name(marker, context)).split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""


def sketch_layer(gm: fx.GraphModule, context: PassContext, layer: str) -> Sketch:
    """What stands in the module ``layer`` ("": anywhere) of ``gm``, before or after its markers were fused."""
    drawing = _Drawing(gm, context, layer)
    for node in gm.graph.nodes:
        if drawing.is_inside(node):
            drawing.add(node)
    return Sketch(layer, drawing.finished())


class _Drawing:
    def __init__(self, gm: fx.GraphModule, context: PassContext, layer: str) -> None:
        self.gm, self.context, self.layer = gm, context, layer
        self.boxes: list[_Box] = []
        self.of: dict[fx.Node, _Box] = {}
        self.joined: dict[str, _Box] = {}  # by the module whose ops it holds: the last box of that module
        self.input = _Box("input", "edge")
        self.ours = _ours(gm)
        self.hidden = self._hidden_inputs()
        inside = (node for node in gm.graph.nodes if self.is_inside(node) and as_linear(gm, node) is not None)
        paths = list(dict.fromkeys(layer_name(gm, node) for node in inside))
        self.names = dict(zip(paths, told_apart(paths), strict=True))

    def is_inside(self, node: fx.Node) -> bool:
        if not node.op.startswith("call_") or node in self.ours:
            return False
        path = module_path(node)
        return not self.layer or path == self.layer or path.startswith(self.layer + ".")

    def add(self, node: fx.Node) -> None:
        """Put ``node``, whose inputs are there already, into a box."""
        group = node.meta.get("lorafx_group")
        if node.target is operator.getitem and self._reads(node) and "lorafx_group" in node.args[0].meta:
            self.of[node] = self.of[node.args[0]]  # one of the outputs of a fused op
        elif group is not None:
            names = ", ".join(told_apart([branch.name for branch in group.branches]))
            folded = len(node.args) > LAYERS and node.args[LAYERS]
            label = f"lorafx.{group.op}\n{names}" + ("\nand the layers themselves" if folded else "")
            self._box(node, label, "fused")
        elif is_marker(node):
            self._branch(node)
        elif (linear := as_linear(self.gm, node)) is not None:
            widths = f"{linear.weight.in_features} → {linear.weight.out_features}"
            self._box(node, f"{self.names[layer_name(self.gm, node)]}\n{widths}", "base")
        else:
            self._join(node)

    def _branch(self, node: fx.Node) -> None:
        y, x = node.args[:2]
        box = self.of.get(x, self.input)
        for label in ("lora_A", "lora_B", "* scale"):
            box = self._new(label, "lora", {box})
        read = {box, *self._reads_of(y)}
        self.of[node] = self._new("+", "lora", read)

    def _box(self, node: fx.Node, label: str, kind: str) -> None:
        self.of[node] = self._new(label, kind, self._reads(node))

    def _join(self, node: fx.Node) -> None:
        """Into the last box of the same module, unless another box then stood both before and after it."""
        module, reads = module_path(node), self._reads(node)
        box = self.joined.get(module)
        if box is None or any(read is not box and box.reaches(read) for read in reads):
            box = self.joined[module] = self._new(_module_label(module), "other", set())
        box.after |= reads - {box}
        box.ops.append(op_name(node))
        self.of[node] = box

    def _new(self, label: str, kind: str, after: set[_Box]) -> _Box:
        box = _Box(label, kind, after=set(after))
        self.boxes.append(box)
        return box

    def _reads(self, node: fx.Node) -> set[_Box]:
        return {box for value in node.all_input_nodes for box in self._reads_of(value)}

    def _reads_of(self, value: fx.Node) -> set[_Box]:
        if value in self.of:
            return {self.of[value]}
        return {self.input} if value in self.hidden else set()

    def _hidden_inputs(self) -> set[fx.Node]:
        """What comes in from outside and leads to the first marker or fused op: hidden states, no mask or cache."""
        ends = (node for node in self.gm.graph.nodes if is_marker(node) or "lorafx_group" in node.meta)
        first = next((node for node in ends if self.is_inside(node)), None)
        stack = [first.args[1]] if first is not None else []
        seen: set[fx.Node] = set()
        outside: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if self.is_inside(node):
                stack += node.all_input_nodes
            elif not _is_weight(node) and node not in self.ours:
                outside.add(node)
        return outside

    def finished(self) -> tuple[Box, ...]:
        """The boxes that hold something, each behind those that it reads; at the end where the data goes."""
        for box in self.boxes:
            if box.ops:
                named = ", ".join(box.ops) if len(box.ops) <= OPS_SHOWN else f"{len(box.ops)} ops"
                box.label = f"{box.label}\n{named}"
        output = _Box("output", "edge", after={self.of[node] for node in self._leaving()})
        order: dict[_Box, int] = {}

        def place(box: _Box) -> None:
            stack = [box]
            while stack:
                waiting = [other for other in self.boxes if other in stack[-1].after and other not in order]
                if waiting:
                    stack.append(waiting[0])
                    continue
                order.setdefault(stack.pop(), len(order))

        order[self.input] = 0
        for box in [*self.boxes, output]:
            place(box)
        return tuple(Box(box.label, box.kind, tuple(sorted(order[other] for other in box.after))) for box in order)

    def _leaving(self) -> list[fx.Node]:
        """What the next layer reads: results of the layer's own code if there are any, since a cache leaves too."""
        leaving = [node for node in self.of if any(user not in self.of for user in node.users)]
        own = [node for node in leaving if module_path(node) == self.layer]
        read = [node for node in leaving if any(user not in self.of and user.op != "output" for user in node.users)]
        return own or read or leaving


def _marker_name(marker: fx.Node, context: PassContext) -> str:
    if marker.target is SITE and isinstance(marker.args[3], int) and marker.args[2] == context.bank_key:
        return context.sites[marker.args[3]].name
    return marker.meta.get("lorafx", {}).get("name", marker.name)


def _ours(gm: fx.GraphModule) -> set[fx.Node]:
    """Windows of the bank, parts of its tables, and the routing spread over the rows: no work of the model."""
    ours: set[fx.Node] = set()
    for node in gm.graph.nodes:
        reads = node.all_input_nodes
        if KEY in node.meta or node.target is SPREAD or (reads and ours.issuperset(reads)):
            ours.add(node)
    return ours


def _is_weight(node: fx.Node) -> bool:
    return node.op == "get_attr" or (node.op == "placeholder" and isinstance(example(node), nn.Parameter))


def _module_label(path: str) -> str:
    """``self_attn``; ``layers.0`` where the last part alone is a number."""
    head, _, last = path.rpartition(".")
    return f"{_short(head)}.{last}" if head and last.isdigit() else last or "model"


def _short(path: str) -> str:
    return path.rpartition(".")[2]
