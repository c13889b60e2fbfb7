"""Any format that is read here, written as a PEFT folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from lorafx.adapter_config import CONFIG_NAME
from lorafx.errors import AdapterFormatError
from lorafx.formats.base import base_of
from lorafx.formats.writing import new_folder
from lorafx.peft_layers import base_model_of
from lorafx.reading import AdapterReader
from lorafx.skeletons import skeleton
from lorafx.sources import load_source


def to_peft(
    source: Any, out_folder: str | os.PathLike, model: nn.Module | None = None, *, overwrite: bool = False
) -> Path:
    """Write the adapter at ``source`` as PEFT's ``save_pretrained`` would: a folder with config and safetensors.

    source: a GGUF, kohya or diffusers file, a folder with one, a PEFT folder, a state dict or a (state dict, config)
        pair
    out_folder: made if it is not there; other files in it stay
    model: that the adapter is for, perhaps on the meta device. With it, all is checked against its layers; without it
        only diffusers' files (with one model's part in them) and PEFT's own can be converted
    overwrite: replace an adapter that is in ``out_folder``

    Weights keep their dtype; quantised ones of a GGUF file become float32. Returns the folder.

    LorafxError: can't be read, does not fit the model, is there already, can't be written; nothing is then left behind
    """
    name, folder = name_of(source), Path(out_folder)
    root = None if model is None else base_model_of(model)
    if root is None:
        config, tensors = load_source(name, source)
    else:
        AdapterReader(root, torch.float32).open(name, source).read()  # for its checks
        config, tensors = load_source(name, source, lambda: base_of(skeleton(root)))
    weights = {key: tensors.take(key).contiguous() for key in tensors.shapes}
    for key, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise AdapterFormatError(
                f"adapter {name!r}: {key!r} holds NaN or Inf; expected finite weights. The file is damaged or its"
                " training diverged."
            )
    config.inference_mode = True
    with new_folder(folder, CONFIG_NAME, (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME), overwrite) as written:
        config.save_pretrained(str(written))
        save_file(weights, str(written / SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
    return folder


def name_of(source: Any) -> str:
    """What messages call it."""
    return str(source) if isinstance(source, (str, os.PathLike)) else "given"
