"""Every architecture that is written as GGUF, with random weights, run by llama.cpp: base model and adapter.

The base is written with the names and the order of rows that the adapter gets, so its logits are those of transformers
only where both are right.
"""

from __future__ import annotations

import gguf
import pytest
import torch
import transformers

import lorafx
from lorafx.formats import to_gguf
from lorafx.formats.base import base_of
from lorafx.formats.gguf_layout import ARCHITECTURES, interleaved, layout_for

from .files import linear_paths, peft_folder
from .test_llama_cpp import theirs

pytest.importorskip("llama_cpp")

IDS = list(range(5, 29))
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}
KINDS = {  # model type: the class's name, what its config needs beside the common
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"head_dim": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "smollm3": ("SmolLM3", {}),
    "granite": ("Granite", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma": ("Gemma", {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3_text": ("Gemma3", GEMMA),
    "phi3": ("Phi3", {}),
}
# llama.cpp looks GELU up in a table of 16 bit numbers
TOLERANCE = {"gemma": 2e-3, "gemma2": 2e-3, "gemma3_text": 2e-3}


def test_none_is_left_out():
    assert KINDS.keys() == ARCHITECTURES.keys()


def build(model_type):
    kind, more = KINDS[model_type]
    values = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
        "initializer_range": 0.3, "tie_word_embeddings": False, **more,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}{'TextConfig' if kind == 'Gemma3' else 'Config'}")(**values)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data += 0.2 * torch.randn_like(weight)
    assert config.model_type == model_type
    return model


def numbers(config):
    """What llama.cpp has to know of the model."""
    rotary = config.rope_parameters
    found = {
        "vocab_size": config.vocab_size,
        "context_length": 256,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rotary.get("full_attention", rotary)["rope_theta"]),
        "attention.sliding_window": getattr(config, "sliding_window", None),
    }
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found |= dict.fromkeys(("rope.dimension_count", "attention.key_length", "attention.value_length"), size)
    for key, name in (
        ("attention.scale", "attention_multiplier"),
        ("embedding_scale", "embedding_multiplier"),
        ("residual_scale", "residual_multiplier"),
        ("logit_scale", "logits_scaling"),
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ):
        found[key] = None if getattr(config, name, None) is None else float(getattr(config, name))
    if hasattr(config, "num_local_experts"):
        found |= {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}
    return {key: value for key, value in found.items() if value is not None}


def tensors(model, layout):
    kind = next(kind for kind, text in gguf.MODEL_ARCH_NAMES.items() if text == layout.arch)
    known = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        path, _, role = name.rpartition(".")
        if role == "gate_up_proj":
            block = path.split(".")[2]
            gate, up = tensor.chunk(2, 1)
            yield f"blk.{block}.ffn_gate_exps.weight", gate
            yield f"blk.{block}.ffn_up_exps.weight", up
        elif role == "down_proj":
            yield f"blk.{path.split('.')[2]}.ffn_down_exps.weight", tensor
        elif path.endswith("mlp.gate"):
            yield f"blk.{path.split('.')[2]}.ffn_gate_inp.weight", tensor
        elif path != "lm_head" or not model.config.tie_word_embeddings:
            if path in layout.heads:
                tensor = interleaved(tensor, layout.heads[path])
            if layout.arch.startswith("gemma") and "norm" in path:
                tensor = tensor + 1
            yield f"{known.get_name(path)}.{role}", tensor


def write_base(model, path):
    layout = layout_for("base", base_of(model))
    writer = gguf.GGUFWriter(str(path), layout.arch)
    for key, value in numbers(model.config).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{layout.arch}.{key}", value)
    writer.add_tokenizer_model("no_vocab")
    for key, tensor in tensors(model, layout):
        writer.add_tensor(key, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def ours(model):
    return model(torch.tensor([IDS])).logits[0].double()


@pytest.mark.parametrize("model_type", KINDS)
def test_llama_cpp_runs_it(tmp_path, model_type):
    model = build(model_type)
    write_base(model, tmp_path / "base.gguf")
    targets = sorted({path.rpartition(".")[2] for path in linear_paths(model, "_proj")})
    folder = peft_folder(build(model_type), tmp_path / "a", target_modules=targets, lora_alpha=4)
    path = to_gguf(folder, tmp_path / "a.gguf", model)
    base, got = (torch.from_numpy(theirs(str(tmp_path / "base.gguf"), IDS, file)) for file in (None, path))
    want_base = ours(model)
    want = ours(lorafx.compile(model, {"a": folder}, mode="eager"))
    tolerance = TOLERANCE.get(model_type, 2e-5)
    assert (base - want_base).norm() <= tolerance * want_base.norm()
    assert (want - want_base).norm() > 0.2 * want_base.norm()
    assert ((got - base) - (want - want_base)).norm() <= tolerance * (want - want_base).norm()
