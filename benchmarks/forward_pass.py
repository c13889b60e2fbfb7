"""Forward passes to be timed: of which batch, with which adapters, on which base; for the CPU and the GPU benchmark."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

QKV = ("q_proj", "k_proj", "v_proj")
ALL = (*QKV, "o_proj", "gate_proj", "up_proj", "down_proj")
SEEN = 64  # positions of the static cache, already filled when a token is decoded

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Case:
    """rows: of the batch; tokens: 1 decodes behind a static cache, more prefills without one; ranks: of the adapters,
    dealt to the rows in turn, none: the base model; targets: layers adapted; adapter_dtype: PEFT's default is
    float32; cache: positions of the static cache; strength: what B's random numbers are multiplied by"""

    rows: int
    tokens: int
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    adapter_dtype: torch.dtype = torch.float32
    in_use: int | None = None  # of the adapters, the first so many; None: all
    cache: int = 1024
    strength: float = 0.1  # B as small as a trained one, so that the logits stay in range

    @property
    def names(self) -> list[str | None]:
        """The adapter of each row."""
        used = len(self.ranks) if self.in_use is None else self.in_use
        return [f"a{i % used}" if used else None for i in range(self.rows)]

    def __str__(self) -> str:
        layers = {QKV: "q,k,v", ALL: "all seven"}.get(self.targets, ",".join(self.targets))
        what = "decode" if self.tokens == 1 else f"prefill {self.tokens}"
        ranks = f"r {self.ranks[0]}" if len(self.ranks) == 1 else f"{len(self.ranks)} adapters"
        used = "" if self.in_use is None else f", {self.in_use} in use"
        dtype = str(self.adapter_dtype).removeprefix("torch.")
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return f"{what}, {rows}, {ranks} on {layers}{used}, {dtype}"


def make_base(
    layers: int, sizes: dict[str, int], device: str, dtype: torch.dtype, vocabulary: int = 4096
) -> LlamaForCausalLM:
    """Random weights; a small vocabulary, since the head has no part in this."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=layers, max_position_embeddings=8192, **sizes)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def sharing(model: nn.Module) -> nn.Module:
    """A copy of ``model`` around the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def with_adapters(base: PreTrainedModel, case: Case) -> PeftModel:
    """PEFT put on ``base``; every adapter changes what comes out."""
    model = None
    for i, rank in enumerate(case.ranks):
        torch.manual_seed(i + 1)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(case.targets), init_lora_weights=False)
        upcast = case.adapter_dtype == torch.float32
        if model is None:
            model = get_peft_model(base, config, "a0", autocast_adapter_dtype=upcast)
        else:
            model.add_adapter(f"a{i}", config, autocast_adapter_dtype=upcast)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if "lora_B" in name:
            parameter.mul_(case.strength)
    return model.eval()


Past = list[tuple[Tensor, Tensor]]  # of each layer, keys and values [rows, heads, SEEN, head_dim]


@torch.no_grad()
def past_of(model: PreTrainedModel, rows: int) -> Past:
    """What ``model`` itself keeps of ``SEEN`` tokens. Behind random keys and values a trained model carries rounding on
    a thousandfold."""
    ids = torch.randint(0, model.config.vocab_size, (rows, SEEN), generator=torch.Generator().manual_seed(1))
    cache = model(input_ids=ids.to(model.device), use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]


def make_step(
    model: nn.Module, case: Case, call: Callable[..., Any] | None = None, past: Past | None = None, **more: Any
) -> Callable[..., Tensor]:
    """One forward pass of ``case``, always the same; returns the logits. ``call``: what to call in place of ``model``,
    ``past``: what a decode step finds in its cache, None: random numbers, ``more``: arguments besides, such as
    adapter_names; those that a step is given come on top."""
    embedding = next(model.parameters())
    device, dtype = embedding.device, embedding.dtype
    ids = torch.randint(
        0, model.config.vocab_size, (case.rows, case.tokens), generator=torch.Generator().manual_seed(0)
    ).to(device)
    kwargs = {"input_ids": ids, "use_cache": False}
    if case.tokens == 1:
        cache = StaticCache(config=model.config, max_cache_len=case.cache)
        config = model.config
        cache.early_initialization(
            case.rows, config.num_key_value_heads, config.hidden_size // config.num_attention_heads, dtype, device
        )
        generator = torch.Generator(device).manual_seed(0)
        for i, layer in enumerate(cache.layers):
            for j, part in enumerate((layer.keys, layer.values)):
                if past is None:  # drawn in one dtype, so that the reference sees the same
                    part.copy_(torch.randn(part.shape, generator=generator, dtype=torch.bfloat16, device=device))
                else:
                    part[:, :, :SEEN].copy_(past[i][j])
        kwargs = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
    seen = [layer.cumulative_length for layer in kwargs["past_key_values"].layers] if case.tokens == 1 else []

    def step(**now: Any) -> Tensor:
        for length in seen:
            length.fill_(SEEN)
        with torch.no_grad():
            return (call or model)(**kwargs, **{**more, **now}).logits

    return step
