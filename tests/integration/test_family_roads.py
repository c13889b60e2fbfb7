"""Other roads to the fused ops, for each family: a PeftModel in place, ``backend="lorafx"`` on plain PEFT, bf16.

Run by default: the families in ``FIRST``.
"""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import lorafx

from .groups import FIRST, MANY_GRAPHS, assert_fused, seen, unless_first
from .measuring import cast
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

SMALL = [name for name in FAMILIES if not FAMILIES[name].experts]


def one_layer(family, folder, dtype=torch.float32):
    """(adapters a and b on q, k and v; PEFT's model with them; inputs of three rows)"""
    targets = list(family.qkv)
    folders = save_adapters(family, folder, 1, a={"target_modules": targets}, b={"r": 7, "target_modules": targets})
    return folders, with_peft(family.build(1, dtype), folders), cast(family.inputs(3), dtype)


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


@pytest.mark.parametrize("name", FIRST)
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
    assert_fused(lorafx.explain(model), seen(reference, inputs), adapted_layers(reference), "lorafx.routed_lora")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", unless_first(SMALL))
def test_branches_in_a_graph_of_plain_peft(name, dtype):
    """``torch.compile(model, backend="lorafx")``: branches are found by their dataflow alone."""
    family = FAMILIES[name]
    torch.manual_seed(1)
    reference = get_peft_model(family.build(1, dtype), config(target_modules=family.targets("all-linear"))).eval()
    inputs = cast(family.inputs(2), dtype)
    want, groups = run(reference, inputs), seen(reference, inputs)
    compiled = torch.compile(reference.get_base_model(), backend="lorafx", options=EAGER_GRAPH)
    with MANY_GRAPHS:
        assert_close(run(compiled, inputs), want, 1e-5 if dtype == torch.float32 else 2e-2)
    assert_fused(
        lorafx.explain(reference.get_base_model()),
        groups,
        adapted_layers(reference),
        "lorafx.fused_lora",
    )


@pytest.mark.parametrize("name", unless_first(FAMILIES))
def test_peft_model_in_place(name, tmp_path):
    """A PeftModel that carries its adapters: the same groups, its own verbs, its own numbers."""
    family = FAMILIES[name]
    folders, reference, inputs = one_layer(family, tmp_path)
    groups = seen(reference, inputs)
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
    assert_fused(lorafx.explain(model), groups, adapted_layers(reference), "lorafx.routed_lora")


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
