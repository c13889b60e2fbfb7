"""What the ops lower to, as a short text: compiled code of another state of this folder must not be taken from a cache.

torch keeps compiled graphs by what stands in them, and there the fused ops are only names.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path


@cache
def fingerprint() -> str:
    """Of all sources in this folder."""
    sources = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".py", ".cpp"))
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
