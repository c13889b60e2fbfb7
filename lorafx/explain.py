"""``lorafx.explain``: what was fused, what was left and why, for a terminal, for Jupyter and for scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from torch import nn

from lorafx import drawing, layer_kinds
from lorafx.backend import GraphRecord, recent
from lorafx.errors import LorafxError
from lorafx.experts import is_of_experts
from lorafx.footprint import Memory, Ranks, WorkTable, memory_of, ranks_in_bank, ranks_in_graph, work_of
from lorafx.kernels import experts, layer_ops
from lorafx.kernels.cost import GPUS
from lorafx.kernels.ops import choose_lowering
from lorafx.passes.branch import Skipped
from lorafx.passes.naming import told_apart
from lorafx.passes.record import FusedBranch, FusedGroup, Sketch
from lorafx.runtime import Runtime, runtime_of
from lorafx.tables import format_table, html_table
from lorafx.untraced_layers import untraced_layers

CHOSEN = {"cpp": "C++", "aten": "ATen", "triton": "Triton", "reference": "reference"}


@dataclass(repr=False)
class Report:
    """What lorafx did to a model.

    groups: one for each site group, whatever the number of graphs; each with .branches, .lowering and its .reason
    skipped: layers that stay as they are, each with .reason
    retraces: why the bank was packed anew, each time it was
    uncompiled: why calls run as PEFT computes them now, such as merged adapters; empty if they don't
    graphs: one record for each graph that was compiled: seconds, ops before and after, the code before and after
    source: "graphs", or "modules" before the first call: what is there to be fused, as far as modules tell
    untraced: why there is no graph, where the source is "modules"
    work: ops, FLOPs and bytes of ``tokens`` tokens, for separate branches and fused; counted from shapes, not measured
    memory: what the bank holds; None where there is no bank
    bank: the table of adapters, as text
    ranks: by path of a layer, those that stand in the bank there
    """

    groups: list[FusedGroup] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    graphs: list[GraphRecord] = field(default_factory=list)
    retraces: list[str] = field(default_factory=list)
    uncompiled: str = ""
    source: str = "graphs"
    untraced: str = "nothing has been called yet"
    bank: str = ""
    ranks: Mapping[str, Ranks] = field(default_factory=dict)
    work: WorkTable | None = None
    memory: Memory | None = None

    @property
    def recompiles(self) -> int:
        """Graphs that Dynamo made of a frame it had compiled before: another shape or cache, never an adapter."""
        frames = [graph.frame for graph in self.graphs if graph.frame is not None]
        return len(frames) - len(set(frames))

    @property
    def folded(self) -> int:
        """Layers of the model that are computed inside the op that adapts them."""
        return max((graph.passes.folded for graph in self.graphs), default=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: for JSON, for tests."""
        return {
            "source": self.source,
            "groups": [
                {
                    "parent": group.parent,
                    "op": group.op,
                    "lowering": group.lowering,
                    "reason": group.reason,
                    "branches": [self._branch_dict(branch) for branch in group.branches],
                }
                for group in self.groups
            ],
            "skipped": [vars(skipped) for skipped in self.skipped],
            "recompiles": self.recompiles,
            "retraces": list(self.retraces),
            "uncompiled": self.uncompiled,
            "work": self.work.to_dict() if self.work else None,
            "memory": asdict(self.memory) if self.memory else None,
            "graphs": [
                {
                    "seconds": round(graph.seconds, 3),
                    "groups": len(graph.passes.groups),
                    "folded": graph.passes.folded,
                    "proved": graph.passes.proved,
                    "outlined": graph.outlined,
                    "recompiled": graph.recompiled,
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
            names = ", ".join(told_apart([branch.name for branch in group.branches]))
            inputs = {branch.in_features for branch in group.branches}
            outputs = ", ".join(str(branch.out_features) for branch in group.branches)
            widths = f"{' or '.join(map(str, sorted(inputs, key=str)))} -> {outputs}"
            ranks = sorted({rank for branch in group.branches for rank in self._ranks(branch).loaded})
            shown = ", ".join(map(str, ranks)) if len(ranks) < 6 else f"{ranks[0]} to {ranks[-1]}"
            lowering = CHOSEN.get(group.lowering, group.lowering)
            kinds[
                names, widths, shown or "-", group.op, f"{lowering}: {group.reason}" if group.reason else lowering
            ] += 1
        return [
            {"groups": count, "branches": names, "widths": widths, "ranks": ranks, "op": op, "lowering": lowering}
            for (names, widths, ranks, op, lowering), count in kinds.items()
        ]

    def _branch_dict(self, branch: FusedBranch) -> dict[str, Any]:
        ranks = self._ranks(branch)
        widths = {"in_features": branch.in_features, "out_features": branch.out_features}
        return {"name": branch.name, **widths, "ranks": list(ranks.loaded), "rows": ranks.rows}

    def _ranks(self, branch: FusedBranch) -> Ranks:
        return self.ranks.get(branch.name) or ranks_in_graph(branch)

    def __str__(self) -> str:
        lines = [*self._headlines()]
        if self.groups:
            lines += ["", format_table(self.table())]
        if self.work:
            lines += ["", self.work.title, format_table(self.work.rows())]
        if self.skipped:
            lines += ["", "left as they are:", format_table(self._reasons())]
        if self.memory and self.memory.adapters:
            lines += ["", self.memory.sentence()]
        return "\n".join([*lines, *(["", self.bank] if self.bank else [])])

    __repr__ = __str__

    def _headlines(self) -> list[str]:
        branches = sum(len(group.branches) for group in self.groups)
        lines = [f"lorafx: {len(self.groups)} group(s) of {branches} LoRA branch(es), {len(self.skipped)} skipped"]
        if self.source == "modules":
            lines[0] += f" (from the modules; {self.untraced})"
        else:
            lines.append(
                f"{len(self.graphs)} graph(s), {self.recompiles} recompile(s), {len(self.retraces)} retrace(s)"
            )
            reasons = dict.fromkeys(graph.recompiled.splitlines()[0] for graph in self.graphs if graph.recompiled)
            lines += [f"recompiled: {reason}" for reason in reasons]
        if proved := sum(graph.passes.proved or 0 for graph in self.graphs):
            lines.append(f"{proved} LoRA branch(es) gave the same on probe inputs, in all graphs")
        if self.folded:
            lines.append(f"{self.folded} layer(s) of the model are computed inside the op that adapts them")
        if shared := sum(graph.outlined for graph in self.graphs):
            lines.append(f"{shared} layer(s) run what was compiled for another one like them")
        if self.uncompiled:
            lines.append(f"uncompiled now: {self.uncompiled}")
        return lines

    def _reasons(self) -> list[dict[str, Any]]:
        """Equal reasons once, with how often and where first."""
        first: dict[str, str] = {}
        for skipped in self.skipped:
            first.setdefault(skipped.reason, skipped.name)
        counts = Counter(skipped.reason for skipped in self.skipped)
        return [{"layers": counts[reason], "first": name, "reason": reason} for reason, name in first.items()]

    def _repr_html_(self) -> str:
        """For Jupyter: the same tables, and the layer before and after."""
        head, *more = self._headlines()
        parts = [f"<p><b>{escape(head)}</b>{''.join(f'<br>{escape(line)}' for line in more)}</p>"]
        if self.groups:
            parts.append(html_table(self.table()))
        if self.work:
            parts += [f"<p>{escape(self.work.title)}</p>", html_table(self.work.rows())]
        if self.skipped:
            parts += ["<p>left as they are:</p>", html_table(self._reasons())]
        if self.memory and self.memory.adapters:
            parts.append(f"<p>{escape(self.memory.sentence())}</p>")
        if self.groups:
            parts.append(
                "<details open><summary>one layer, before and after</summary>"
                f"<div style='overflow-x:auto'>{drawing.draw(*self._picture())}</div></details>"
            )
        return "".join(parts)

    def dot(self) -> str:
        """The first layer that has a group, before and after, as Graphviz source."""
        return drawing.dot_of(*self._picture())

    def svg(self, path: str | Path) -> Path:
        """Draw that layer to a file: by Graphviz where its program ``dot`` is installed, else by lorafx. Returns the
        path. LorafxError: it can't be written."""
        return drawing.write_svg(drawing.draw(*self._picture()), Path(path))

    def _picture(self) -> tuple[tuple[Sketch, Sketch] | None, int]:
        """What is drawn, and how many layers have groups as this one has."""
        seen = (graph.passes.sketches for graph in self.graphs if graph.passes.groups)
        sketches = next((pair for pair in seen if pair is not None), None) or drawing.sketch_groups(self.groups)
        return sketches, _alike(self.groups, sketches[0].layer) if sketches else 1


def explain(model: nn.Module, *, tokens: int = 1, gpu: str | None = None) -> Report:
    """What lorafx did to ``model``, which ``lorafx.compile`` or ``torch.compile(..., backend="lorafx")`` compiled.

    tokens: how many a call has, for the counts of work
    gpu: "a100", "h100", "h200" or "l4", to show the least time that its memory and its arithmetic need for that work,
        which is a bound and no measurement

    LorafxError: nothing of lorafx was ever run on it; a number or a GPU that can't be
    """
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise LorafxError(f"got tokens={tokens!r}; expected how many tokens a call has, 1 or more")
    if gpu is not None and gpu not in GPUS:
        raise LorafxError(f"got gpu={gpu!r}; expected one of {', '.join(GPUS)}")
    runtime = runtime_of(model)
    if runtime is not None:
        return _report_of(runtime, tokens, gpu)
    mine = {id(parameter) for parameter in model.parameters()}
    graphs = [graph for graph in recent if mine.intersection(graph.parameters)]
    if not graphs:
        raise LorafxError(
            "nothing to explain: this model was not compiled by lorafx.compile, and no graph of it went through"
            ' torch.compile(..., backend="lorafx") yet. Compile it, call it once, then ask again.'
        )
    return report_on(graphs, tokens, gpu)


def report_on(graphs: Iterable[GraphRecord], tokens: int = 1, gpu: str | None = None) -> Report:
    """One report on several graphs of one model: groups and reasons once each."""
    report = Report(graphs=list(graphs))
    groups = {(tuple(b.name for b in g.branches), g.op): g for graph in report.graphs for g in graph.passes.groups}
    report.groups = list(groups.values())
    report.skipped = list(dict.fromkeys(s for graph in report.graphs for s in graph.passes.skipped))
    report.work = work_of(report.groups, report._ranks, tokens, 4, report.folded > 0, gpu)
    return report


def _report_of(runtime: Runtime, tokens: int, gpu: str | None) -> Report:
    report = report_on(runtime.graphs)
    if not runtime.graphs:
        report.source = "modules"
        if runtime.eager:
            report.untraced = "mode='eager' traces no graph"
        report.groups = _groups_from_modules(runtime)
    left = [Skipped(path, reason) for path, reason in runtime.unfused.items()]
    # what was seen of such a layer in a graph needs no reason of its own
    report.skipped = left + [skipped for skipped in report.skipped if skipped.name not in runtime.unfused]
    report.skipped += untraced_layers(runtime)
    report.retraces = list(runtime.retraces)
    report.bank = repr(runtime.bank)  # which catches up with the model
    report.uncompiled = runtime.follower.uncompiled or ""
    with runtime.bank.reading():
        store = runtime.bank.store
        report.ranks = ranks_in_bank(store)
        report.memory = memory_of(runtime.bank, report.groups if report.source == "graphs" else None)
    sizes = tokens, store.storage.element_size()
    report.work = work_of(report.groups, report._ranks, *sizes, report.folded > 0, gpu, store.late)
    return report


def _groups_from_modules(runtime: Runtime) -> list[FusedGroup]:
    """Layers of one parent and one input width: what reads the same input, as far as modules can tell."""
    buckets: dict[tuple[str, int], list[FusedBranch]] = {}
    others: list[FusedGroup] = []
    bank = runtime.bank
    for site in bank.store.sites:
        branch = FusedBranch(site.name, site.in_features, site.out_features)
        if site.experts and is_of_experts(runtime.root, site.name):
            others.append(FusedGroup(site.parent, (branch,), "aten", "expert_site", experts.REASON))
            continue
        layer = runtime.fused.module_of(site.name)
        kind = layer_kinds.kind_of(getattr(layer, "base_layer", layer))
        if kind is None:
            buckets.setdefault((site.parent, site.in_features), []).append(branch)
        else:
            lowering, reason = layer_ops.choose_lowering(bank.lowering)
            others.append(FusedGroup(site.parent, (branch,), lowering, f"routed_{kind}", reason))
    lowering, reason = choose_lowering(bank.lowering, bank.store.storage)
    linear = [FusedGroup(parent, tuple(b), lowering, "routed_lora", reason) for (parent, _), b in buckets.items()]
    return [*linear, *others]


def _alike(groups: Iterable[FusedGroup], layer: str) -> int:
    """How many layers have the groups that ``layer`` has: the paths differ in the layer's number alone."""
    head, _, number = layer.rpartition(".")
    if not number.isdigit():
        return 1
    kinds: dict[str, set[tuple]] = {}
    for group in groups:
        for branch in group.branches:
            if head and not branch.name.startswith(head + "."):
                continue
            index, _, rest = branch.name.removeprefix(head + ".").partition(".")
            kinds.setdefault(index, set()).add((rest, branch.in_features, branch.out_features))
    return sum(kind == kinds.get(number) for kind in kinds.values()) if number in kinds else 1
