"""Notes the adapters of experts, which stay as they are: their ops are opaque (``kernels/experts.py``)."""

from __future__ import annotations

import torch
from torch import fx

from lorafx.kernels.experts import REASON
from lorafx.passes.context import PassContext
from lorafx.passes.graph_reading import example
from lorafx.passes.record import FusedBranch, FusedGroup

EXPERT_SITE, EXPERT_LORA = torch.ops.lorafx.expert_site.default, torch.ops.lorafx.expert_lora.default


def note_experts(gm: fx.GraphModule, context: PassContext) -> int:
    """Returns how many there are."""
    done = 0
    for node in gm.graph.find_nodes(op="call_function", target=EXPERT_SITE):
        *_, bank, site = node.args
        if bank == context.bank_key and isinstance(site, int):
            geometry, x = context.sites[site], example(node.args[1])
            branch = FusedBranch(geometry.name, geometry.in_features, geometry.out_features)
            size = 4 if x is None else x.element_size()
            context.record.groups.append(FusedGroup(geometry.parent, (branch,), "aten", "expert_site", REASON, size))
            done += 1
    for node in gm.graph.find_nodes(op="call_function", target=EXPERT_LORA):  # weights that are trained
        _, x, _, a, b, _, experts, name = node.args
        (rows, width), out = example(a).shape, example(b).shape[0]
        branch = FusedBranch(name, width, out, rows // experts)
        group = FusedGroup(name.rpartition(".")[0], (branch,), "aten", "expert_lora", REASON, example(x).element_size())
        context.record.groups.append(group)
        done += 1
    return done
