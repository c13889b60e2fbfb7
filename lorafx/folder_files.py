"""The weights of a PEFT folder, and the older of its two formats: ``.bin``, a zip file with a pickle in it.

The pickle is read with torch's ``weights_only``, after a look at what it would call. Nothing in the zip may be
compressed, so that no small file becomes a large one.
"""

from __future__ import annotations

import os
import pickletools
import zipfile
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from lorafx.errors import AdapterFormatError
from lorafx.file_paths import find_regular
from lorafx.tensor_files import TensorSet, open_safetensors, open_state_dict, unreadable

PICKLE_LIMIT = 64 << 20  # bytes of the pickle in a .bin, which holds names and shapes only

# What the pickle of a state dict calls. torch's own list for weights_only is longer: bytearray(10**12) is on it.
GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16")),
}
CALLS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}


def open_folder(name: str, folder: Path) -> TensorSet:
    """The weights in a PEFT folder. AdapterFormatError: there are none, or they can't be those of a LoRA adapter."""
    for file, opener in ((SAFETENSORS_WEIGHTS_NAME, open_safetensors), (WEIGHTS_NAME, open_pickle)):
        found = find_regular(name, folder / file)
        if found is not None:
            return opener(name, folder / file, found)
    raise AdapterFormatError(
        f"adapter {name!r}: {str(folder)!r} has no weights; expected {SAFETENSORS_WEIGHTS_NAME} beside its config."
    )


def open_pickle(name: str, path: Path, found: os.stat_result) -> TensorSet:
    """A ``torch.save`` file: mapped, its pickle checked to be that of a state dict, then read with weights_only."""
    if not zipfile.is_zipfile(path):
        raise AdapterFormatError(
            f"adapter {name!r}: the weights in {str(path)!r} can't be read: no zip file, as torch.save writes since"
            " 1.6. Older ones are pickles, which run code: load it where you trust it, and save it as"
            f" {SAFETENSORS_WEIGHTS_NAME}."
        )
    try:
        _check_zip(path, found.st_size)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise unreadable(name, path, error) from error
    if not isinstance(tensors, dict):
        raise AdapterFormatError(
            f"adapter {name!r}: {str(path)!r} holds a {type(tensors).__name__}; expected a dict of tensors by name."
        )
    opened = open_state_dict(name, tensors)
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > found.st_size:
        raise AdapterFormatError(
            f"adapter {name!r}: the tensors in {str(path)!r} have {claimed:,} bytes together, the file"
            f" {found.st_size:,}: they share memory. Expected a tensor's own numbers for each: save it as"
            f" {SAFETENSORS_WEIGHTS_NAME}."
        )
    return opened


def _check_zip(path: Path, size: int) -> None:
    """ValueError: not what torch.save writes for a state dict."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("a record in it is compressed; torch.save stores them as they are")
        if sum(record.file_size for record in records) > size:
            raise ValueError("its records claim more bytes than the file has")
        pickles = [record for record in records if record.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > PICKLE_LIMIT:
            raise ValueError("expected one data.pkl in it, of names and shapes")
        for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if opcode.name in CALLS or (opcode.name == "GLOBAL" and argument not in GLOBALS):
                raise ValueError(f"its pickle uses {argument or opcode.name}, which no state dict of weights needs")
