"""How llama.cpp lays out a model: its names for layers, and the order of q's and k's rows.

Names come from the gguf package's own map. The order of rows is nowhere in a file: it is what llama.cpp's converter
(conversion/*.py of ggml-org/llama.cpp, ``LlamaModel.permute`` and ``undo_permute`` of the classes) does to each
architecture, so only those are taken that llama.cpp itself was seen to run (tests/formats/test_architectures.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from torch import Tensor

from lorafx.errors import UnsupportedModelError
from lorafx.formats.base import Base

# transformers' model type: (llama.cpp's architecture, whether q's and k's rows are in another order there)
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "mixtral": ("llama", True),
    "smollm3": ("smollm3", True),
    "granite": ("granite", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "phi3": ("phi3", False),
}
TURNED = re.compile(r"blk\.\d+\.attn_(q|k)")


@dataclass(frozen=True)
class GgufLayout:
    """arch: llama.cpp's name of the architecture
    names: of the model's linear layers by their path, without ".weight"; those that llama.cpp has none for are not in
    heads: how many heads the rows of a layer are of, by path, where llama.cpp has them in another order
    """

    arch: str
    names: Mapping[str, str]
    heads: Mapping[str, int]

    def to_gguf(self, path: str, b: Tensor) -> Tensor:
        """B ``[out, rank]`` of the layer at ``path`` with its rows in llama.cpp's order."""
        return interleaved(b, self.heads[path]) if path in self.heads else b

    def turns(self) -> dict[str, partial[Tensor]]:
        """The way back, by path."""
        return {path: partial(halved, heads=heads) for path, heads in self.heads.items()}


def interleaved(b: Tensor, heads: int) -> Tensor:
    """Row i of a head's first half and row i of its second half, one after the other.

    transformers turns a head's numbers i and i + half together, llama.cpp those that stand side by side.
    """
    return b.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(b.shape)


def halved(b: Tensor, heads: int) -> Tensor:
    """The inverse of ``interleaved``."""
    return b.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(b.shape)


def layout_for(name: str, base: Base) -> GgufLayout:
    """How llama.cpp lays out ``base``. UnsupportedModelError: it does not run it, or not in a way known here"""
    config = base.text_config()
    model_type = getattr(config, "model_type", None)
    if model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"adapter {name!r}: {base.kind} is of type {model_type!r}, and how llama.cpp lays that out is not known"
            f" here. Expected one of {', '.join(ARCHITECTURES)}."
        )
    arch, turned = ARCHITECTURES[model_type]
    kind = next(kind for kind, text in MODEL_ARCH_NAMES.items() if text == arch)
    known = get_tensor_name_map(kind, config.num_hidden_layers)
    names = {}
    for path, sizes in base.layers.items():
        for spelled in (path, f"model.{path}", path.replace("language_model.", "")):
            if sizes is not None and known.get_name(spelled) is not None:
                names[path] = known.get_name(spelled)
                break
    if getattr(config, "tie_word_embeddings", False):
        names = {path: text for path, text in names.items() if text != "output"}  # llama.cpp has no such tensor then
    heads = {}
    for path, text in names.items():
        found = TURNED.fullmatch(text) if turned else None
        if found is not None:
            every = config.num_attention_heads
            heads[path] = every if found[1] == "q" else getattr(config, "num_key_value_heads", None) or every
            if base.layers[path][1] % (2 * heads[path]):
                raise UnsupportedModelError(
                    f"adapter {name!r}: {path} has {base.layers[path][1]} rows, which are not {heads[path]} heads of an"
                    " even size. Expected the head counts in the model's config to be those of its layers."
                )
    return GgufLayout(arch, names, heads)
