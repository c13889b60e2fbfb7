"""Run LoRA adapters, unmerged and swappable, on any PyTorch model: ``model = lorafx.compile(model, adapters)``."""

from lorafx.bank import AdapterBank
from lorafx.compile import compile, uncompile
from lorafx.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    CapacityError,
    LorafxError,
    UnsupportedModelError,
)
from lorafx.explain import Report, explain
from lorafx.fuse import fuse

__version__ = "0.1.0"

__all__ = [
    "AdapterBank",
    "AdapterFormatError",
    "AdapterMismatchError",
    "CapacityError",
    "LorafxError",
    "Report",
    "UnsupportedModelError",
    "compile",
    "explain",
    "fuse",
    "uncompile",
]
