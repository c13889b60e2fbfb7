"""What to call a layer of a graph: its module's path, as far as tracing kept it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import fx

from lorafx.passes.linear_layers import as_linear

WRAPPED = ".base_layer"  # what PEFT calls the layer inside its own; a reader means the outer one


def layer_name(gm: fx.GraphModule, base: fx.Node) -> str:
    """By the weight if it is known where that comes from, else by the module that the layer stands in."""
    if base.op == "call_module":
        return clean_path(str(base.target))
    linear = as_linear(gm, base)
    if linear is not None and linear.weight.node is not None and (path := _parameter_path(linear.weight.node)):
        return clean_path(path.removesuffix(".weight"))
    return module_path(base) or base.name


def module_path(node: fx.Node) -> str:
    """The module whose forward ``node`` stands in; "" where tracing does not say."""
    stack = node.meta.get("nn_module_stack")
    return clean_path(list(stack.values())[-1][0]) if stack else ""


def last_name(path: str) -> str:
    """What a layer is called, with its module where that alone says little: "q_proj", "to_out.0", "gate.weight"."""
    parts = path.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() or parts[-1] == "weight" else parts[-1:])


def told_apart(paths: Sequence[str]) -> list[str]:
    """The end of each dotted path, as long as it takes to tell it from the others: ``q_proj``, but ``q.base``."""
    shown = []
    for path in paths:
        parts = path.split(".")
        others = [other.split(".") for other in paths if other != path]
        length = last_name(path).count(".") + 1
        while length < len(parts) and any(other[-length:] == parts[-length:] for other in others):
            length += 1
        shown.append(".".join(parts[-length:]))
    return shown


def clean_path(path: str) -> str:
    """Dynamo writes ``L['self'].layers[0].q`` or ``L['self']._modules['q']``; a reader wants ``layers.0.q``."""
    path = re.sub(r"\['?([^'\]]+)'?\]", r".\1", path)
    path = re.sub(r"\.(__dict__\.)?_(modules|parameters|buffers)(?=\.)", "", path)
    path = re.sub(r"^(L|G)\.((self|fn)(\.|$))?", "", path)  # "fn" is what torch.compile wraps a module of torch.nn in
    return path.removesuffix(WRAPPED)


def _parameter_path(node: fx.Node) -> str:
    if node.op == "get_attr":
        return str(node.target)
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    return clean_path(source.name() if callable(source.name) else source.name)  # a method up to torch 2.9
