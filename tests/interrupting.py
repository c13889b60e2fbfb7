"""Stops a piece of our code at a line of its own choosing, as Ctrl-C might."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = str(Path(__file__).resolve().parents[1])


def interrupt_at(line: int, folder: str, action: Callable[[], Any], spare: tuple[str, ...] = ("locking.py",)) -> bool:
    """Run ``action``; at the ``line``-th line executed in ``folder`` of this repository, raise KeyboardInterrupt there.

    spare: files that are never stopped. Returns False if ``action`` ended before.
    """
    inside, count = os.path.join(ROOT, folder) + os.sep, 0
    last: dict[int, int] = {}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        name = frame.f_code.co_filename
        if not name.startswith(inside) or os.path.basename(name) in spare:
            return None
        if event == "line":
            leaving = frame.f_lineno < last.get(id(frame), 0) and _is_with(name, frame.f_lineno)
            last[id(frame)] = frame.f_lineno
            count += not leaving  # a signal can't come before the call that releases a lock, and none is left locked
            if leaving:
                return trace
            if count == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def _is_with(name: str, line: int) -> bool:
    return linecache.getline(name, line).lstrip().startswith("with ")
