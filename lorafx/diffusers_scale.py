"""The scale of all adapters for one call, as diffusers' models take it: ``cross_attention_kwargs={"scale": 0.5}``.

diffusers multiplies it into PEFT's layers when the forward begins and divides it out at the end. Traced, that would be
lost, since the fused ops read their scales from the bank. So it becomes weights of the call's selection, and another
scale compiles nothing.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lorafx.selection import Selection

ARGUMENTS = ("cross_attention_kwargs", "attention_kwargs", "joint_attention_kwargs")


def scale_in(root: nn.Module, kwargs: dict[str, Any]) -> float | None:
    """The scale that ``kwargs`` of a call ask for; None where they hold no such dict, or ``root`` isn't diffusers'."""
    given = [value for value in map(kwargs.get, ARGUMENTS) if isinstance(value, dict)]
    if not given or not any(kind.__module__.partition(".")[0] == "diffusers" for kind in type(root).__mro__):
        return None
    return float(given[0].get("scale", 1.0))


def without_scale(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` with nothing left for diffusers to multiply; what the caller gave stays as it is.

    An empty dict becomes None, its default: some pipelines pass the one, some the other, and each is a graph.
    """
    return {
        name: {k: v for k, v in value.items() if k != "scale"} or None
        if name in ARGUMENTS and isinstance(value, dict)
        else value
        for name, value in kwargs.items()
    }


def scaled(selection: Selection, scale: float) -> Selection:
    return tuple(tuple((name, weight * scale) for name, weight in row) for row in selection)
