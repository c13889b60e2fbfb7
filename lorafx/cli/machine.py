"""What numbers were measured on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """The processor or GPU, the threads, and the versions."""
    facts: dict[str, Any] = {"machine": _processor(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        facts["machine"] = torch.cuda.get_device_name()
    for package in ("lorafx", "torch", "transformers", "peft"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts | {"python": platform.python_version()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
