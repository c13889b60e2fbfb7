"""A GGUF file's texts, numbers and tensors, read with the gguf package behind two checks that it does not make.

Its reader takes what lies past the end of a file for nothing, and goes on for as long as a count in the file says; and
it makes objects of several hundred bytes of each number in a header. So every read is held to the file's end, and the
reads of a header are counted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, ReaderTensor, dequantize
from torch import Tensor

from lorafx.config_fields import NAMES_LIMIT
from lorafx.tensor_files import HEADER_LIMIT, TensorSet, check_kind, check_length, check_names, unreadable

READS_LIMIT = 1 << 16  # an adapter of all seven projections of 100 layers takes some 9,000
PLAIN = {
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
WHOLE = {getattr(GGMLQuantizationType, kind) for kind in ("I8", "I16", "I32", "I64")}


@dataclass(frozen=True)
class GgufFile:
    """metadata: numbers, texts and short lists of numbers by name; another list is there as None
    tensors: ``[rows, columns]``; what is quantised comes as float32"""

    metadata: Mapping[str, Any]
    tensors: TensorSet


class BoundedReader(GGUFReader):
    """The gguf package's reader, for a file that may claim anything. ValueError: it claims what is not there"""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise ValueError(f"it claims {end:,} bytes or more, and has {len(self.data):,}")
        if "data_offset" not in vars(self):  # still in the header
            self.reads = getattr(self, "reads", 0) + 1
            if self.reads > READS_LIMIT or end > HEADER_LIMIT:
                raise ValueError("its header is longer than any adapter's: is it a model?")
        return super()._get(offset, dtype, count, override_order)


def open_gguf(name: str, path: Path, found: os.stat_result) -> GgufFile:
    """The GGUF file at ``path``, mapped. AdapterFormatError: damaged, or with tensors that no LoRA adapter has"""
    try:
        with np.errstate(all="ignore"):
            reader = BoundedReader(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        if any(tensor.data_offset < reader.data_offset for tensor in reader.tensors):
            raise ValueError("a tensor begins before the data does")
        if sum(tensor.n_bytes for tensor in reader.tensors) > found.st_size:
            raise ValueError("its tensors share bytes")
        metadata = {field.name: _value(field) for field in reader.fields.values()}
    except Exception as error:  # whatever the package trips over
        raise unreadable(name, path, error) from error
    check_names(name, tensors)
    for key, tensor in tensors.items():
        kind = tensor.tensor_type
        check_kind(name, key, _shape(tensor), None if kind in WHOLE else PLAIN.get(kind, torch.float32), kind.name)

    def take(key: str) -> Tensor:
        try:
            check_length(path, found)
            return _numbers(tensors[key])
        except Exception as error:
            raise unreadable(name, path, error) from error

    return GgufFile(metadata, TensorSet({key: _shape(tensor) for key, tensor in tensors.items()}, take))


def _value(field: Any) -> Any:
    if field.types[:1] != [GGUFValueType.ARRAY]:
        return field.contents()
    short = len(field.types) == 2 and len(field.data) <= NAMES_LIMIT and field.types[1] != GGUFValueType.STRING
    return field.contents() if short else None


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    """GGUF counts dimensions from the fastest, and its writers may leave out a last one of 1."""
    shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
    return (1, *shape) if len(shape) == 1 else shape


def _numbers(tensor: ReaderTensor) -> Tensor:
    kind, data = tensor.tensor_type, tensor.data
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.F64):
        numbers = data.astype(data.dtype.newbyteorder("="))
    else:
        numbers = dequantize(np.array(data), kind)
    return torch.from_numpy(numbers).reshape(_shape(tensor)).to(PLAIN.get(kind, torch.float32))
