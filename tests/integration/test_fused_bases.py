"""Adapters of q, k and v on a model that computes them in one layer, against the model that doesn't."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import lorafx

from .fused_models import fused_llama
from .models import EAGER_GRAPH, FAMILIES, LLAMA, assert_close, config, difference, run, save_adapter, save_adapters

INPUTS = LLAMA.inputs(4)
RANKS = {"rank_pattern": {"q_proj": 3, "k_proj": 8, "v_proj": 16, "up_proj": 5}, "alpha_pattern": {"k_proj": 3}}
ADAPTERS = {
    "qkv": {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], **RANKS},
    "qv": {"r": 7, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "k": {"r": 2, "target_modules": ["k_proj"]},
    "up": {"r": 2, "target_modules": ["up_proj", "o_proj"], "lora_bias": True},
    "all": {"r": 6, "target_modules": "all-linear", **RANKS},
    "pattern": {"r": 2, "target_modules": r".*_proj"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_adapters(LLAMA, tmp_path_factory.mktemp("parts"), **ADAPTERS)


@pytest.fixture(scope="module")
def expected(folders):
    """name -> what PEFT adds to the logits of the unfused model, in double precision."""
    base = run(LLAMA.build(dtype=torch.float64), INPUTS)
    found = {}
    for name, folder in folders.items():
        found[name] = run(PeftModel.from_pretrained(LLAMA.build(dtype=torch.float64), folder).eval(), INPUTS) - base
    return found


@pytest.fixture(scope="module")
def model(folders):
    return lorafx.compile(fused_llama(), folders, options=EAGER_GRAPH)


def test_models_are_the_same():
    assert_close(run(fused_llama(), INPUTS), run(LLAMA.build(), INPUTS), 1e-6)


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_part_adds_into_its_own_slice(model, expected, name):
    base = run(model, INPUTS)
    got = run(model, INPUTS, [name] * 4) - base
    assert difference(got, expected[name]) <= 1e-5
    assert lorafx.explain(model).recompiles == 0


def test_different_adapters_in_one_batch(model, expected):
    idle = run(model, INPUTS)
    got = run(model, INPUTS, ["qkv", None, "all", "qv"])
    assert torch.equal(got[1], idle[1])
    for row, name in ((0, "qkv"), (2, "all"), (3, "qv")):
        assert_close(got[row] - idle[row], expected[name][row])
    names = [{branch.name.rpartition(".")[2] for branch in group.branches} for group in lorafx.explain(model).groups]
    assert {"q_proj", "k_proj", "v_proj"} in names
    assert {"gate_proj", "up_proj"} in names


def test_eager_calls_and_parts_called_alone(folders, expected):
    model = lorafx.compile(fused_llama(), {"qkv": folders["qkv"]}, mode="eager")
    adapted = run(model, INPUTS)
    assert_close(adapted - run(model, INPUTS, [None] * 4), expected["qkv"])
    inner = model.model(**INPUTS).last_hidden_state
    assert_close(model.lm_head(inner), adapted, 1e-6)


def test_load_replace_unload(folders, expected):
    model = lorafx.compile(
        fused_llama(),
        {"one": folders["qv"]},
        options=EAGER_GRAPH,
        max_adapters=2,
        max_rank=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "gate_proj", "up_proj"],
    )
    base = run(model, INPUTS, [None] * 4)
    model.lora.load("two", folders["qkv"])
    assert_close(run(model, INPUTS, ["two"] * 4) - base, expected["qkv"])
    model.lora.replace("two", folders["all"])
    assert_close(run(model, INPUTS, ["two"] * 4) - base, expected["all"])
    model.lora.use(None)
    model.lora.unload("one")
    model.lora.load("three", model.lora.read(folders["k"]))
    assert_close(run(model, INPUTS, ["three"] * 4) - base, expected["k"])
    assert not lorafx.explain(model).retraces
    lorafx.uncompile(model)
    assert torch.equal(run(model, INPUTS), run(fused_llama(), INPUTS))
    assert not any(module._forward_hooks for module in model.modules())


def test_adapters_of_the_fused_layer_stand_beside_those_of_its_parts(folders, expected, tmp_path):
    phi = FAMILIES["phi3"]
    whole = save_adapter(phi, tmp_path / "whole", r=5, target_modules=["qkv_proj", "gate_up_proj"])
    base = run(fused_llama(torch.float64), INPUTS)
    want = run(PeftModel.from_pretrained(fused_llama(torch.float64), whole).eval(), INPUTS) - base
    model = lorafx.compile(fused_llama(), {"whole": whole, "qkv": folders["qkv"]}, options=EAGER_GRAPH)
    idle = run(model, INPUTS)
    got = run(model, INPUTS, ["whole", "qkv", None, "whole"])
    for row, delta in ((0, want), (1, expected["qkv"]), (3, want)):
        assert_close(got[row] - idle[row], delta[row])
    assert torch.equal(got[2], idle[2])


def test_copies_adapt_their_own_layers(model, expected):
    other = copy.deepcopy(model)
    base = run(other, INPUTS)
    assert_close(run(other, INPUTS, ["qkv"] * 4) - base, expected["qkv"])


# ------------------------------------------------------------------------------------------------ which slice


class Attention(nn.Module):
    """No config says how wide its parts are."""

    def __init__(self, fused: bool, layer: str = "qkv_proj"):
        super().__init__()
        torch.manual_seed(0)
        weights = [nn.Linear(16, width) for width in (12, 4, 8)]
        self.layer = layer if fused else None
        if fused:
            whole = nn.Linear(16, 24)
            whole.weight.data = torch.cat([part.weight.data for part in weights])
            whole.bias.data = torch.cat([part.bias.data for part in weights])
            self.add_module(layer, whole)
        else:
            self.q_proj, self.k_proj, self.v_proj = weights

    def forward(self, x):
        if self.layer is not None:
            return self.get_submodule(self.layer)(x)
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


class Toy(nn.Module):
    def __init__(self, *args):
        super().__init__()
        self.attn = Attention(*args)

    def forward(self, x):
        return self.attn(x)


X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(7))


def toy_adapter(tmp_path, targets, name="a", **values):
    from peft import get_peft_model

    torch.manual_seed(3)
    peft_model = get_peft_model(Toy(False), config(r=3, target_modules=targets, **values)).eval()
    peft_model.save_pretrained(str(tmp_path / name))
    with torch.no_grad():
        return str(tmp_path / name), peft_model(X) - Toy(False)(X)


@torch.no_grad()
def delta_of(model, name="a"):
    return model(X, adapter_names=[name] * 3) - model(X, adapter_names=[None] * 3)


@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj"], ["q_proj", "v_proj"], ["q_proj"], ["v_proj"]])
def test_widths_from_the_adapter_alone(tmp_path, targets):
    folder, want = toy_adapter(tmp_path, targets)
    assert_close(delta_of(lorafx.compile(Toy(True), {"a": folder}, mode="eager")), want)


def test_a_part_between_unknown_ones_has_to_be_said(tmp_path):
    folder, want = toy_adapter(tmp_path, ["k_proj"])
    model = Toy(True)
    with pytest.raises(lorafx.AdapterMismatchError, match=re.escape("lorafx.compile(..., fused={'qkv_proj'")):
        lorafx.compile(model, {"a": folder})
    widths = {"qkv_proj": {"q_proj": 12, "k_proj": 4, "v_proj": 8}}
    assert_close(delta_of(lorafx.compile(model, {"a": folder}, fused=widths, mode="eager")), want)


def test_other_names_and_orders_are_said(tmp_path):
    folder, want = toy_adapter(tmp_path, ["q_proj", "k_proj"])
    model = Toy(True, "packed")
    with pytest.raises(lorafx.AdapterMismatchError):
        lorafx.compile(model, {"a": folder})
    named = {"packed": ("q_proj", "k_proj", "v_proj")}
    assert_close(delta_of(lorafx.compile(model, {"a": folder}, fused=named, mode="eager")), want)


@pytest.mark.parametrize(
    "fused",
    [
        ["qkv_proj"],
        {"qkv_proj": "q_proj"},
        {"qkv_proj": ("q_proj",)},
        {"qkv_proj": ("q_proj", "q_proj")},
        {"qkv_proj": {"q_proj": 12, "k_proj": "4"}},
        {"qkv_proj": {"q_proj": 12, "k_proj": 12, "v_proj": 12}},
        {1: ("q_proj", "k_proj")},
        {"query_key_value": ("q_proj", "k_proj", "v_proj")},
    ],
)
def test_wrong_words_are_refused(tmp_path, fused):
    folder, _ = toy_adapter(tmp_path, ["q_proj"])
    model = Toy(True)
    with pytest.raises(lorafx.LorafxError, match="xpected"):
        lorafx.compile(model, {"a": folder}, fused=fused)
    assert "lora" not in vars(model)
    assert not hasattr(model.attn, "q_proj")


@pytest.mark.parametrize("family", ["Falcon", "GPTNeoX", "Bloom"])
def test_interleaved_layers_are_refused_by_name(folders, family):
    import transformers

    kind = getattr(transformers, f"{family}Config")
    values = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = getattr(transformers, f"{family}ForCausalLM")(kind(**values))
    with pytest.raises(lorafx.UnsupportedModelError, match="query_key_value of this model holds q, k and v"):
        lorafx.compile(model, {"qkv": folders["qkv"]})


def test_adapters_of_other_models_are_refused(folders, tmp_path):
    model = fused_llama()
    tensors = load_file(f"{folders['qkv']}/adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj"], "peft_type": "LORA", **RANKS}
    key = next(key for key in tensors if "k_proj.lora_B" in key)
    for change in (
        {key: torch.randn(12, 8)},  # wider than this model's k
        {key: None},  # missing
        {key.replace("k_proj", "z_proj"): tensors[key]},
    ):
        changed = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        with pytest.raises(lorafx.AdapterMismatchError):
            lorafx.compile(model, {"a": (changed, config)}, mode="eager")
    assert "lora" not in vars(model)


def test_adapters_that_disagree_about_a_part(tmp_path):
    folder, want = toy_adapter(tmp_path, ["q_proj"])
    model = lorafx.compile(Toy(True), {"a": folder}, mode="eager", max_adapters=3)
    prefix = "base_model.model.attn.q_proj"
    other = {f"{prefix}.lora_A.weight": torch.randn(2, 16), f"{prefix}.lora_B.weight": torch.randn(10, 2)}
    values = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "peft_type": "LORA"}
    with pytest.raises(lorafx.AdapterMismatchError, match="is of another model"):
        model.lora.load("b", (other, values))
    too_wide = {k: torch.randn(20, 2) if "lora_B" in k else v for k, v in other.items()}
    overlapping = {k.replace("q_proj", "v_proj"): v for k, v in too_wide.items()}
    with pytest.raises(lorafx.AdapterMismatchError, match="its parts are"):
        model.lora.load("b", (overlapping, {**values, "target_modules": ["v_proj"]}))
    assert model.lora.names == ["a"]
    assert_close(delta_of(model), want)
