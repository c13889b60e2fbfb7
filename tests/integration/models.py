"""Tiny models of many families, adapters for them, and the plain PEFT model that every result is compared with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import lorafx

EAGER_GRAPH = {"inductor": False}  # the rewritten graph, run as it is
VOCABULARY = 96
TOKENS = 7


@dataclass(frozen=True)
class Family:
    """How to build one kind of model, what to feed it, and which layers are its q, k and v."""

    model: Callable[[int], nn.Module]  # layers -> model
    inputs: Callable[[int], dict[str, Tensor]]  # rows -> keyword arguments
    qkv: tuple[str, ...]
    layers: int = 2

    def build(self, layers: int | None = None, dtype: torch.dtype = torch.float32) -> Any:
        """The same weights each time, in eval mode."""
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.model(layers or self.layers).eval().to(dtype)


def tokens(rows: int, columns: int = TOKENS, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, columns), generator=generator)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _ids(rows: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(rows)}


def _decoder(kind: str, **config: Any) -> Callable[[int], nn.Module]:
    """A causal model whose config has Llama's names."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }

    def make(layers: int) -> nn.Module:
        values = {**common, **config, "num_hidden_layers": layers}
        return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**values))

    return make


def _gpt2(layers: int) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=layers, n_head=4, n_positions=64, eos_token_id=None
        )
    )


def _bert(layers: int) -> nn.Module:
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
        )
    )


def _t5(layers: int) -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=layers,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=None,
        )
    )


def _vit(layers: int) -> nn.Module:
    return transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=4,
        )
    )


def _whisper(layers: int) -> nn.Module:
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )


FAMILIES = {
    "llama": Family(_decoder("Llama"), _ids, ("q_proj", "k_proj", "v_proj")),
    "qwen2": Family(_decoder("Qwen2"), _ids, ("q_proj", "k_proj", "v_proj")),
    "gpt2": Family(_gpt2, _ids, ("c_attn",)),
    "phi3": Family(_decoder("Phi3"), _ids, ("qkv_proj",)),
    "bert": Family(_bert, _ids, ("query", "key", "value")),
    "t5": Family(_t5, lambda rows: {**_ids(rows), "decoder_input_ids": tokens(rows, 4, seed=3)}, ("q", "k", "v")),
    "mixtral": Family(
        _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2), _ids, ("q_proj", "k_proj", "v_proj")
    ),
    "vit": Family(_vit, lambda rows: {"pixel_values": noise(rows, 3, 16, 16)}, ("q_proj", "k_proj", "v_proj")),
    "whisper": Family(
        _whisper,
        lambda rows: {"input_features": noise(rows, 8, 20), "decoder_input_ids": tokens(rows, 4, seed=3)},
        ("q_proj", "k_proj", "v_proj"),
    ),
}
LLAMA = FAMILIES["llama"]


# ------------------------------------------------------------------------------------------------ adapters


def config(**values: Any) -> LoraConfig:
    """An adapter with a B that is not zero and the dropout that published adapters have."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "init_lora_weights": False, **values})


def save_adapter(family: Family, path: Path, seed: int = 0, layers: int | None = None, **values: Any) -> str:
    """A PEFT folder with one adapter, made and written by PEFT."""
    model = family.build(layers)
    torch.manual_seed(100 + seed)
    get_peft_model(model, config(**values)).save_pretrained(str(path))
    return str(path)


def save_adapters(
    family: Family, folder: Path, layers: int | None = None, **configs: Mapping[str, Any]
) -> dict[str, str]:
    """name -> folder, for name -> fields of LoraConfig."""
    return {
        name: save_adapter(family, Path(folder) / name, seed, layers, **values)
        for seed, (name, values) in enumerate(configs.items())
    }


def three_adapters(family: Family, folder: Path, layers: int | None = None, **common: Any) -> dict[str, str]:
    """Different ranks, scales and targets."""
    return save_adapters(
        family,
        folder,
        layers,
        a={"r": 4, "target_modules": list(family.qkv[:1]), **common},
        b={"r": 7, "lora_alpha": 10, "target_modules": list(family.qkv), **common},
        c={"r": 16, "target_modules": "all-linear", **common},
    )


def with_peft(model: nn.Module, folders: Mapping[str, Any]) -> PeftModel:
    """``model`` with these adapters loaded by PEFT, in eval mode; the first is active."""
    names = list(folders)
    peft_model = PeftModel.from_pretrained(model, folders[names[0]], adapter_name=names[0])
    for name in names[1:]:
        peft_model.load_adapter(folders[name], adapter_name=name)
    return peft_model.eval()


def adapted_layers(peft_model: nn.Module) -> set[str]:
    """Paths, in the base model, of every layer that PEFT adapted."""
    root = peft_model.get_base_model()
    return {path for path, module in root.named_modules() if isinstance(module, LoraLayer)}


# ------------------------------------------------------------------------------------------------ comparing


def main_output(output: Any) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    return output.logits if "logits" in output else output.last_hidden_state


@torch.no_grad()
def run(model: nn.Module, inputs: Mapping[str, Tensor], adapter_names: Any = None) -> Tensor:
    extra = {} if adapter_names is None else {"adapter_names": adapter_names}
    return main_output(model(**inputs, **extra)).clone()


def difference(got: Tensor, want: Tensor) -> float:
    """rel-L2"""
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm())


def assert_close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert difference(got, want) <= tolerance


def compiled_llama(folders: Mapping[str, Any], layers: int | None = None, **arguments: Any) -> Any:
    """A tiny Llama with these adapters; the rewritten graph is run without Inductor."""
    arguments.setdefault("options", EAGER_GRAPH)
    return lorafx.compile(LLAMA.build(layers), dict(folders), **arguments)
