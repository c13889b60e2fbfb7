"""Says why a model is compiled again and again, and what ends that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

MANY = 12  # graphs of one frame; greedy, beams and a static cache together make 7
EXAMPLES = 3


def input_shapes(gm: fx.GraphModule, inputs: Sequence[object]) -> dict[str, str]:
    """The shapes that a graph was traced for, by the name of the input; weights left out."""
    names = [_readable(node.name) for node in gm.graph.nodes if node.op == "placeholder"]
    return {
        name: f"[{', '.join(map(str, value.shape))}]"
        for name, value in zip(names, inputs, strict=True)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    }


def _readable(name: str) -> str:
    """``l_kwargs_input_ids_``, as Dynamo calls it -> ``input_ids``"""
    return name.removeprefix("l_").removeprefix("kwargs_").strip("_")


def reason_now() -> str | None:
    """Inside a backend: which guard of the frame's earlier graphs did not hold, as Dynamo words it. None: it is the
    first graph of its frame."""
    contexts = getattr(torch._dynamo.utils, "get_metrics_context", None)
    reason = getattr(contexts(), "_metrics", {}).get("recompile_reason") if contexts is not None else None
    return str(reason).strip() if reason else None


def advice(model: str, shapes: Sequence[Mapping[str, str]]) -> str:
    """What to say of the graphs of one frame, by the shapes that each was traced for."""
    seen = {name: list(dict.fromkeys(s[name] for s in shapes if name in s)) for name in shapes[-1]}
    changing = [(name, values) for name, values in seen.items() if len(values) > 1]
    changing.sort(key=lambda item: -len(item[1]))
    head = f"lorafx: {len(shapes)} graphs were compiled for one frame of {model}"
    if not changing:
        return f"{head}, for other reasons than shapes: TORCH_LOGS=recompiles says which."
    names = [f"{name} ({', '.join(values[:EXAMPLES])}, ...)" for name, values in changing[:EXAMPLES]]
    return (
        f"{head}, since the shape of {', '.join(names)} changes. To compile fewer: pad inputs to a few lengths, use a"
        " static cache (generate(cache_implementation='static')), or lorafx.compile(..., dynamic=True)."
    )
