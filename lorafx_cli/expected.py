"""Which errors a user can mend, so that their text alone says enough."""

from __future__ import annotations

import sys


def is_expected(error: Exception) -> bool:
    """One of lorafx's own, or of the file system: no bug of the program."""
    errors = sys.modules.get("lorafx.errors")
    return isinstance(error, OSError) or (errors is not None and isinstance(error, errors.LorafxError))
