"""Layers under ``torch.utils.checkpoint``: in a Dynamo graph each is one call of a graph of its own.

    out = tag_activation_checkpoint(body, x, A, B)    ->    out = tag_activation_checkpoint(body', x, A, B, slots, ...)

The passes go through these bodies too. What a body's routed ops read becomes an input of the whole graph, handed on to
the body: so the backward, which computes the body again after the call, reads the routing of that call.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from lorafx.passes.attach_inputs import attach_input, routed_inputs

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


def own_bodies(gm: fx.GraphModule) -> dict[str, fx.GraphModule]:
    """A copy of each body that ``gm`` calls, by its path, put in its place: the passes change graphs, and Dynamo reads
    its own. Bodies inside bodies stand before them."""
    for name in _names(gm):
        theirs = gm.get_submodule(name)
        ours = fx.GraphModule(theirs, copy.deepcopy(theirs.graph))
        ours.meta = dict(theirs.meta)
        gm.set_submodule(name, ours)
        own_bodies(ours)
    return bodies_of(gm)


def bodies_of(gm: fx.GraphModule) -> dict[str, fx.GraphModule]:
    """Each body that ``gm`` calls, by its path; bodies inside bodies stand before them."""
    bodies: dict[str, fx.GraphModule] = {}
    for name in _names(gm):
        body = gm.get_submodule(name)
        bodies |= {f"{name}.{inner}": one for inner, one in bodies_of(body).items()}
        bodies[name] = body
    return bodies


def hand_on_inputs(gm: fx.GraphModule, context: object = None) -> int:
    """Give each body that ``gm`` calls what its routed ops read. Returns how many inputs were handed on."""
    done = 0
    for call in _calls(gm):
        wanted = routed_inputs(gm.get_submodule(call.args[0].target))
        call.args = (*call.args, *(attach_input(gm, one) for one in wanted))
        done += len(wanted)
    return done


def draw_again(gm: fx.GraphModule) -> None:
    """For a graph that is run as it is: have its bodies draw the same random numbers when they are computed again.

    The op leaves that to Inductor; run by itself it draws others, and a dropout's gradient is that of another mask.
    """
    for call in _calls(gm):
        draw_again(gm.get_submodule(call.args[0].target))
        call.target = _checkpoint
    gm.recompile()


def _checkpoint(body: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    if "_checkpoint_context_fn" in body.meta:
        kwargs["context_fn"] = body.meta["_checkpoint_context_fn"]
    return checkpoint(body, *args, **{**kwargs, "use_reentrant": False, "preserve_rng_state": True})


def _names(gm: fx.GraphModule) -> list[str]:
    return list(dict.fromkeys(call.args[0].target for call in _calls(gm)))


def _calls(gm: fx.GraphModule) -> list[fx.Node]:
    return gm.graph.find_nodes(op="call_function", target=CHECKPOINT)
