"""Finds out what a file is, by what is in it, and opens it with PEFT's names."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from peft import LoraConfig

from lorafx.adapter_config import CONFIG_NAME
from lorafx.config_fields import show
from lorafx.errors import AdapterFormatError, UnsupportedModelError
from lorafx.file_paths import find_regular, read_start
from lorafx.formats import diffusers, kohya
from lorafx.formats.base import Base
from lorafx.formats.conversion import Conversion, converted
from lorafx.tensor_files import TensorSet, open_safetensors, read_header

MAGIC = b"GGUF"
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
PEFT_NAME = "adapter_model.safetensors"
SUFFIXES = (".gguf", ".safetensors")


def detect(path: str | os.PathLike) -> str:
    """What the adapter at ``path``, a file or a folder, is: "peft", "gguf", "kohya" or "diffusers".

    Found out by what is in the file, not by its name. AdapterFormatError: none of them
    """
    path, name = Path(path), str(path)
    file = find_file(name, path)
    if file is None and os.path.isdir(path) and find_regular(name, path / CONFIG_NAME) is not None:
        return "peft"
    if file is None:
        raise AdapterFormatError(
            f"{name!r} is no adapter; expected a PEFT folder (with {CONFIG_NAME}), a GGUF LoRA file, or kohya's or"
            " diffusers' safetensors."
        )
    return kind_of(name, file)


def find_file(name: str, path: Path) -> Path | None:
    """The file at ``path``, or in a folder that is not PEFT's; None: a PEFT folder, or nothing.

    AdapterFormatError: no regular file, or several in the folder
    """
    if not os.path.isdir(path):
        return path if os.path.exists(path) and find_regular(name, path) is not None else None
    if os.path.lexists(path / CONFIG_NAME):
        return None
    try:
        files = sorted(file for file in os.listdir(path) if file.endswith(SUFFIXES) and file != PEFT_NAME)
    except OSError as error:
        raise AdapterFormatError(f"adapter {name!r}: {str(path)!r} can't be read: {error}") from error
    if DIFFUSERS_NAME in files:
        files = [DIFFUSERS_NAME]
    if len(files) > 1:
        raise AdapterFormatError(
            f"adapter {name!r}: {str(path)!r} has {len(files)} files that may be meant, such as {files[0]} and"
            f" {files[1]}. Name one of them."
        )
    return path / files[0] if files and find_regular(name, path / files[0]) is not None else None


def kind_of(name: str, file: Path) -> str:
    """What is in ``file``. AdapterFormatError: none of these formats"""
    if read_start(name, file, len(MAGIC)) == MAGIC:
        return "gguf"
    try:
        shapes = read_header(name, file, _found(name, file)).shapes
    except AdapterFormatError as error:
        raise AdapterFormatError(
            f"adapter {name!r}: {str(file)!r} is not an adapter, or is damaged: it can't be read as safetensors"
            f" ({error.__cause__ or error}), and does not begin as GGUF does. Expected a PEFT folder, or a file of"
            " llama.cpp's, kohya's or diffusers'."
        ) from error
    if any(key.startswith("base_model.") for key in shapes):
        return "peft"
    for kind, is_kind in (("kohya", kohya.is_kohya), ("diffusers", diffusers.is_diffusers)):
        if is_kind(shapes):
            return kind
    raise AdapterFormatError(
        f"adapter {name!r}: the {len(shapes)} names in {str(file)!r}, for example"
        f" {', '.join(map(show, list(shapes)[:3])) or 'none'}, are of no format that is known here: a PEFT folder,"
        " GGUF, kohya's ('lora_unet_....lora_down.weight'), diffusers' ('unet....lora_A.weight'). Other kinds of"
        " adapters than LoRA are not run from a file."
    )


def open_converted(name: str, file: Path, base: Callable[[], Base] | None) -> tuple[LoraConfig, TensorSet]:
    """The adapter in ``file`` as PEFT would have it.

    base: what is known of the model; None: nothing, and only diffusers' files of one part can be opened

    AdapterFormatError, AdapterMismatchError, UnsupportedModelError: it can't be, and why
    """
    kind, found = kind_of(name, file), _found(name, file)
    if kind == "peft":
        raise AdapterFormatError(
            f"adapter {name!r}: {str(file)!r} has PEFT's names, but no config. Expected the folder that save_pretrained"
            f" wrote, with {CONFIG_NAME} and {PEFT_NAME} in it: pass the folder."
        )
    if base is None and kind != "diffusers":
        raise UnsupportedModelError(
            f"adapter {name!r} is a {kind} file, whose names mean something with its model only. Pass the model."
        )
    if kind == "gguf":
        return _open_gguf(name, file, found, base())
    header = read_header(name, file, found)
    if kind == "kohya":
        conversion = kohya.convert(name, header.shapes, base())
    else:
        conversion = diffusers.convert(name, header.shapes, header.metadata, base and base())
    return _opened(name, conversion, open_safetensors(name, file, found, conversion.names()))


def _open_gguf(name: str, file: Path, found: os.stat_result, base: Base) -> tuple[LoraConfig, TensorSet]:
    try:
        from lorafx.formats import gguf_adapter, gguf_file
    except ImportError as error:
        raise AdapterFormatError(
            f"adapter {name!r}: reading a GGUF file needs the gguf package ({error}): pip install 'lorafx[formats]'"
        ) from error
    opened = gguf_file.open_gguf(name, file, found)
    return converted(name, gguf_adapter.convert(name, opened.tensors.shapes, opened.metadata, base), opened.tensors)


def _opened(name: str, conversion: Conversion, tensors: TensorSet) -> tuple[LoraConfig, TensorSet]:
    missing = conversion.names() - tensors.shapes.keys()
    if missing:
        raise AdapterFormatError(f"adapter {name!r}: its file was changed while it was opened. Load it again.")
    return converted(name, conversion, tensors)


def _found(name: str, file: Path) -> os.stat_result:
    found = find_regular(name, file)
    if found is None:
        raise AdapterFormatError(f"adapter {name!r}: {str(file)!r} is gone. Load it again.")
    return found
