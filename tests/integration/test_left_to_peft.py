"""LoRA on a router's weight stays with PEFT: its results, one named reason, refused by name from a file."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model

import lorafx

from .models import EAGER_GRAPH, FAMILIES, assert_close, config, run, tokens
from .other_layers import filled

KINDS = {
    "router": (
        FAMILIES["mixtral"],
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"], "lora_dropout": 0.0},
        "ParamWrapper",
    ),
}


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
    inputs = {"input_ids": tokens(4)}
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
    arguments = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(tokens(4))}
    want = reference.generate(input_ids=tokens(4), **arguments)
    assert torch.equal(model.generate(input_ids=tokens(4), **arguments), want)


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_refused_by_name(kind, tmp_path):
    family, fields, _ = KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(family.build(), config(**fields)).save_pretrained(str(tmp_path))
    with pytest.raises(lorafx.AdapterFormatError, match="target_parameters"):
        lorafx.compile(family.build(), {"a": str(tmp_path)}, mode="eager")
