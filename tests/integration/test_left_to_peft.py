"""aLoRA and LoRA on MoE experts stay with PEFT: its results, one named reason, refused by name from a file."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model

import lorafx

from .models import EAGER_GRAPH, FAMILIES, LLAMA, assert_close, config, run, tokens
from .other_layers import filled

INVOCATION = [5, 6]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS = {
    "aLoRA": (
        LLAMA,
        {"target_modules": ["q_proj", "v_proj"], "alora_invocation_tokens": INVOCATION, "task_type": "CAUSAL_LM"},
        "ALoraLinearVariant",
    ),
    "MoE experts": (
        FAMILIES["mixtral"],
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "lora_dropout": 0.0},
        "ParamWrapper",
    ),
}


def ids():
    """The invocation begins at another place in each row, and is missing in the last."""
    found = tokens(4)
    found[found == INVOCATION[0]] = 7
    for row, start in enumerate((1, 3, 4)):
        found[row, start : start + 2] = torch.tensor(INVOCATION)
    return found


def make(kind):
    family, fields, _ = KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(family.build(), config(**fields))
        model.add_adapter("plain", config(r=3, target_modules=["o_proj"], task_type=fields.get("task_type")))
    return filled(model)


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_pefts(kind):
    model, reference = make(kind), make(kind)
    inputs = {"input_ids": ids()}
    base = run(KINDS[kind][0].build(), inputs)
    lorafx.compile(model, options=EAGER_GRAPH)
    skipped = lorafx.explain(model).skipped
    assert skipped
    assert all(KINDS[kind][2] in item.reason for item in skipped)
    for name in ("default", "plain", "default"):
        for each in (model, reference):
            each.set_adapter(name)
        want = run(reference, inputs)
        assert (want - base).norm() > 1e-3
        assert_close(run(model, inputs) - base, want - base)
    arguments = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids())}
    want = reference.generate(input_ids=ids(), **arguments)
    assert torch.equal(model.generate(input_ids=ids(), **arguments), want)


def test_alora_row_by_row():
    model, reference = make("aLoRA"), make("aLoRA")
    inputs, names = {"input_ids": ids()}, ["default", "__base__", "plain", "default"]
    lorafx.compile(model, options=EAGER_GRAPH)
    assert_close(run(model, inputs, names), run(reference, inputs, names))


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_refused_by_name(kind, tmp_path):
    family, fields, _ = KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(family.build(), config(**fields)).save_pretrained(str(tmp_path))
    with pytest.raises(lorafx.AdapterFormatError, match=r"aLoRA|target_parameters"):
        lorafx.compile(family.build(), {"a": str(tmp_path)}, mode="eager")
