"""What stays with PEFT (LoRA on a parameter that is no linear layer's, X-LoRA, other methods): its results, one named
reason, refused by name from a file."""

from __future__ import annotations

import copy
import itertools
import sys
import time
import warnings

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, XLoraConfig, get_peft_model
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


# ---------------------------------------------------------------------------- names that PEFT itself can't serve


def adalora():
    return AdaLoraConfig(total_step=10, target_modules=["q_proj"], init_lora_weights=False)


REFUSING = {  # adapters that PEFT adapts a model with, and then refuses names, or takes no notice of them
    "DoRA on an embedding": (lambda: config(target_modules=["embed_tokens"], use_dora=True), "when DoRA is enabled"),
    "attention in modules_to_save": (
        lambda: config(target_modules=["up_proj"], modules_to_save=["self_attn"]),
        "_mixed_batch_forward",
    ),
    "AdaLoRA": (adalora, "adapter_names"),
    "LoHa": (lambda: LoHaConfig(r=4, target_modules=["q_proj"], init_weights=False), "LoHaModel has no adapter_names"),
    "IA3": (
        lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False),
        "IA3Model has no adapter_names",
    ),
}


@pytest.mark.parametrize("mode", [{"mode": "eager"}, {"options": EAGER_GRAPH}], ids=["eager", "graph"])
@pytest.mark.parametrize("kind", REFUSING)
def test_names_that_peft_refuses_are_refused_by_name_and_break_nothing(kind, mode):
    make_config, said = REFUSING[kind]
    reference = filled(get_peft_model(FAMILIES["llama"].build(1), make_config()))
    inputs = {"input_ids": tokens(4)}
    model = lorafx.compile(copy.deepcopy(reference), **mode)
    want = run(reference, inputs)
    for _ in range(2):
        assert_close(run(model, inputs), want)
        with pytest.raises(lorafx.UnsupportedModelError, match=said):
            run(model, inputs, ["default", "__base__"] * 2)
        with pytest.raises(lorafx.UnsupportedModelError, match="adapter_names"):
            run(model, inputs, [{"default": 0.5}, None] * 2)
    with model.disable_adapter(), reference.disable_adapter():
        assert_close(run(model, inputs), run(reference, inputs))


def test_an_error_of_the_models_own_is_handed_on():
    """What a call of PEFT's stumbles over need not be PEFT's."""
    model = lorafx.compile(
        filled(get_peft_model(FAMILIES["llama"].build(1), config(target_modules=["embed_tokens"], use_dora=True))),
        mode="eager",
    )

    def fails(*_):
        raise ValueError("of the user's own")

    hook = model.get_base_model().model.register_forward_pre_hook(fails)
    with pytest.raises(ValueError, match="of the user's own"):
        run(model, {"input_ids": tokens(2)}, ["default"] * 2)
    hook.remove()
    assert torch.isfinite(run(model, {"input_ids": tokens(2)})).all()


@pytest.mark.parametrize("mode", [{"mode": "eager"}, {"options": EAGER_GRAPH}], ids=["eager", "graph"])
def test_xlora_is_pefts(mode, tmp_path):
    """It scales the adapters anew in each call, by forwards and hooks of its own."""
    folders = {}
    for i in range(2):
        folders[str(i)] = str(tmp_path / str(i))
        made = get_peft_model(FAMILIES["llama"].build(1), config(target_modules=["q_proj"], lora_dropout=0.0))
        filled(made, i).save_pretrained(folders[str(i)])

    def build():
        base = FAMILIES["llama"].build(1)
        base.config.use_cache = False
        torch.manual_seed(5)
        fields = {"task_type": "CAUSAL_LM", "hidden_size": 32, "xlora_depth": 2, "adapters": folders}
        return get_peft_model(base, XLoraConfig(**fields)).eval()

    inputs = {"input_ids": tokens(4)}
    reference, model = build(), lorafx.compile(build(), **mode)
    want = run(reference, inputs)
    assert (want - run(FAMILIES["llama"].build(1), inputs)).norm() > 1e-2
    for _ in range(2):
        assert_close(run(model, inputs), want)
    assert {item.name: "X-LoRA" in item.reason for item in lorafx.explain(model).skipped} == {
        "model.layers.0.self_attn.q_proj": True
    }
    with pytest.raises(lorafx.UnsupportedModelError, match="XLoraModel has no adapter_names"):
        run(model, inputs, ["0", "1", "__base__", "0"])
    with pytest.raises(lorafx.UnsupportedModelError, match="X-LoRA"):
        model.lora.use("0")
    assert_close(run(model, inputs), want)


def test_adapters_of_several_methods_on_one_model():
    torch.manual_seed(1)
    reference = get_peft_model(FAMILIES["llama"].build(1), config(target_modules=["q_proj", "v_proj"]), "l", mixed=True)
    reference.add_adapter("h", LoHaConfig(r=4, target_modules=["q_proj", "k_proj"], init_weights=False))
    reference.eval()
    inputs = {"input_ids": tokens(4)}
    model = lorafx.compile(copy.deepcopy(reference), options=EAGER_GRAPH)
    results = []
    for active in (["l", "h"], "l", "h", ["l", "h"]):
        for each in (reference, model):
            each.set_adapter(active)
        results.append(run(reference, inputs))
        assert_close(run(model, inputs), results[-1])
    assert (results[0] - results[1]).norm() > 1e-3
    assert {item.name.rpartition(".")[2] for item in lorafx.explain(model).skipped} == {"q_proj", "k_proj"}
    with pytest.raises(lorafx.UnsupportedModelError, match="can't choose for"):
        run(model, inputs, ["l", "h", "__base__", "l"])


def test_what_an_embedding_with_dora_is_refused_for(tmp_path):
    filled(
        get_peft_model(FAMILIES["llama"].build(1), config(target_modules=["embed_tokens"], use_dora=True))
    ).save_pretrained(str(tmp_path), save_embedding_layers=False)
    with pytest.raises(lorafx.AdapterFormatError, match=r"embed_tokens, which PEFT makes a .*DoraEmbeddingVariant of"):
        lorafx.compile(FAMILIES["llama"].build(1), str(tmp_path), mode="eager")
