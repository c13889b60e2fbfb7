"""Which groups are expected of each family, and that a report says so of its graphs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lorafx.passes.record import count_ops

from .measuring import shared_inputs
from .models import run

Q, K, V, OUT = "q_proj", "k_proj", "v_proj", "o_proj"
LLAMA_MLP = [("gate_proj", "up_proj"), ("down_proj",)]
# Groups of one layer (of encoder and decoder layer together, where there are both), by the ends of the branches' paths;
# "default" is what PEFT targets where a config names nothing.
GROUPS = {
    ("llama", "qkv"): [(Q, K, V)],
    ("llama", "default"): [(Q, V)],
    ("llama", "all-linear"): [(Q, K, V), (OUT,), *LLAMA_MLP],
    ("qwen2", "qkv"): [(Q, K, V)],
    ("qwen2", "default"): [(Q, V)],
    ("qwen2", "all-linear"): [(Q, K, V), (OUT,), *LLAMA_MLP],
    ("gpt2", "default"): [("c_attn",)],
    ("gpt2", "all-linear"): [("c_attn",), ("c_proj",), ("c_fc",), ("c_proj",)],
    ("phi3", "qkv"): [("qkv_proj",)],
    ("phi3", "all-linear"): [("qkv_proj",), (OUT,), ("gate_up_proj",), ("down_proj",)],
    ("bert", "qkv"): [("query", "key", "value")],
    ("bert", "default"): [("query", "value")],
    ("bert", "all-linear"): [("query", "key", "value"), ("dense",), ("dense",), ("dense",)],
    # encoder self-attention; decoder self-attention; cross-attention: q reads the decoder, k and v the encoder
    ("t5", "qkv"): [("q", "k", "v"), ("q", "k", "v"), ("q",), ("k", "v")],
    ("t5", "default"): [("q", "v"), ("q", "v"), ("q",), ("v",)],
    ("t5", "all-linear"): [
        *[("q", "k", "v"), ("o",), ("wi",), ("wo",)],
        *[("q", "k", "v"), ("o",), ("q",), ("k", "v"), ("o",), ("wi",), ("wo",)],
    ],
    ("mixtral", "qkv"): [(Q, K, V)],  # PEFT has no default for it, and "all-linear" takes the experts too
    ("vit", "qkv"): [(Q, K, V)],
    ("vit", "all-linear"): [(Q, K, V), (OUT,), ("fc1",), ("fc2",)],
    ("whisper", "qkv"): [(Q, K, V), (Q, K, V), (Q,), (K, V)],
    ("whisper", "all-linear"): [
        *[(Q, K, V), ("out_proj",), ("fc1",), ("fc2",)],
        *[(Q, K, V), ("out_proj",), (Q,), (K, V), ("out_proj",), ("fc1",), ("fc2",)],
    ],
}
ONCE = {("bert", "all-linear"): [("dense",)], ("vit", "all-linear"): [("dense",)]}  # outside the layers: the pooler
FIRST = ("llama", "qwen2", "gpt2", "phi3", "bert", "t5", "mixtral", "vit", "whisper")
MANY_GRAPHS = torch._dynamo.config.patch(recompile_limit=256)  # its 8 are for all models with one wrapped forward


def unless_first(names):
    """Parameters of a test: families outside ``FIRST`` are slow."""
    return [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in names]


def groups_of(name, kind, layers):
    return [tuple(sorted(group)) for group in GROUPS[name, kind] * layers + ONCE.get((name, kind), [])]


def seen(reference, inputs):
    return [tuple(sorted(path.rpartition(".")[2] for path in group)) for group in shared_inputs(reference, inputs)]


def group_names(report):
    return Counter(tuple(sorted(branch.name.rpartition(".")[2] for branch in g.branches)) for g in report.groups)


def ops_of(model, inputs):
    """What Dynamo traces of a model, by name."""
    counted: Counter[str] = Counter()

    def backend(gm, example_inputs):
        counted.update(count_ops(gm.graph))
        return gm.forward

    with MANY_GRAPHS:
        run(torch.compile(model, backend=backend), inputs)
    return counted


def assert_fused(report, groups, layers, op):
    """These groups, each one op, none over two modules; all of PEFT's layers and no other; no marker left over."""
    assert group_names(report) == Counter(groups)
    for group in report.groups:
        assert len({branch.name.rpartition(".")[0] for branch in group.branches}) == 1
    branches = [branch.name for group in report.groups for branch in group.branches]
    assert sorted(branches) == sorted(layers)
    assert not report.skipped
    after = sum((graph.passes.after for graph in report.graphs), Counter())
    experts = sum(group.op == "expert_site" for group in report.groups)
    assert after["lorafx.expert_site"] == experts
    assert after[op] == len(groups) - experts
    assert not after["lorafx.site"]
    assert not after["lorafx.branch"]
    lines = [line for graph in report.graphs for line in graph.after.splitlines() if not line.strip().startswith("#")]
    assert sum(f"ops.{op}.default(" in line for line in lines) == len(groups) - experts
    assert not any("ops.lorafx.site" in line or "ops.lorafx.branch" in line for line in lines)
    return after
