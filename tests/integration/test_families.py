"""Each family of models: which groups are fused, that nothing is left, and the numbers of plain PEFT."""

from __future__ import annotations

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model

import lorafx
from lorafx.kernels.ops import resolve_lowering
from lorafx.passes.record import count_ops

from .models import (
    EAGER_GRAPH,
    FAMILIES,
    adapted_layers,
    assert_close,
    config,
    difference,
    run,
    save_adapters,
    with_peft,
)

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
    ("mixtral", "qkv"): [(Q, K, V)],  # PEFT has no default for it, and "all-linear" takes the experts too: see below
    ("vit", "qkv"): [(Q, K, V)],
    ("vit", "all-linear"): [(Q, K, V), (OUT,), ("fc1",), ("fc2",)],
    ("whisper", "qkv"): [(Q, K, V), (Q, K, V), (Q,), (K, V)],
    ("whisper", "all-linear"): [
        *[(Q, K, V), ("out_proj",), ("fc1",), ("fc2",)],
        *[(Q, K, V), ("out_proj",), (Q,), (K, V), ("out_proj",), ("fc1",), ("fc2",)],
    ],
}
ONCE = {("bert", "all-linear"): [("dense",)], ("vit", "all-linear"): [("dense",)]}  # outside the layers: the pooler
SMALL = [name for name in FAMILIES if name != "mixtral"]
MANY_GRAPHS = torch._dynamo.config.patch(recompile_limit=256)  # its 8 are for all models with one wrapped forward
NAMES = ["a", "__base__", "b", "a", None]


def targets_of(family, kind):
    return {"qkv": list(family.qkv), "default": None, "all-linear": "all-linear"}[kind]


@pytest.fixture(scope="module", params=GROUPS, ids=lambda key: "-".join(key))
def case(request, tmp_path_factory):
    """One family and choice of targets: two adapters, PEFT's model, the base and the compiled one, called once."""
    name, kind = request.param
    family = FAMILIES[name]
    layers = 2 if kind == "all-linear" else 1
    second = list(family.qkv[-1:]) if kind == "all-linear" else targets_of(family, kind)
    folders = save_adapters(
        family,
        tmp_path_factory.mktemp("adapters"),
        layers,
        a={"r": 4, "target_modules": targets_of(family, kind)},
        b={"r": 7, "lora_alpha": 10, "target_modules": second},
    )
    inputs = family.inputs(len(NAMES))
    model = lorafx.compile(family.build(layers), folders, options=EAGER_GRAPH)
    return SimpleNamespace(
        name=name,
        base=family.build(layers),
        reference=with_peft(family.build(layers), folders),
        model=model,
        inputs=inputs,
        mixed=run(model, inputs, NAMES),
        groups=groups_of(name, kind, layers),
    )


def groups_of(name, kind, layers):
    return [tuple(sorted(group)) for group in GROUPS[name, kind] * layers + ONCE.get((name, kind), [])]


def qkv_groups(name):
    """Of one layer, with q, k and v targeted."""
    return groups_of(name, "qkv" if (name, "qkv") in GROUPS else "default", 1)


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
    """These groups, each one op; all of PEFT's layers and no other; no marker left over."""
    assert group_names(report) == Counter(groups)
    branches = [branch.name for group in report.groups for branch in group.branches]
    assert sorted(branches) == sorted(layers)
    assert not report.skipped
    after = sum((graph.passes.after for graph in report.graphs), Counter())
    assert after[op] == len(groups)
    assert not after["lorafx.site"]
    assert not after["lorafx.branch"]
    lines = [line for graph in report.graphs for line in graph.after.splitlines() if not line.strip().startswith("#")]
    assert sum(f"ops.{op}.default(" in line for line in lines) == len(groups)
    assert not any("ops.lorafx.site" in line or "ops.lorafx.branch" in line for line in lines)
    return after


def test_groups_before_the_first_call_are_said_to_be_from_modules(tmp_path):
    family = FAMILIES["llama"]
    model = lorafx.compile(
        family.build(), save_adapters(family, tmp_path, a={"target_modules": "all-linear"}), options=EAGER_GRAPH
    )
    report = lorafx.explain(model)
    assert report.source == "modules"
    assert "nothing has been called yet" in str(report)
    assert sum(len(group.branches) for group in report.groups) == 14
    lorafx.uncompile(model)
    lorafx.compile(model, save_adapters(family, tmp_path, a={"target_modules": "all-linear"}), mode="eager")
    run(model, family.inputs(1))
    assert "mode='eager' traces no graph" in str(lorafx.explain(model))


def test_groups_and_node_counts(case):
    report = lorafx.explain(case.model)
    assert report.source == "graphs"
    assert {group.lowering for group in report.groups} == {resolve_lowering("auto", torch.zeros(1))}
    after = assert_fused(report, case.groups, adapted_layers(case.reference), "lorafx.routed_lora")
    plain = ops_of(case.base, case.inputs)
    folded = sum(graph.passes.folded for graph in report.graphs)
    transposed = case.name == "gpt2"  # its layers keep their weights [in, out]
    assert folded == (0 if transposed else len(adapted_layers(case.reference)))
    assert sum(graph["folded"] for graph in report.to_dict()["graphs"]) == folded
    assert ("computed inside the op" in str(report)) == (not transposed)
    after["linear"] += folded
    for op in ("linear", "addmm", "matmul", "bmm", "conv2d", "scaled_dot_product_attention"):
        assert after[op] == plain[op], op
    ours = {op for op in after if op.startswith("lorafx.")} | {"getitem", "as_strided", "narrow", "cat"}
    assert {op: n for op, n in after.items() if op not in ours} == {op: n for op, n in plain.items() if op not in ours}


@pytest.mark.parametrize("name", ["a", "b"])
def test_one_adapter_equals_peft(case, name):
    case.reference.set_adapter(name)
    want = run(case.reference, case.inputs)
    with case.model.lora.using(name):
        got = run(case.model, case.inputs)
    assert_close(got, want)
    assert difference(run(case.base, case.inputs), want) > 1e-2  # the adapter does something


def test_mixed_batch_equals_peft_and_base_rows_the_idle_model(case):
    want = run(case.reference, case.inputs, [name or "__base__" for name in NAMES])
    assert_close(case.mixed, want)
    with case.model.lora.using(None):
        idle = run(case.model, case.inputs)
    plain = run(case.base, case.inputs)
    for row, name in enumerate(NAMES):
        if name in (None, "__base__"):
            assert torch.equal(case.mixed[row], idle[row])
            assert (idle[row] - plain[row]).abs().max() <= 1e-6
        else:
            assert_close(case.mixed[row], want[row])
            assert difference(case.mixed[row], plain[row]) > 1e-2


def test_adapters_never_made_another_graph(case):
    before = len(lorafx.explain(case.model).graphs)
    for choice in (None, "a", "b", {"a": 0.5, "b": 0.25}, NAMES):
        with case.model.lora.using(choice):
            run(case.model, case.inputs)
    report = lorafx.explain(case.model)
    assert (len(report.graphs), report.recompiles, report.retraces) == (before, 0, [])


def one_layer(family, folder, dtype=torch.float32):
    """(adapters a and b on q, k and v; PEFT's model with them; inputs of three rows)"""
    targets = list(family.qkv)
    folders = save_adapters(family, folder, 1, a={"target_modules": targets}, b={"r": 7, "target_modules": targets})
    return folders, with_peft(family.build(1, dtype), folders), cast(family.inputs(3), dtype)


def cast(inputs, dtype):
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_base_with_float32_adapters(name, tmp_path):
    """PEFT keeps adapters in float32 beside a bf16 base: every branch casts on its way."""
    family = FAMILIES[name]
    folders, reference, inputs = one_layer(family, tmp_path, torch.bfloat16)
    assert next(p for n, p in reference.named_parameters() if "lora_A" in n).dtype == torch.float32
    model = lorafx.compile(family.build(1, torch.bfloat16), folders, options=EAGER_GRAPH)
    names = ["a", "__base__", "b"]
    got, want = run(model, inputs, names), run(reference, inputs, names)
    assert got.dtype == want.dtype == torch.bfloat16
    assert_close(got, want, 2e-2)
    if name != "mixtral":  # whose experts take no float64
        exact = with_peft(family.build(1, torch.bfloat16), folders).double()
        truth = run(exact, cast(inputs, torch.float64), names)
        assert difference(got, truth) <= 1.1 * difference(want, truth)
    assert_fused(lorafx.explain(model), qkv_groups(name), adapted_layers(reference), "lorafx.routed_lora")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", SMALL)
def test_branches_in_a_graph_of_plain_peft(name, dtype):
    """``torch.compile(model, backend="lorafx")``: branches are found by their dataflow alone."""
    family = FAMILIES[name]
    torch.manual_seed(1)
    reference = get_peft_model(family.build(1, dtype), config(target_modules="all-linear")).eval()
    inputs = cast(family.inputs(2), dtype)
    want = run(reference, inputs)
    compiled = torch.compile(reference.get_base_model(), backend="lorafx", options=EAGER_GRAPH)
    with MANY_GRAPHS:
        assert_close(run(compiled, inputs), want, 1e-5 if dtype == torch.float32 else 2e-2)
    assert_fused(
        lorafx.explain(reference.get_base_model()),
        groups_of(name, "all-linear", 1),
        adapted_layers(reference),
        "lorafx.fused_lora",
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_model_in_place(name, tmp_path):
    """A PeftModel that carries its adapters: the same groups, its own verbs, its own numbers."""
    family = FAMILIES[name]
    folders, reference, inputs = one_layer(family, tmp_path)
    model = with_peft(family.build(1), folders)
    assert lorafx.compile(model, options=EAGER_GRAPH) is model
    names = ["b", "__base__", "a"]
    assert_close(run(model, inputs, names), run(reference, inputs, names))
    for adapter in ("b", "a"):
        for each in (model, reference):
            each.set_adapter(adapter)
        assert_close(run(model, inputs), run(reference, inputs))
    with model.disable_adapter(), reference.disable_adapter():
        assert_close(run(model, inputs), run(reference, inputs), 1e-6)
    assert_fused(lorafx.explain(model), qkv_groups(name), adapted_layers(reference), "lorafx.routed_lora")


def test_adapted_experts_stay_with_peft_and_are_reported():
    """PEFT's "all-linear" wraps Mixtral's expert weights, which are no layers: attention alone is fused."""
    family = FAMILIES["mixtral"]
    torch.manual_seed(1)
    reference = get_peft_model(family.build(1), config(target_modules="all-linear", lora_dropout=0.0)).eval()
    model = copy.deepcopy(reference)
    lorafx.compile(model, options=EAGER_GRAPH)
    inputs = family.inputs(2)
    assert_close(run(model, inputs), run(reference, inputs))
    report = lorafx.explain(model)
    assert group_names(report)[K, Q, V] == 1
    skipped = {item.name.rpartition(".mlp")[0]: item.reason for item in report.skipped}
    assert all("not fused yet" in reason for reason in skipped.values())
    assert {branch.name for group in report.groups for branch in group.branches} | {
        item.name for item in report.skipped
    } >= adapted_layers(reference)


def test_whole_model_through_inductor(tmp_path):
    """The graph that users run: Inductor's code, float32, one layer."""
    family = FAMILIES["llama"]
    folders, reference, inputs = one_layer(family, tmp_path)
    model = lorafx.compile(family.build(1), folders)
    names = ["a", "__base__", "b"]
    mixed = run(model, inputs, names)
    assert_close(mixed, run(reference, inputs, names))
    idle = run(model, inputs)
    assert torch.equal(mixed[1], idle[1])
    assert_close(idle, run(family.build(1), inputs), 1e-6)
    assert lorafx.explain(model).recompiles == 0
