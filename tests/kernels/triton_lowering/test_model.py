"""A whole model through the real kernels, on a GPU or in the interpreter: adapters of every kind of ranks, against
plain PEFT."""

from __future__ import annotations

import pytest

from tests.kernels.cases import CAN_RUN_KERNELS, KERNEL_DEVICE

if not CAN_RUN_KERNELS:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lorafx

QKV = ["q_proj", "k_proj", "v_proj"]
RANKS = {
    "8,8,8": {"r": 8},
    "16,16,16": {"r": 16},
    "64,64,64": {"r": 64},
    "8,16,64": {"r": 8, "rank_pattern": {"k_proj": 16, "v_proj": 64}},
    "q and v only": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "rank 1": {"r": 1},
    "rank 7": {"r": 7},
}
# float16: PEFT rounds the base and its own sums there, and so is itself this far from float64
BOUNDS = {torch.float32: 1e-5, torch.float16: 5e-3}


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


def save_adapter(path, seed: int, **config) -> str:
    torch.manual_seed(seed)
    peft = get_peft_model(llama(), LoraConfig(**{"target_modules": QKV, "init_lora_weights": False, **config}))
    peft.save_pretrained(str(path))
    return str(path)


@pytest.fixture(scope="module")
def partner(tmp_path_factory) -> str:
    """The adapter that shares the batch: other ranks, all layers."""
    return save_adapter(tmp_path_factory.mktemp("partner"), 5, r=5, target_modules="all-linear")


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("ranks", RANKS)
def test_whole_model(ranks, dtype, partner, tmp_path) -> None:
    paths = {"one": save_adapter(tmp_path, 3, **RANKS[ranks]), "two": partner}
    names = ["one", "__base__", "two"]
    ids = torch.randint(0, 64, (3, 5), generator=torch.Generator().manual_seed(1))
    on_device = ids.to(KERNEL_DEVICE)
    exact = PeftModel.from_pretrained(llama(dtype).double(), paths["one"], adapter_name="one")
    exact.load_adapter(paths["two"], adapter_name="two")
    model = lorafx.compile(llama(dtype).to(KERNEL_DEVICE), paths, options={"lowering": "triton", "inductor": False})
    with torch.no_grad():
        got = model(on_device, adapter_names=names).logits.double().cpu()
        want = exact.double()(input_ids=ids, adapter_names=names).logits
        base = llama(dtype)(ids[1:2]).logits.double()
        idle = model(on_device, adapter_names=[None] * 3).logits.double().cpu()
    for row in range(3):
        assert (got[row] - want[row]).norm() <= BOUNDS[dtype] * want[row].norm()
    assert torch.equal(got[1], idle[1])
    assert (got[1] - base[0]).norm() <= BOUNDS[dtype] * base.norm()
    report = lorafx.explain(model)
    assert {group.lowering for group in report.groups} == {"triton"}
    assert len(report.groups) == 4
    assert report.folded == (7 if dtype == torch.float16 else 0)


def test_inside_inductor(partner) -> None:
    """The kernels called from code that Inductor compiled."""
    ids = torch.randint(0, 64, (2, 4), generator=torch.Generator().manual_seed(1)).to(KERNEL_DEVICE)
    eager = lorafx.compile(llama().to(KERNEL_DEVICE), {"two": partner}, mode="eager")
    model = lorafx.compile(llama().to(KERNEL_DEVICE), {"two": partner}, options={"lowering": "triton"})
    with torch.no_grad():
        want, got = eager(ids, adapter_names=["two", None]), model(ids, adapter_names=["two", None])
    assert (got.logits - want.logits).norm() <= 1e-5 * want.logits.norm()
    assert lorafx.explain(model).graphs[0].passes.after["lorafx.routed_lora"] == 4
