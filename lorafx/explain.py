"""``lorafx.explain``: what was fused, what was left and why, for a terminal, for Jupyter and for scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from torch import nn

from lorafx.backend import GraphRecord, recent
from lorafx.errors import LorafxError
from lorafx.kernels.ops import resolve_lowering
from lorafx.passes.branch import Skipped
from lorafx.passes.record import FusedBranch, FusedGroup
from lorafx.runtime import Runtime, runtime_of
from lorafx.tables import format_table, html_table


@dataclass(repr=False)
class Report:
    """What lorafx did to a model.

    groups: one for each site group, whatever the number of graphs; each with .branches and .lowering
    skipped: layers that stay as they are, each with .reason
    recompiles: graphs that Dynamo made of a frame it had compiled before (another shape or cache, never an adapter)
    retraces: why the bank was packed anew, each time it was
    uncompiled: why calls run as PEFT computes them now, such as merged adapters; empty if they don't
    source: "graphs", or "modules" before the first call: what is there to be fused, as far as modules tell
    """

    groups: list[FusedGroup] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    graphs: list[GraphRecord] = field(default_factory=list)
    retraces: list[str] = field(default_factory=list)
    uncompiled: str = ""
    source: str = "graphs"
    bank: str = ""

    @property
    def recompiles(self) -> int:
        frames = [graph.frame for graph in self.graphs if graph.frame is not None]
        return len(frames) - len(set(frames))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: for JSON, for tests."""
        return {
            "source": self.source,
            "groups": [
                {
                    "parent": group.parent,
                    "op": group.op,
                    "lowering": group.lowering,
                    "branches": [vars(branch) for branch in group.branches],
                }
                for group in self.groups
            ],
            "skipped": [vars(skipped) for skipped in self.skipped],
            "recompiles": self.recompiles,
            "retraces": list(self.retraces),
            "uncompiled": self.uncompiled,
            "graphs": [
                {
                    "seconds": round(graph.seconds, 3),
                    "groups": len(graph.passes.groups),
                    "folded": graph.passes.folded,
                    "outlined": graph.outlined,
                    "ops_before": dict(graph.passes.before),
                    "ops_after": dict(graph.passes.after),
                }
                for graph in self.graphs
            ],
        }

    def table(self) -> list[dict[str, Any]]:
        """One row for each kind of group: equal groups of many layers are counted, not repeated."""
        kinds: Counter[tuple] = Counter()
        for group in self.groups:
            names = ", ".join(branch.name.rpartition(".")[2] for branch in group.branches)
            widths = ", ".join(f"{b.in_features}->{b.out_features}" for b in group.branches)
            kinds[names, widths, group.op, group.lowering] += 1
        return [
            {"groups": count, "branches": names, "widths": widths, "op": op, "lowering": lowering}
            for (names, widths, op, lowering), count in kinds.items()
        ]

    def __str__(self) -> str:
        branches = sum(len(group.branches) for group in self.groups)
        lines = [f"lorafx: {len(self.groups)} group(s) of {branches} LoRA branch(es), {len(self.skipped)} skipped"]
        if self.source == "modules":
            lines[0] += " (from the modules; nothing has been called yet)"
        else:
            lines.append(
                f"{len(self.graphs)} graph(s), {self.recompiles} recompile(s), {len(self.retraces)} retrace(s)"
            )
        if folded := max((graph.passes.folded for graph in self.graphs), default=0):
            lines.append(f"{folded} layer(s) of the model are computed inside the op that adapts them")
        if shared := sum(graph.outlined for graph in self.graphs):
            lines.append(f"{shared} layer(s) run what was compiled for another one like them")
        if self.uncompiled:
            lines.append(f"uncompiled now: {self.uncompiled}")
        if self.groups:
            lines += ["", format_table(self.table())]
        if self.skipped:
            lines += ["", format_table([vars(skipped) for skipped in self.skipped])]
        return "\n".join([*lines, *(["", self.bank] if self.bank else [])])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = str(self).partition("\n")[0]
        html = f"<p><b>{escape(head)}</b></p>" + html_table(self.table())
        if self.skipped:
            html += html_table([vars(skipped) for skipped in self.skipped])
        return html

    def dot(self) -> str:
        """One layer before and after, as Graphviz source: the groups of the first parent that has any."""
        from lorafx.drawing import layer_dot

        return layer_dot(self.groups)

    def svg(self, path: str | Path) -> Path:
        """Draw ``dot()`` to a file. Returns its path. LorafxError: Graphviz is not installed."""
        from lorafx.drawing import write_svg

        return write_svg(self.dot(), Path(path))


def explain(model: nn.Module) -> Report:
    """What lorafx did to ``model``, which ``lorafx.compile`` or ``torch.compile(..., backend="lorafx")`` compiled.

    LorafxError: nothing of lorafx was ever run on it
    """
    runtime = runtime_of(model)
    if runtime is not None:
        return _report_of(runtime)
    mine = {id(parameter) for parameter in model.parameters()}
    graphs = [graph for graph in recent if mine.intersection(graph.parameters)]
    if not graphs:
        raise LorafxError(
            "nothing to explain: this model was not compiled by lorafx.compile, and no graph of it went through"
            ' torch.compile(..., backend="lorafx") yet. Compile it, call it once, then ask again.'
        )
    return report_on(graphs)


def report_on(graphs: Iterable[GraphRecord]) -> Report:
    """One report on several graphs of one model: groups and reasons once each."""
    report = Report(graphs=list(graphs))
    groups = {(tuple(b.name for b in g.branches), g.op): g for graph in report.graphs for g in graph.passes.groups}
    report.groups = list(groups.values())
    report.skipped = list(dict.fromkeys(s for graph in report.graphs for s in graph.passes.skipped))
    return report


def _report_of(runtime: Runtime) -> Report:
    report = report_on(runtime.graphs)
    if not runtime.graphs:
        report.source = "modules"
        report.groups = _groups_from_modules(runtime)
    report.skipped = [Skipped(path, reason) for path, reason in runtime.unfused.items()] + report.skipped
    report.retraces = list(runtime.retraces)
    report.bank = repr(runtime.bank)  # which catches up with the model
    report.uncompiled = runtime.follower.uncompiled or ""
    return report


def _groups_from_modules(runtime: Runtime) -> list[FusedGroup]:
    """Layers of one parent and one input width: what reads the same input, as far as modules can tell."""
    buckets: dict[tuple[str, int], list[FusedBranch]] = {}
    for site in runtime.bank.store.sites:
        branch = FusedBranch(site.name, site.in_features, site.out_features)
        buckets.setdefault((site.parent, site.in_features), []).append(branch)
    lowering = resolve_lowering(runtime.bank.lowering, runtime.bank.store.storage)
    return [FusedGroup(parent, tuple(branches), lowering, "routed_lora") for (parent, _), branches in buckets.items()]
