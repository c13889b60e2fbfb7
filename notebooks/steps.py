"""Shows what each pass does to a graph, as the passes really run."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from unittest import mock

from torch import fx

import lorafx.passes
from lorafx.tables import html_table

ADDED, REMOVED = "rgba(46, 160, 67, .28)", "rgba(248, 81, 73, .25)"  # to be read on white and on black
PRE = "margin:0;padding:6px 10px;font-size:12px;line-height:1.45;font-family:monospace"
PRE += ";background:transparent;color:inherit"


@dataclass(frozen=True)
class Step:
    """One pass: what it counted, and the graph's lines before and after it."""

    name: str
    done: int
    before: list[str]
    after: list[str]


@contextmanager
def watching() -> Iterator[list[Step]]:
    """Every pass that lorafx runs in here, in the order in which it runs them."""
    steps: list[Step] = []

    def watched(pass_: lorafx.passes.Pass) -> lorafx.passes.Pass:
        @functools.wraps(pass_)
        def run(gm: fx.GraphModule, context: lorafx.passes.PassContext) -> int:
            before = lines(gm.graph)
            done = pass_(gm, context)
            steps.append(Step(pass_.__name__, done, before, lines(gm.graph)))
            return done

        return run

    with (
        mock.patch.object(lorafx.passes, "FIND", tuple(map(watched, lorafx.passes.FIND))),
        mock.patch.object(lorafx.passes, "REWRITE", tuple(map(watched, lorafx.passes.REWRITE))),
    ):
        yield steps


def lines(graph: fx.Graph) -> list[str]:
    """One line for each call of the graph; what is handed in, and constants, are only named where they are used."""
    shown = []
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        arguments = [_text(a) for a in node.args] + [f"{key}={_text(a)}" for key, a in node.kwargs.items()]
        if node.op == "output":
            shown.append(f"return {arguments[0]}")
            continue
        target = getattr(node.target, "__name__", None) or str(node.target)
        if node.op == "call_method":
            target, arguments = f"{arguments[0]}.{target}", arguments[1:]
        elif str(node.target).startswith("lorafx."):
            target = str(node.target).removesuffix(".default")
        shown.append(f"{_short(node.name)} = {target}({', '.join(arguments)})")
    return shown


def _text(argument: object) -> str:
    if isinstance(argument, fx.Node):
        return _short(str(argument.target) if argument.op == "get_attr" else argument.name)
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(map(_text, argument))}]"
    return repr(argument)


def _short(name: str) -> str:
    """Dynamo's ``l_self_modules_q_parameters_weight_`` is ``q.weight`` to a reader."""
    name = re.sub(r"^l_(self_)?|_$|_default(?=_\d+$|$)", "", name)
    return re.sub(r"_parameters_", ".", re.sub(r"(^|_)modules_", r"\1", name))


class Shown(str):
    """HTML that Jupyter shows."""

    def _repr_html_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return "a picture for Jupyter"


def show(steps: Sequence[Step]) -> Shown:
    """Each pass that changed something: lines that it took in red, lines that it put in green."""
    parts = []
    for step in steps:
        if step.before == step.after:
            continue
        body = []
        for line in difflib.ndiff(step.before, step.after):
            mark, text = line[0], escape(line[2:])
            style = {"-": f"background:{REMOVED};text-decoration:line-through", "+": f"background:{ADDED}"}.get(
                mark, ""
            )
            if mark != "?":
                body.append(f'<span style="display:block;{style}">{text}</span>')
        parts.append(
            f'<div style="border-left:3px solid #8888;margin:0 0 14px 0">'
            f'<div style="padding:2px 10px"><b>{step.name}</b> <span style="opacity:.7">did {step.done}</span></div>'
            f'<div style="overflow-x:auto"><pre style="{PRE}">{"".join(body)}</pre></div></div>'
        )
    return Shown("".join(parts))


def counts(roads: Mapping[str, Sequence[Step]]) -> Shown:
    """What each pass counted, one column for each road."""
    passes = dict.fromkeys(step.name for steps in roads.values() for step in steps)
    rows = [{"pass": name, **{road: _done(steps, name) for road, steps in roads.items()}} for name in passes]
    return Shown(html_table(rows))


def _done(steps: Sequence[Step], name: str) -> int:
    return sum(step.done for step in steps if step.name == name)
