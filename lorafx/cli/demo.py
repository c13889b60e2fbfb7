"""``lorafx demo``: the demo of the repository, from wherever the script is called."""

from __future__ import annotations

import subprocess
import sys

from lorafx.cli.models import checkout
from lorafx.errors import LorafxError


def run(prompt: str | None) -> int:
    """``python -m demo`` in the checkout; returns its exit code. LorafxError: there is no checkout"""
    root = checkout()
    if root is None:
        raise LorafxError(
            "the demo is in lorafx's repository, not in the installed package: run `make demo` in a checkout"
        )
    return subprocess.call([sys.executable, "-m", "demo", *(["--prompt", prompt] if prompt else [])], cwd=root)
