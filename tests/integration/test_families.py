"""Each family of models: which groups are fused, that nothing is left, and how far from float64 beside plain PEFT.

Run by default: float32, of every family q/k/v and all-linear, of those in ``FIRST`` PEFT's default targets too.
"""

from __future__ import annotations

import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS

import lorafx
from lorafx.kernels.ops import resolve_lowering
from tests import coverage_data

from .groups import FIRST, GROUPS, assert_fused, groups_of, ops_of, seen
from .measuring import NAMES, every_key, make_case, measured, shared_inputs
from .models import FAMILIES, adapted_layers, assert_close, difference, run


def is_slow(name, kind, dtype):
    return dtype != "float32" or (kind == "default" and name not in FIRST)


EVERY_CASE = [
    pytest.param(key, id="-".join(key), marks=pytest.mark.slow if is_slow(*key) else ()) for key in every_key()
]


@pytest.fixture(scope="module", params=EVERY_CASE)
def case(request, tmp_path_factory):
    """One family, choice of targets and dtype: two adapters, PEFT's model, the base and the compiled one."""
    torch._dynamo.reset()
    return make_case(*request.param, tmp_path_factory.mktemp("adapters"))


def expected(case):
    """The groups by the ends of their paths: as written down, or, where nothing is, as an eager call shows."""
    if (case.family, case.kind) in GROUPS:
        return groups_of(case.family, case.kind, case.layers)
    return seen(case.reference, case.inputs())


def test_groups_and_node_counts(case):
    inputs = case.inputs()
    case.one("a", inputs)
    report = lorafx.explain(case.model)
    assert report.source == "graphs"
    lowerings = {group.lowering for group in report.groups if group.op == "routed_lora"}
    assert lowerings == {resolve_lowering("auto", torch.zeros(1, dtype=case.dtype))}
    after = assert_fused(report, expected(case), adapted_layers(case.reference), "lorafx.routed_lora")
    assert shared_inputs(case.reference, inputs) == sorted(
        tuple(sorted(branch.name for branch in group.branches)) for group in report.groups
    )
    if case.family not in FIRST or case.dtype != torch.float32:
        return
    plain = ops_of(case.base, inputs)
    folded = sum(graph.passes.folded for graph in report.graphs)
    transposed = case.family == "gpt2"  # its layers keep their weights [in, out]
    experts = after["lorafx.expert_site"]  # which are no linear layers
    assert folded == (0 if transposed else len(adapted_layers(case.reference)) - experts)
    assert sum(graph["folded"] for graph in report.to_dict()["graphs"]) == folded
    assert ("computed inside the op" in str(report)) == (not transposed)
    if experts:
        return
    after["linear"] += folded
    for op in ("linear", "addmm", "matmul", "bmm", "conv2d", "scaled_dot_product_attention"):
        assert after[op] == plain[op], op
    ours = {op for op in after if op.startswith("lorafx.")} | {"getitem", "as_strided", "narrow", "cat"}
    assert {op: n for op, n in after.items() if op not in ours} == {op: n for op, n in plain.items() if op not in ours}


def test_errors_are_those_of_peft_but_for_rounding(case):
    """Of single rows chance decides, so the bound on the mean is the strict one."""
    found = measured(case)
    told = coverage_data.read()[case.key]
    assert {**found, "errors": None} == {**told, "errors": None}, "out of date: python -m tests.coverage_page --measure"
    assert_no_worse_than_peft(found["errors"])
    refused = {(what, who) for what, each in found["errors"].items() for who, error in each.items() if error is None}
    # PEFT can't mix adapters of parameters; OPT's fc1 reads rows times tokens, which it can't map
    all_linear = case.kind == "all-linear" and (FAMILIES[case.family].experts or case.family == "opt")
    assert refused == ({("mixed", "peft")} if all_linear else set())


def assert_no_worse_than_peft(errors):
    for error in errors.values():
        if error["lorafx"] is not None and error["peft"] is not None:
            (worst, mean), (their_worst, their_mean) = error["lorafx"], error["peft"]
            assert mean <= 1.25 * their_mean + 2e-8
            assert worst <= 2 * their_worst + 2e-7


def test_mixed_batch_equals_its_rows_and_base_rows_the_idle_model(case):
    inputs = case.inputs()
    mixed, idle = run(case.model, inputs, NAMES), run(case.model, inputs)
    alone = {name: case.one(name, inputs) for name in ("a", "b")}
    plain = run(case.base, inputs)
    for row, name in enumerate(NAMES):
        if name in alone:
            assert_close(mixed[row], alone[name][row], 1e-5 if case.dtype == torch.float32 else 2e-2)
            assert difference(mixed[row], plain[row]) > 1e-3  # the adapter does something
        else:
            assert torch.equal(mixed[row], idle[row])
            assert_close(idle[row], plain[row], 1e-6 if case.dtype == torch.float32 else 2e-2)


def test_adapters_never_made_another_graph(case):
    inputs = case.inputs()
    run(case.model, inputs)
    before = len(lorafx.explain(case.model).graphs)
    for choice in (None, "a", "b", {"a": 0.5, "b": 0.25}, NAMES):
        with case.model.lora.using(choice):
            run(case.model, inputs)
    report = lorafx.explain(case.model)
    assert (len(report.graphs), report.recompiles, report.retraces) == (before, 0, [])


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_has_a_default_where_the_family_says_so(name):
    kind = getattr(FAMILIES[name].build(1).config, "model_type", None)
    assert FAMILIES[name].default == (PEFT_DEFAULTS.get(kind) is not None and name != "mixtral")


def test_measured_errors_are_no_larger_than_pefts_on_the_whole():
    """Of docs/coverage.json: every case holds the bound, and on the whole they are PEFT's."""
    told = coverage_data.read()
    assert list(told) == ["/".join(key) for key in every_key()], "out of date: python -m tests.coverage_page --measure"
    ratios = []
    for entry in told.values():
        assert_no_worse_than_peft(entry["errors"])
        ratios += [e["lorafx"][1] / e["peft"][1] for e in entry["errors"].values() if e["lorafx"] and e["peft"]]
    assert sorted(ratios)[len(ratios) // 2] <= 1.01
