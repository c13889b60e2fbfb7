"""Run LoRA adapters, unmerged and swappable, on any PyTorch model: ``model = lorafx.compile(model, adapters)``."""

import os

from lorafx import checkout

checkout.find_parts()

from lorafx.adapter_store import AdapterStore
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
from lorafx.logs import switch_on
from lorafx.warmup import warmup

switch_on(os.environ.get("LORAFX_LOGS", ""))

__version__ = "0.1.0"

__all__ = [
    "AdapterBank",
    "AdapterFormatError",
    "AdapterMismatchError",
    "AdapterStore",
    "CapacityError",
    "LorafxError",
    "Report",
    "UnsupportedModelError",
    "compile",
    "explain",
    "fuse",
    "uncompile",
    "warmup",
]
