"""Every variant of plain LoRA on both roads; and what is not supported: PEFT's exact result, and one reason."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.variants import ArrowLinearVariant, QALoraLinearVariant
from torch import nn

import lorafx
from tests.integration.models import EAGER_GRAPH, LLAMA, config, difference, run, with_peft

INPUTS = LLAMA.inputs(4)
QKV = ["q_proj", "k_proj", "v_proj"]
VARIANTS = {  # fields of the adapter
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "lm_head, tied": {"target_modules": ["q_proj", "lm_head"]},
    "rsLoRA": {"target_modules": QKV, "use_rslora": True, "r": 6},
    "rank_pattern": {"target_modules": QKV, "rank_pattern": {"k_proj": 9, "0.self_attn.q_proj": 2}},
    "alpha_pattern": {"target_modules": QKV, "alpha_pattern": {"k_proj": 3}, "rank_pattern": {"v_proj": 5}},
    "lora_bias": {"target_modules": QKV, "lora_bias": True},
    "several weighted": {"target_modules": QKV, "r": 3, "use_rslora": True},
}


def build(name):
    model = LLAMA.build(1)
    if name == "lm_head, tied":
        tied = transformers.LlamaConfig(**{**model.config.to_dict(), "tie_word_embeddings": True})
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(tied).eval()
        assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def save(name, folder, seed, **fields):
    torch.manual_seed(seed)
    model = get_peft_model(build(name), config(**fields))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") and "lora_" in key:
                parameter.normal_()
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return str(folder)


@pytest.mark.parametrize("peft", [False, True], ids=["plain", "peft"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_on_both_roads(name, peft, tmp_path):
    fields = VARIANTS[name]
    folders = {
        "one": save(name, tmp_path / "one", 1, **fields),
        "two": save(name, tmp_path / "two", 2, target_modules=["q_proj", "up_proj"], lora_alpha=11),
    }
    reference = with_peft(build(name), folders)
    model = with_peft(build(name), folders) if peft else build(name)
    lorafx.compile(model, None if peft else folders, options=EAGER_GRAPH)
    model.lora.use(None)
    base, alone = run(model, INPUTS), {}
    for each in ("one", "two"):
        reference.set_adapter(each)
        alone[each] = run(reference, INPUTS)
        assert difference(run(model, INPUTS, [each] * 4) - base, alone[each] - base) <= 1e-5
    got = run(model, INPUTS, ["one", None, "two", "one"])
    want = torch.stack([alone["one"][0], base[1], alone["two"][2], alone["one"][3]])
    assert difference(got - base, want - base) <= 1e-5
    assert torch.equal(got[1], base[1])
    model.lora.use({"one": 0.7, "two": -0.3})
    for layer in reference.modules():
        if hasattr(layer, "set_scale"):
            layer.scale_layer(1.0)
            for each, weight in (("one", 0.7), ("two", -0.3)):
                if each in layer.scaling:
                    layer.set_scale(each, weight)
    reference.base_model.set_adapter(["one", "two"])
    assert difference(run(model, INPUTS) - base, run(reference, INPUTS) - base) <= 1e-5
    report = lorafx.explain(model)
    assert (len(report.graphs), report.recompiles, report.skipped) == (1, 0, [])


class Attends(nn.Module):
    """With nn.MultiheadAttention, whose weights are no linear layer's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 8)
        self.conv = nn.Conv1d(8, 8, 3)
        self.embed = nn.Embedding(12, 16)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.conv(self.out(x).transpose(1, 2))


UNSUPPORTED = {  # fields of the adapter, the layer that PEFT keeps, what the reason names
    "MultiheadAttention": ({"target_modules": ["attention", "out"]}, "attention", "MultiheadAttention"),
    "Conv1d": ({"target_modules": ["conv", "out"]}, "conv", "Conv1d"),
    "KaSA": ({"target_modules": ["out"], "kasa_config": {}, "init_lora_weights": True}, "out", "KasaLinearVariant"),
    "MonteCLoRA": ({"target_modules": ["out"], "monteclora_config": {}}, "out", "MontecloraLinearVariant"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_what_is_not_supported_is_pefts_with_one_reason(kind):
    fields, layer, reason = UNSUPPORTED[kind]
    ids = torch.arange(12).view(2, 6)
    torch.manual_seed(4)
    reference = get_peft_model(Attends(), config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model = lorafx.compile(copy.deepcopy(reference), options=EAGER_GRAPH)
    with torch.no_grad():
        want, got = reference(ids), model(ids)
        assert difference(got, want) <= 1e-6
        with reference.disable_adapter(), model.disable_adapter():
            base = reference(ids)
            assert difference(model(ids), base) <= 1e-6
    assert difference(want, base) > 1e-3
    named = [item for item in lorafx.explain(model).skipped if item.name == layer]
    assert len(named) == 1
    assert reason in named[0].reason
    with pytest.raises(lorafx.UnsupportedModelError, match=layer):
        model.lora.use("default")


@pytest.mark.parametrize("variant", [ArrowLinearVariant, QALoraLinearVariant])
def test_variants_that_need_more_than_a_model_are_named(variant):
    """PEFT makes them of several adapters, or on GPTQ layers only."""
    model = get_peft_model(Attends(), LoraConfig(target_modules=["out"]))
    model.base_model.model.out.lora_variant["default"] = variant()
    lorafx.compile(model.eval(), mode="eager")
    (skipped,) = lorafx.explain(model).skipped
    assert skipped.reason == f"{variant.__name__} is not fused yet"
