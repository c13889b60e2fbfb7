"""What the examples share: a tiny Llama, a tokenizer for it, and adapters in folders, as PEFT writes them."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

logging.set_verbosity_error()
scratch = tempfile.TemporaryDirectory(prefix="lorafx-examples-")


def mode() -> str | None:
    """``--mode eager`` computes the same at once; by default the example compiles, which takes about a minute."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", help='as for lorafx.compile: "eager" compiles nothing')
    return parser.parse_args().mode


def tiny_llama() -> LlamaForCausalLM:
    """The same random weights each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words w4 to w95, padded on the left as generate wants it."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, 96)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **names)


def save_adapters(build: Callable[[], nn.Module] = tiny_llama, **configs: dict) -> dict[str, str]:
    """Random adapters for the model that ``build`` gives: name -> folder, for name -> fields of LoraConfig."""
    configs = configs or {
        "sql": {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
        "json": {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"},
    }
    folders = {}
    for seed, (name, fields) in enumerate(configs.items(), start=1):
        model = build()
        torch.manual_seed(seed)
        folders[name] = str(Path(scratch.name) / name)
        get_peft_model(model, LoraConfig(init_lora_weights=False, **fields)).save_pretrained(folders[name])
    return folders
