"""Adapters' files written by hand, from numbers that are kept: what every reader here is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lorafx.reading import AdapterReader


def matrices(model: nn.Module, paths: Iterable[str], rank: int = 4, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Signed A ``[rank, in]`` and B ``[out, rank]`` by path; ranks differ from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for place, path in enumerate(paths):
        out, into = model.get_submodule(path).weight.shape
        r = rank + place % 2
        a, b = (torch.randn(shape, generator=generator) / 8 for shape in ((r, into), (out, r)))
        found[path] = a, b
    return found


def linear_paths(model: nn.Module, *ends: str) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path.endswith(ends)]


def deltas(model: nn.Module, source: Any) -> dict[str, Tensor]:
    """What the adapter adds to each weight, in float64, as lorafx reads it."""
    weights = AdapterReader(model, torch.float32).open("a", source).read()
    return {path: site.scale * site.b.double() @ site.a.double() for path, site in weights.sites.items()}


def assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for path, delta in want.items():
        assert (got[path] - delta).norm() <= tolerance * delta.norm(), path


def peft_folder(model: nn.Module, folder: Path, seed: int = 0, **values: Any) -> str:
    """An adapter of ``model``, which is used up, written by PEFT."""
    torch.manual_seed(seed)
    values = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **values}
    get_peft_model(model, LoraConfig(**values)).save_pretrained(str(folder))
    return str(folder)


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    arch: str = "llama",
    alpha: Any = 8.0,
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    **texts: str,
) -> Path:
    """tensors: as they stand in the file; texts: with "_" for the first "."; None leaves one out"""
    writer = gguf.GGUFWriter(str(path), arch)
    for key, text in {"general_type": "adapter", "adapter_type": "lora", **texts}.items():
        if text is not None:
            writer.add_string(key.replace("_", ".", 1), text)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for key, tensor in tensors.items():
        kind = (kinds or {}).get(key)
        writer.add_tensor(key, tensor if kind is None else gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
