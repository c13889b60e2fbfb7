"""A LoRA adapter written as llama.cpp reads it (``gguf_adapter.py`` says what that is)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorafx.adapters import AdapterWeights, SiteWeights
from lorafx.config_fields import show
from lorafx.errors import AdapterFormatError, LorafxError
from lorafx.formats.base import base_of
from lorafx.formats.peft_folder import name_of
from lorafx.formats.writing import new_file
from lorafx.peft_layers import base_model_of
from lorafx.reading import AdapterReader
from lorafx.skeletons import skeleton

DTYPES = {"f32": torch.float32, "f16": torch.float16}


def to_gguf(
    source: Any, out_file: str | os.PathLike, model: nn.Module, *, dtype: str = "f32", overwrite: bool = False
) -> Path:
    """Write the adapter at ``source`` as a GGUF file that llama.cpp runs on the same base model (``--lora``).

    source: whatever ``model.lora.load`` takes
    model: that the adapter is for, perhaps on the meta device; of an architecture in ``gguf_layout.ARCHITECTURES``
    dtype: "f32" or "f16"
    overwrite: replace a file that is there

    A GGUF file has one alpha, and no rsLoRA: layers whose scale that can't say have it in their B. Returns the path.

    AdapterFormatError: it has what llama.cpp's files can't (LoRA biases, DoRA, modules_to_save, layers
    that llama.cpp has no name for).
    Other LorafxErrors: can't be read, does not fit, is there already, can't be written. Nothing is then left behind.
    """
    try:
        from gguf import GGMLQuantizationType  # noqa: F401

        from lorafx.formats.gguf_layout import layout_for
    except ImportError as error:
        raise LorafxError(
            f"writing a GGUF file needs the gguf package ({error}): pip install 'lorafx[formats]'"
        ) from error
    if not isinstance(model, nn.Module):
        raise LorafxError(
            f"got {type(model).__name__} for model; expected the adapter's base model, by whose config such a file is"
            " laid out"
        )
    if dtype not in DTYPES:
        raise LorafxError(f"got dtype={show(dtype)}; expected one of {', '.join(DTYPES)}")
    name, path, root = name_of(source), Path(out_file), base_model_of(model)
    layout = layout_for(name, base_of(skeleton(root)))
    weights = AdapterReader(root, torch.float32).open(name, source).read()
    _check_layers(weights, layout.names)
    alpha = common_alpha(weights.sites)
    tensors: dict[str, np.ndarray] = {}
    for layer, site in weights.sites.items():
        b = layout.to_gguf(layer, with_alpha(site, alpha))
        for end, matrix in ((".weight.lora_a", site.a), (".weight.lora_b", b)):
            cast = matrix.to(DTYPES[dtype])
            if not torch.isfinite(cast).all():
                raise AdapterFormatError(
                    f"adapter {name!r}: the weights of {layer} don't fit into {dtype}; expected numbers of up to"
                    f" {torch.finfo(DTYPES[dtype]).max:.1e}." + (" Write it as f32." if dtype == "f16" else "")
                )
            tensors[layout.names[layer] + end] = cast.contiguous().numpy()
    with new_file(path, overwrite) as written:
        _write(written, layout.arch, path.stem, alpha, dtype, tensors, weights.invocation)
    return path


def common_alpha(sites: Mapping[str, SiteWeights]) -> float:
    """The alpha of most layers, as a float32 of the file holds it; not 0, which llama.cpp takes for none."""
    found = Counter(float(np.float32(site.scale * site.rank)) for site in sites.values())
    usable = [alpha for alpha, _ in found.most_common() if alpha != 0 and np.isfinite(alpha)]
    return usable[0] if usable else 1.0


def with_alpha(site: SiteWeights, alpha: float) -> Tensor:
    """B ``[out, rank]`` of the same layer where its scale is ``alpha`` / rank; rounded once."""
    factor = site.scale * site.rank / alpha
    return site.b if factor == 1 else (site.b.double() * factor).float()


def _check_layers(weights: AdapterWeights, names: Mapping[str, str]) -> None:
    nameless = [layer for layer in weights.sites if layer not in names]
    biased = [layer for layer, site in weights.sites.items() if site.bias is not None]
    dora = [layer for layer, site in weights.sites.items() if site.magnitude is not None]
    twice = [text for text, count in Counter(names.get(layer) for layer in weights.sites).items() if count > 1]
    if weights.saved:
        raise AdapterFormatError(
            f"adapter {weights.name!r} brings its own {next(iter(weights.saved))} (modules_to_save, or trainable"
            " tokens), which GGUF adapters have not. Expected LoRA weights alone."
        )
    for found, what in (
        (nameless, "llama.cpp has no adapters for (with tied embeddings the output head is one of these)"),
        (biased, "have a LoRA bias, which GGUF adapters have not"),
        (dora, "have DoRA, which GGUF adapters have not"),
        ([] if nameless else twice, "are one tensor in llama.cpp"),
    ):
        if found:
            raise AdapterFormatError(
                f"adapter {weights.name!r} adapts {len(found)} layer(s) that {what}, for example"
                f" {', '.join(map(show, found[:3]))}. Expected LoRA without biases on the linear layers of the decoder;"
                " it can't be written as GGUF."
            )


def _write(
    path: Path,
    arch: str,
    title: str,
    alpha: float,
    dtype: str,
    tensors: Mapping[str, np.ndarray],
    invocation: Sequence[int],
) -> None:
    from gguf import GGUFType, GGUFValueType, GGUFWriter, Keys, LlamaFileType

    writer = GGUFWriter(str(path), arch)
    try:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        if invocation:  # whole numbers of this kind are what llama.cpp asks for
            kinds = GGUFValueType.ARRAY, GGUFValueType.UINT32
            writer.add_key_value(Keys.Adapter.ALORA_INVOCATION_TOKENS, list(invocation), *kinds)
        writer.add_name(title)
        writer.add_file_type(LlamaFileType.ALL_F32 if dtype == "f32" else LlamaFileType.MOSTLY_F16)
        for key, tensor in tensors.items():
            writer.add_tensor(key, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
