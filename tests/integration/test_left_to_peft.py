"""LoRA on a parameter that is no linear layer's stays with PEFT: its results, one named reason, refused from a file."""

from __future__ import annotations

import copy
import itertools
import sys
import time
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn

import lorafx

from .in_threads import repeating
from .models import EAGER_GRAPH, FAMILIES, assert_close, config, run, tokens
from .other_layers import filled

KINDS = {
    "table": (
        FAMILIES["llama"],
        {"target_modules": ["q_proj"], "target_parameters": ["embed_tokens.weight"], "lora_dropout": 0.0},
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


class Signal(nn.Module):
    """PEFT's layer on the convolution is not fused, and takes names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.filter, self.head = nn.Conv1d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.filter(x)).transpose(1, 2))


def test_threads_with_names_of_their_own():
    """PEFT's hooks for the names of one call stand on layers that the others call too: one at a time."""
    made = get_peft_model(Signal(), config(target_modules=["filter", "head"]))
    made.add_adapter("other", config(r=3, target_modules=["filter", "head"]))
    reference, x = filled(made), torch.randn(4, 3, 9)
    lists = [["default"] * 4, ["other"] * 4, ["default", "__base__", "other", "__base__"], ["__base__"] * 4]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = [reference(x, adapter_names=names) for names in lists]
        model = lorafx.compile(copy.deepcopy(reference), options=EAGER_GRAPH)
        assert "filter" in str(lorafx.explain(model).skipped)
        turns, interval = itertools.count(), sys.getswitchinterval()

        def call():
            i = next(turns) % len(lists)
            with torch.no_grad():
                assert_close(model(x, adapter_names=lists[i]), want[i])

        sys.setswitchinterval(1e-5)
        try:
            with repeating(call, 4):
                time.sleep(3)
        finally:
            sys.setswitchinterval(interval)
    assert next(turns) > 40


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_refused_by_name(kind, tmp_path):
    family, fields, _ = KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(family.build(), config(**fields)).save_pretrained(str(tmp_path))
    with pytest.raises(lorafx.AdapterFormatError, match="target_parameters"):
        lorafx.compile(family.build(), {"a": str(tmp_path)}, mode="eager")
