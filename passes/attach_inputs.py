"""Gives a graph the inputs that its routed ops read: the bank's tensors and the routing of the call.

They are placeholders behind all others, so whoever calls the graph appends them; Dynamo never sees them and so guards
on nothing in them.
"""

from __future__ import annotations

from torch import fx

ROUTED_INPUTS = ("storage", "owner", "scale", "windows", "slots", "weights", "count")
STATIC_INPUTS = ("storage", "owner", "scale", "windows")  # they keep their address
_PREFIX = "lorafx_"


def attach_inputs(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """The placeholders by name; made on the first call."""
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    have = {node.target.removeprefix(_PREFIX): node for node in placeholders if node.target.startswith(_PREFIX)}
    if have:
        return have
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    with gm.graph.inserting_before(first):
        for name in ROUTED_INPUTS:
            node = gm.graph.placeholder(_PREFIX + name)
            # AOTAutograd wants to know where a Dynamo graph's input comes from; None is "not from user code"
            node._dynamo_source = None
            if name in STATIC_INPUTS:
                node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
            have[name] = node
    return have


def has_routed_inputs(gm: fx.GraphModule) -> bool:
    return any(node.target == _PREFIX + "storage" for node in gm.graph.find_nodes(op="placeholder"))
