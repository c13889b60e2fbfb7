"""What may be given as an adapter, and where its config and its tensors come from."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from torch import Tensor

from lorafx.adapter_config import check_config, read_config
from lorafx.errors import AdapterFormatError, AdapterMismatchError
from lorafx.folder_files import open_folder
from lorafx.formats.base import Base
from lorafx.formats.opening import SUFFIXES, find_file, open_converted
from lorafx.inferred_config import infer_config
from lorafx.tensor_files import TensorSet, open_state_dict

Source = Any  # a path, a state dict, (state dict, config), AdapterWeights or AdapterOutline


def as_mapping(adapters: Any) -> Mapping[str, Any]:
    """``adapters`` of ``compile`` as name -> source; a path alone is named after its folder, a file without its end."""

    def name_of(path: Any) -> str:
        return Path(path).stem if Path(path).suffix in SUFFIXES else Path(path).name

    if adapters is None:
        return {}
    if isinstance(adapters, Mapping) and not (adapters and all(isinstance(v, Tensor) for v in adapters.values())):
        return adapters
    if isinstance(adapters, (list, tuple)) and all(isinstance(item, (str, Path)) for item in adapters):
        names = [name_of(item) for item in adapters]
        if len(set(names)) < len(names):
            raise AdapterMismatchError(f"two of these adapters have one name: {names}; pass a dict name -> path")
        return dict(zip(names, adapters, strict=True))
    if isinstance(adapters, (str, Path)):
        return {name_of(adapters): adapters}
    return {"default": adapters}


def load_source(name: str, source: Source, base: Callable[[], Base] | None = None) -> tuple[LoraConfig, TensorSet]:
    """The config and the tensors at ``source``, of a kind that lorafx runs, with PEFT's names.

    base: what is known of the model, asked for only where a format other than PEFT's needs it

    AdapterFormatError: they are not of such a kind. AdapterMismatchError: the names are not those of ``base``'s layers.
    """
    if isinstance(source, (str, os.PathLike)) and isinstance(os.fspath(source), str):
        folder = Path(source)
        file = find_file(name, folder)
        if file is not None:
            return open_converted(name, file, base)
        return read_config(name, folder), open_folder(name, folder)
    if isinstance(source, tuple) and len(source) == 2:
        tensors, config = source if isinstance(source[0], Mapping) and _is_tensors(source[0]) else source[::-1]
        if isinstance(tensors, Mapping) and _is_tensors(tensors) and isinstance(config, (Mapping, PeftConfig)):
            fields = config if isinstance(config, Mapping) else vars(config)
            return check_config(name, fields), open_state_dict(name, tensors)
    elif isinstance(source, Mapping) and _is_tensors(source):
        found = open_state_dict(name, source)
        return infer_config(name, found.shapes), found
    raise AdapterFormatError(
        f"adapter {name!r}: got {type(source).__name__}; expected the path of a PEFT folder or of an adapter's file,"
        " a state dict of tensors, or a pair (state dict, LoraConfig or dict)."
    )


def _is_tensors(value: Mapping) -> bool:
    return bool(value) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
