"""The weights of an adapter before they are read: names, shapes and dtypes, checked against the bytes that are there.

A file may claim anything. Nothing here allocates what is claimed: shapes come from a parsed header, tensors are views
of the mapped file, and a name, dtype or shape that no LoRA weight has is refused before either is looked at further.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorafx.errors import AdapterFormatError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WHOLE = ("I64", "I32")  # what an alpha may be beside them
HEADER_LIMIT = 16 << 20  # bytes; a header has about 100 for each tensor
TENSORS_LIMIT = 1 << 16
NAME_LIMIT = 512


@dataclass(frozen=True)
class TensorSet:
    """Named tensors: what is known of them, and how to get one.

    shapes: checked; take: the tensor of that name, which has that shape
    flat: all their numbers in one piece, in the order of ``shapes``; None where they don't stand so
    """

    shapes: Mapping[str, tuple[int, ...]]
    take: Callable[[str], Tensor]
    flat: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: shapes by name, of whatever dtype, and the texts it carries."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]


def read_header(name: str, path: Path, found: os.stat_result) -> Header:
    """The header of a safetensors file. AdapterFormatError: it is none, or it is damaged."""
    try:
        _, opened = _open(path, found.st_size)
        names = list(opened.offset_keys())
        check_names(name, names)
        shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in names}
        return Header(shapes, opened.metadata() or {})
    except (SafetensorError, struct.error, OSError, ValueError, OverflowError, RuntimeError) as error:
        raise unreadable(name, path, error) from error


def _open(path: Path, size: int) -> tuple[int, Any]:
    """The length of the header, and the file in safetensors' hands. ValueError: the header is too long"""
    with open(path, "rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
    if header > min(HEADER_LIMIT, size - 8):
        raise ValueError(f"its header claims {header:,} bytes, of a file of {size:,}, at most {HEADER_LIMIT:,}")
    return header, safe_open(str(path), framework="pt", device="cpu")


def open_safetensors(name: str, path: Path, found: os.stat_result, only: Collection[str] | None = None) -> TensorSet:
    """A safetensors file, mapped: its own parser has checked that names are unique and that offsets lie in the file.

    only: the names that matter, of those in the file; None: all
    """
    size = found.st_size
    try:
        header, opened = _open(path, size)
        names = list(opened.offset_keys())
        check_names(name, names)
        names = names if only is None else [key for key in names if key in only]
        slices = {key: opened.get_slice(key) for key in names}
        kinds = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
        mapped = torch.UntypedStorage.from_file(str(path), False, size)
        if _version(os.stat(path)) != _version(found):
            raise ValueError("it was changed while it was opened")
    except (SafetensorError, struct.error, OSError, ValueError, OverflowError, RuntimeError) as error:
        raise unreadable(name, path, error) from error
    for key, (shape, dtype) in kinds.items():
        check_kind(name, key, shape, DTYPES.get(dtype), dtype)

    def take(key: str) -> Tensor:
        try:
            check_length(path, found)
            return opened.get_tensor(key)
        except (SafetensorError, OSError, ValueError) as error:
            raise unreadable(name, path, error) from error

    def flat() -> Tensor:
        try:
            check_length(path, found)
        except (OSError, ValueError) as error:
            raise unreadable(name, path, error) from error
        return torch.empty(0, dtype=dtype).set_(mapped, (8 + header) // dtype.itemsize, (count,))

    shapes = {key: shape for key, (shape, _) in kinds.items()}
    dtypes, count = {DTYPES.get(dtype) for _, dtype in kinds.values()}, sum(map(math.prod, shapes.values()))
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    # the parser allows no holes between tensors, so of one dtype their sizes say where each begins
    in_one_piece = dtype is not None and (8 + header) % dtype.itemsize == 0
    if in_one_piece and 8 + header + count * dtype.itemsize == size:
        return TensorSet(shapes, take, flat)
    return TensorSet(shapes, take)


def check_length(path: Path, found: os.stat_result) -> None:
    """ValueError: the mapped file has been cut; the pages that are gone can't be read."""
    now = os.stat(path)
    if now.st_ino == found.st_ino and now.st_size < found.st_size:
        raise ValueError("it has become shorter since it was opened")


def _version(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def open_state_dict(name: str, tensors: Mapping[str, Any]) -> TensorSet:
    """Tensors in memory, held to what those in files are held to."""
    check_names(name, tensors)
    for key, tensor in tensors.items():
        problem = _problem(tensor)
        if problem is not None:
            raise AdapterFormatError(
                f"adapter {name!r}: {key!r} is {problem}; expected a plain tensor with its numbers in memory."
            )
        check_kind(name, key, tuple(tensor.shape), tensor.dtype if tensor.dtype in DTYPES.values() else None, tensor)
    held = dict(tensors)
    return TensorSet({key: tuple(tensor.shape) for key, tensor in held.items()}, lambda key: held[key].detach())


def _problem(tensor: Any) -> str | None:
    """Why this is no tensor whose numbers can be taken as they are."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__module__}.{type(tensor).__name__}"
    if tensor.device.type == "meta":
        return "on the meta device, without numbers"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return f"of layout {tensor.layout}" if tensor.layout != torch.strided else "quantized or nested"
    if tensor.is_conj() or tensor.is_neg():
        return "a view that is still to be computed (call .resolve_conj().resolve_neg())"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"expanded: {tensor.numel():,} numbers in less memory (call .contiguous())"
    return None


def check_names(name: str, keys: Any) -> None:
    """AdapterFormatError: too many tensors, or a name that no tensor has"""
    if len(keys) > TENSORS_LIMIT:
        raise AdapterFormatError(f"adapter {name!r} has {len(keys):,} tensors; expected at most {TENSORS_LIMIT:,}.")
    for key in keys:
        if not isinstance(key, str) or len(key) > NAME_LIMIT:
            raise AdapterFormatError(
                f"adapter {name!r} has a tensor called {str(key)[:80]!r}...; expected a text of at most {NAME_LIMIT}"
                " characters."
            )


def check_kind(name: str, key: str, shape: tuple[int, ...], dtype: torch.dtype | None, got: Any) -> None:
    """AdapterFormatError: neither a weight that LoRA may have nor, in some formats, its alpha in one number

    dtype: None where it is none that weights have; got: what it is then
    """
    if key.endswith(".alpha") and math.prod(shape) == 1 and (dtype is not None or got in WHOLE):
        return
    if dtype is None:
        raise AdapterFormatError(
            f"adapter {name!r}: {key!r} is of dtype {getattr(got, 'dtype', got)}; expected float64, float32, float16 or"
            " bfloat16. Quantized adapters have to be dequantized first."
        )
    if len(shape) not in (1, 2, 4) or 0 in shape:
        raise AdapterFormatError(
            f"adapter {name!r}: {key!r} has shape {list(shape)[:8]}; expected a matrix (a bias: a vector, Conv2d:"
            " four dimensions) that is not empty. Load LoRA on other layers with PEFT and pass the PeftModel."
        )


def unreadable(name: str, path: Path, error: Exception) -> AdapterFormatError:
    if isinstance(error, AdapterFormatError):
        return error
    return AdapterFormatError(
        f"adapter {name!r}: the weights in {str(path)!r} can't be read ({str(error)[:500]}). The file is cut short or"
        " damaged: copy or download it again."
    )
