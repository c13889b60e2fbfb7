"""The rewriting of a traced graph: find LoRA branches, mark them, group the markers, fuse the groups.

One pass per file, each ``pass_(gm, context) -> int`` (what it did, counted). Matching (``find_branches``,
``group_markers``) reads; rewriting (``mark_branches``, ``fuse_groups``) asks it and changes. Passes know nothing of
PEFT: they see linear layers and markers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence

from torch import fx
from torch._dynamo.utils import counters

import lorafx.kernels.layer_ops
import lorafx.kernels.ops  # noqa: F401
from lorafx.passes.checkpointed import hand_on_inputs, own_bodies
from lorafx.passes.clean_up import clean_up
from lorafx.passes.context import PassContext, SiteGeometry
from lorafx.passes.fold_layers import fold_layers
from lorafx.passes.fuse_groups import fuse_groups
from lorafx.passes.fuse_layers import fuse_layers
from lorafx.passes.graph_reading import TRACED
from lorafx.passes.mark_branches import mark_branches
from lorafx.passes.note_experts import note_experts
from lorafx.passes.record import Box, FusedBranch, FusedGroup, PassRecord, Sketch, count_ops
from lorafx.passes.scale_rows import scale_rows
from lorafx.passes.share_inputs import share_inputs
from lorafx.passes.share_routing import share_routing
from lorafx.passes.sketch import first_layer, sketch_layer

log = logging.getLogger("lorafx.passes")

Pass = Callable[[fx.GraphModule, PassContext], int]

FIND = (
    mark_branches,  # branches -> lorafx.branch
    clean_up,  # what they were made of
)
REWRITE = (
    hand_on_inputs,  # what bodies of checkpointed layers read, which are rewritten before the graph that calls them
    share_inputs,  # x.to(its own dtype) -> x, so that siblings show
    fuse_groups,  # lorafx.site, lorafx.branch -> lorafx.routed_lora, lorafx.fused_lora
    fuse_layers,  # lorafx.layer_site -> lorafx.routed_layer
    note_experts,  # lorafx.expert_site and expert_lora stay
    fold_layers,  # the siblings' own layers -> into lorafx.routed_lora
    scale_rows,  # lorafx.magnitude -> lorafx.scaled_rows
    share_routing,  # one lorafx.row_weights for all groups
    clean_up,
)


def run_passes(gm: fx.GraphModule, context: PassContext) -> PassRecord:
    """Rewrite ``gm`` in place, and a copy of each body it calls. Returns the record, which is ``context.record``."""
    bodies = own_bodies(gm)
    for path, one in [*bodies.items(), ("", gm)]:
        for node in one.graph.nodes:
            node.meta[TRACED] = f"{path}/{node.name}" if path else node.name
    graphs = [*bodies.values(), gm]
    context.record.before = _count(graphs)
    for one in graphs:
        _run(FIND, one, context)
    shown = next(((one, layer) for one in graphs if (layer := first_layer(one, context)) is not None), None)
    before = sketch_layer(shown[0], context, shown[1]) if shown else None
    for one in graphs:
        _run(REWRITE, one, context)
        one.graph.lint()
        one.recompile()
    if shown:
        context.record.sketches = before, sketch_layer(shown[0], context, shown[1])
    context.record.after = _count(graphs)
    for skipped in context.record.skipped:
        log.info("%s is left as it is: %s", skipped.name, skipped.reason)
    return context.record


def _count(graphs: Sequence[fx.GraphModule]) -> Counter[str]:
    return sum((count_ops(one.graph) for one in graphs), Counter())


def _run(passes: Sequence[Pass], gm: fx.GraphModule, context: PassContext) -> None:
    for pass_ in passes:
        done = pass_(gm, context)
        counters["lorafx"][pass_.__name__] += done
        log.debug("%s: %d", pass_.__name__, done)


__all__ = [
    "Box",
    "FusedBranch",
    "FusedGroup",
    "PassContext",
    "PassRecord",
    "SiteGeometry",
    "Sketch",
    "run_passes",
]
