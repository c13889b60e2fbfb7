"""Run LoRA adapters, unmerged and swappable, on any PyTorch model: ``model = lorafx.compile(model, adapters)``."""

import os
from pathlib import Path

# In a checkout passes/ and kernels/ stand beside this folder, not in it: installed or not, Python finds them there.
_here = Path(__file__).parent
if not (_here / "passes").is_dir() and (_here.parent / "passes").is_dir():
    __path__.append(str(_here.parent))

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
