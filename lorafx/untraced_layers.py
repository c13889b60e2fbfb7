"""Quantised layers that Dynamo does not trace as a part of the model, for ``lorafx.explain``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft.tuners.lora import LoraLayer

from lorafx.passes.branch import Skipped
from lorafx.quantised import is_quantised

if TYPE_CHECKING:
    from lorafx.runtime import Runtime


def untraced_layers(runtime: Runtime) -> list[Skipped]:
    """Adapted ones that stand in none of the graphs of the model's own frame.

    Where a layer's code breaks Dynamo's graph, what comes after it is traced as a frame of its own, or runs eagerly;
    its adapter is added there, alone.
    """
    if not runtime.graphs:
        return []
    own = {graph.frame for graph in (runtime.graphs[0], *runtime.graphs[runtime._retraced_at :][:1])}
    groups = [group for graph in runtime.graphs if graph.frame in own for group in graph.passes.groups]
    traced = {branch.name for group in groups for branch in group.branches}
    found = []
    for site in runtime.bank.store.sites:
        module = runtime.fused.module_of(site.name)
        base = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if site.name not in traced and is_quantised(base):
            kind = f"{type(base).__module__.partition('.')[0]}'s {type(base).__name__}"
            reason = f"{kind} is not traced with the model (it breaks Dynamo's graph); its adapter is added by itself"
            found.append(Skipped(site.name, reason))
    return found
