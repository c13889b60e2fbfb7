"""Gives a graph the inputs that its routed ops read: the bank's tensors and the routing of the call.

They are placeholders behind all others, so whoever calls the graph appends them; Dynamo never sees them and so guards
on nothing in them. The weights are one input, read through constant windows. Of the tables each group gets its own
part where Inductor makes the C++ that reads them: with an offset into a whole table inside it, that C++ would differ
from layer to layer, and be compiled as often.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

ROUTING = ("slots", "weights", "count")  # of the call, as what LAST names; the others keep their address
LAST = "last"
KEY = "lorafx_input"


@dataclass(frozen=True)
class RoutedInput:
    """What a placeholder stands for: one of ROUTING, LAST, or ``storage``, ``windows``, ``owner``, ``scale``,
    ``factors``, or a part.

    start, length: lanes of ``owner``, columns of ``scale``, elements of ``factors``
    """

    name: str
    start: int = 0
    length: int | None = None

    @property
    def of_call(self) -> bool:
        """Another tensor at each call."""
        return self.name in (*ROUTING, LAST)


def attach_input(gm: fx.GraphModule, wanted: RoutedInput) -> fx.Node:
    """Its placeholder; made when it is first asked for. What is of the call comes first."""
    have = {node.meta[KEY]: node for node in _routed(gm)}
    if wanted in have:
        return have[wanted]
    if not have and wanted.name not in ROUTING:
        for name in ROUTING:
            attach_input(gm, RoutedInput(name))
    suffix = "" if wanted.length is None else f"_{wanted.start}_{wanted.length}"
    if wanted.name == LAST:
        place = gm.graph.inserting_after(_routed(gm)[len(ROUTING) - 1])
    else:
        place = gm.graph.inserting_before(next(node for node in gm.graph.nodes if node.op != "placeholder"))
    with place:
        node = gm.graph.placeholder(f"lorafx_{wanted.name}{suffix}")
    node.meta[KEY] = wanted
    # AOTAutograd wants to know where a Dynamo graph's input comes from; None is "not from user code"
    node._dynamo_source = None
    if not wanted.of_call:
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    return node


def routed_inputs(gm: fx.GraphModule) -> list[RoutedInput]:
    """What is to be appended to the inputs of ``gm``, in order; nothing where no routed op was made."""
    return [node.meta[KEY] for node in _routed(gm)]


def _routed(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.find_nodes(op="placeholder") if KEY in node.meta]
