"""Compiles the parts of a graph, and calls them: one compiled layer for all layers of a model.

Whether there are parts is for ``passes/outline.py`` to say. What runs here at each step of each call is kept thin: a
decoder makes as many steps for a token as it has layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from lorafx.kernels.fingerprint import fingerprint
from lorafx.passes.outline import NoOutline, Part, Plan, Window, outline
from lorafx.progress import bar

log = logging.getLogger("lorafx")

# What a part is given was made to measure: checking the shape of everything again, layer by layer, costs more than it
# tells.
UNCHECKED = {"size_asserts": False, "alignment_asserts": False}

Boxed = Callable[[list[Any]], Sequence[Any]]  # empties the list that it is given


def compile_whole(gm: fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any] | None) -> Callable[..., Any]:
    """``gm`` through Inductor."""
    from torch._inductor.compile_fx import compile_fx

    tag = f"{torch.compiler.config.cache_key_tag} lorafx {fingerprint()}"
    with torch.compiler.config.patch(cache_key_tag=tag):
        return compile_fx(gm, list(inputs), config_patches=patches or None)


def compile_alone(gm: fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any] | None) -> tuple[Callable, int]:
    """As ``compile_outlined``, but never in parts."""
    return compile_whole(gm, inputs, patches), 0


def compile_outlined(
    gm: fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any] | None
) -> tuple[Callable[..., Any], int]:
    """``gm`` through Inductor, repeated layers once: what to call, and how many calls share what others compiled.

    inputs: what Inductor is to compile for, one for each placeholder. Where nothing can be shared, ``gm`` is compiled
    whole, and the log says why.
    """
    reason = _unfit(inputs, patches or {})
    if reason is None:
        try:
            plan = outline(gm, inputs)
            parts = [
                boxed(_compile_part(part, {**UNCHECKED, **(patches or {})})) for part in bar(plan.parts, "compiling")
            ]
            log.info("%d part(s) compiled for %d steps", len(parts), len(plan.steps))
            return Outlined(plan, parts), plan.repeats
        except NoOutline as error:
            reason = str(error)
    log.info("the graph is compiled whole: %s", reason)
    return compile_whole(gm, inputs, patches), 0


def _compile_part(part: Part, patches: dict[str, Any] | None) -> Callable[..., Any]:
    """What compiling finds out about the sizes of the first call has to hold for the others too, and is guarded on.

    NoOutline: it does not hold for one of them
    """
    symbolic = next((value for value in part.inputs if isinstance(value, SymInt)), None)
    if symbolic is None:
        return compile_whole(part.module, part.inputs, patches)
    shapes = symbolic.node.shape_env
    before = len(shapes.guards)
    compiled = compile_whole(part.module, part.inputs, patches)
    for guard in shapes.guards[before:]:
        for renaming in part.renamings:
            if not shapes.evaluate_expr(guard.expr.xreplace(renaming)):
                raise NoOutline(f"layers differ in what holds for their sizes: {guard.expr}")
    return compiled


def _unfit(inputs: Sequence[Any], patches: dict[str, Any]) -> str | None:
    """Why parts are not tried at all."""
    from torch._inductor import config

    settings = {"triton.cudagraphs": config.triton.cudagraphs, "freezing": config.freezing}
    settings |= {"cpp_wrapper": config.cpp_wrapper, "fx_wrapper": config.fx_wrapper}
    for name, value in settings.items():
        if patches.get(name, value):
            return f"Inductor's {name} is on"
    for value in inputs:
        if isinstance(value, Tensor) and value.device.type != "cpu":
            return f"parts were not tried on {value.device.type}"
    return None


class Outlined:
    """What runs in the place of the graph. Threads may share it: what a call computes is its own."""

    def __init__(self, plan: Plan, parts: Sequence[Boxed]) -> None:
        self._steps = [(parts[step.part], picker(step.reads), step.dead) for step in plan.steps]
        self._windows = _Windows(plan.windows)
        self._results = [(-1 if place is None else place) for place in plan.results]

    def __call__(self, *args: Any) -> list[Any]:
        values = [*args, *self._windows(args)]
        for part, pick, dead in self._steps:
            inputs = list(pick(values))
            for place in dead:
                values[place] = None
            values += part(inputs)
        values.append(None)
        return [values[place] for place in self._results]


class _Windows:
    """Views of the bank's tensors, made once: they keep their address as long as they are the same objects."""

    def __init__(self, windows: list[Window]) -> None:
        self._windows = windows
        self._bases = sorted({window.base for window in windows})
        self._made: tuple[list[Tensor], list[Tensor]] = ([], [])

    def __call__(self, args: Sequence[Any]) -> list[Tensor]:
        bases = [args[i] for i in self._bases]
        made_of, made = self._made  # one read: another thread may replace both
        if len(made_of) == len(bases) and all(map(_same, made_of, bases)):
            return made
        made = [window.make(args[window.base], *window.args) for window in self._windows]
        self._made = (bases, made)
        return made


def _same(left: object, right: object) -> bool:
    return left is right


def picker(places: Sequence[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """Takes these values out of a list."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1)) if places else itemgetter(slice(0, 0))


def boxed(compiled: Callable[..., Any]) -> Boxed:
    """What AOTAutograd made, called with a list of arguments, without the wrappers that would unpack and pack it.

    ``compile_fx`` returns disable(forward), where forward(*args) calls compiled_fn(list(args)), which takes boxed
    arguments. We are called from Dynamo's own code, where it is disabled already.
    """
    inner = getattr(getattr(compiled, "_torchdynamo_orig_callable", None), "__wrapped__", None)
    if inner is None or isinstance(compiled, fx.GraphModule):
        return lambda inputs: compiled(*inputs)
    return inner


__all__ = ["Outlined", "boxed", "compile_outlined", "compile_whole", "picker"]
