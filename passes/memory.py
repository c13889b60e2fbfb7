"""When a node may be computed at another place: who writes in place, who shares memory with whom. Reads, never writes.

Fusing moves reads of ``x`` and of the base outputs along the graph. That is right as long as nothing on the way writes
to what they read, and no context that changes what a node does (autocast, no_grad) is entered or left.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable
from functools import cache

import torch
from torch import fx

from lorafx.passes.graph_reading import ADD, DIV, MUL, argument, dropout_state, example, is_function
from lorafx.passes.linear_layers import ADDMM, LINEAR, MATMUL

IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.ipow}
IN_PLACE |= {operator.imod, operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.setitem}
# what always makes new memory; anything else may return a view of what it reads
FRESH = LINEAR | MATMUL | ADDMM | ADD | MUL | DIV
CONTEXT_SWITCHES = ("_set_grad_enabled", "_enter_", "_exit_", "_vmap_", "_jvp_", "_grad_", "_saved_tensors_hooks_")
RANDOM = ("rand", "bernoulli", "multinomial", "normal", "poisson", "dropout")


class Timeline:
    """The order of a graph's nodes, and what happens between them that is not in their arguments."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self._writers = [node for node in graph.nodes if is_in_place(node)]
        self._switches = [node for node in graph.nodes if _switches_context(node)]
        self._sharing: dict[object, list[fx.Node]] = {}  # by memory, made when it is asked for

    def is_quiet(self, first: fx.Node, last: fx.Node, read: Iterable[fx.Node]) -> bool:
        """Nothing strictly between the two nodes writes to what ``read`` holds, or switches a context."""
        start, stop = self.order[first], self.order[last]
        if any(start < self.order[node] < stop for node in self._switches):
            return False
        return self.is_unwritten(first, last, read)

    def is_unwritten(self, first: fx.Node, last: fx.Node, read: Iterable[fx.Node]) -> bool:
        """Nothing strictly between the two nodes writes to what ``read`` holds."""
        start, stop = self.order[first], self.order[last]
        writers = [node for node in self._writers if start < self.order[node] < stop]
        memory = set().union(*map(memory_of, read)) if writers else set()
        return not any(memory & memory_of(target) for node in writers for target in written_by(node))

    def owns(self, node: fx.Node, writer: fx.Node) -> bool:
        """Whether nobody sees what ``writer`` writes into ``node`` but those who read ``writer`` itself."""
        if not self._sharing:
            for other in self.order:
                for key in memory_of(other):
                    self._sharing.setdefault(key, []).append(other)
        before = self.order[writer]
        for other in {other for key in memory_of(node) for other in self._sharing[key]}:
            if other.op in ("placeholder", "get_attr"):
                return False
            if self.order[other] < before and any(self.order[user] > before for user in other.users):
                return False
        return True


def is_in_place(node: fx.Node) -> bool:
    """Whether running ``node`` may change a tensor that exists already."""
    if node.op == "call_method":
        return (node.target.endswith("_") and not node.target.endswith("__")) or node.target in (
            "__setitem__",
            "__iadd__",
        )
    if node.op == "call_module" and node.graph.owning_module is not None:
        return bool(getattr(node.graph.owning_module.get_submodule(str(node.target)), "inplace", False))
    if node.op != "call_function":
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    name = getattr(target, "__name__", "")
    if isinstance(target, torch._ops.HigherOrderOperator):
        return "mutation" in name or "auto_functionalized" in name
    if target in IN_PLACE or (name.endswith("_") and not name.startswith("_")) or "out" in node.kwargs:
        return True
    position = _inplace_position(target)
    return position is not None and argument(node, position, "inplace", False) is not False


def is_movable(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` may be computed elsewhere: it writes nothing and draws nothing."""
    if is_in_place(node) or _switches_context(node) or dropout_state(gm, node) == "active":
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):  # a graph of its own, which may draw
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded not in node.target.tags
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    idle = node.op == "call_module" or dropout_state(gm, node) == "idle"
    return idle or not any(word in name for word in RANDOM)


def memory_of(node: fx.Node) -> set:
    """The memory that ``node`` may share, as keys to compare: storages where they are known, else nodes."""
    keys, stack, seen = set(), [node], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        value = example(node)
        if value is not None:
            keys.add(value.untyped_storage()._cdata)
            continue
        keys.add(node)
        if not _is_fresh(node):
            stack += node.all_input_nodes
    return keys


def _is_fresh(node: fx.Node) -> bool:
    if node.op == "call_module" and node.graph.owning_module is not None:
        return type(node.graph.owning_module.get_submodule(str(node.target))) is torch.nn.Linear
    return is_function(node, FRESH) and not is_in_place(node)


def written_by(node: fx.Node) -> list[fx.Node]:
    """The arguments that ``node``, which is in place, changes."""
    if isinstance(node.target, torch._ops.OpOverload):
        names = [arg.name for arg in node.target._schema.arguments]
        values = dict(zip(names, node.args, strict=False)) | node.kwargs
        written = [
            values.get(arg.name)
            for arg in node.target._schema.arguments
            if arg.alias_info is not None and arg.alias_info.is_write
        ]
        return [value for value in written if isinstance(value, fx.Node)]
    if isinstance(node.target, (torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)):
        return node.all_input_nodes
    target = node.kwargs.get("out", node.args[0] if node.args else None)
    return [target] if isinstance(target, fx.Node) else node.all_input_nodes


def _switches_context(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "").startswith(CONTEXT_SWITCHES)


@cache
def _inplace_position(target: object) -> int | None:
    """Which argument of a function is ``inplace``."""
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None
