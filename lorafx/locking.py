"""Many forwards at once, or one change of the bank."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadWriteLock:
    """Readers share, a writer is alone; a waiting writer goes before new readers. Both may be nested in one thread.

    A thread that reads must not ask to write: it would wait for itself, so that raises RuntimeError.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers = 0
        self._waiting = 0
        self._writer: int | None = None  # thread id
        self._depth = 0  # of nested writes
        self._local = threading.local()

    @contextmanager
    def reading(self) -> Iterator[None]:
        nested = getattr(self._local, "reads", 0)
        me = threading.get_ident()
        if not nested and self._writer != me:
            with self._condition:
                if self._writer is not None or self._waiting:
                    self._condition.wait_for(lambda: self._writer is None and not self._waiting)
                self._readers += 1
        self._local.reads = nested + 1
        try:
            yield
        finally:
            self._local.reads = nested
            if not nested and self._writer != me:
                with self._condition:
                    self._readers -= 1
                    if self._waiting and not self._readers:
                        self._condition.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        me = threading.get_ident()
        if getattr(self._local, "reads", 0) and self._writer != me:
            raise RuntimeError("the bank can't be changed from inside a forward of the same thread")
        with self._condition:
            if self._writer != me:
                self._waiting += 1
                try:
                    self._condition.wait_for(lambda: self._writer is None and not self._readers)
                except BaseException:
                    self._condition.notify_all()  # readers that stand behind us need not any more
                    raise
                finally:
                    self._waiting -= 1
                self._writer = me
            self._depth += 1
        try:
            yield
        finally:
            with self._condition:
                self._depth -= 1
                if not self._depth:
                    self._writer = None
                    self._condition.notify_all()
