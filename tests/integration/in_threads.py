"""Forwards that go on in other threads while a test changes something."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeating(action: Callable[[], object], threads: int) -> Iterator[None]:
    """``action``, over and over in each of ``threads`` threads until the block ends; what it raised is raised then."""
    failures: list[BaseException] = []
    stop = threading.Event()

    def work() -> None:
        try:
            while not stop.is_set():
                action()
        except BaseException as error:
            failures.append(error)

    running = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in running:
            thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in running)
    if failures:
        raise failures[0]
