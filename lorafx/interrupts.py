"""Ctrl-C comes before or after a change of the bank, never in the middle."""

from __future__ import annotations

import inspect
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# what Python's own wrappers call: they look every handler up in an enum, which fails slowly for a function
_handler, _handle = inspect.unwrap(signal.getsignal), inspect.unwrap(signal.signal)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """What SIGINT does (KeyboardInterrupt, as a rule) happens at the end of the block. For blocks of milliseconds.

    Python runs signal handlers in the main thread only, so elsewhere nothing has to be done.
    """
    handler = _handler(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(handler):  # ignored, left to the system, or not Python's
        yield
        return
    arrived: list[tuple[Any, ...]] = []
    _handle(signal.SIGINT, lambda *details: arrived.append(details))
    try:
        yield
    finally:
        _handle(signal.SIGINT, handler)
        if arrived:
            handler(*arrived[0])
