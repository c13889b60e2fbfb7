"""Host memory for adapters: each read once, the oldest out first, and no thread pays for another's interrupt."""

from __future__ import annotations

import threading

import pytest
import torch

from lorafx.adapters import AdapterWeights, SiteWeights
from lorafx.host_cache import HostCache


def adapter(name: str, rank: int = 1) -> AdapterWeights:
    return AdapterWeights(name, {"l.q": SiteWeights(torch.ones(rank, 8), torch.ones(8, rank), None, 1.0)})


def test_the_least_recently_used_leave_first() -> None:
    read: list[str] = []
    cache = HostCache(2 * adapter("x").nbytes, lambda name: read.append(name) or adapter(name))
    for name in ("a", "b", "a", "c", "a", "b"):
        assert cache.get(name).name == name
    assert read == ["a", "b", "c", "b"]
    assert cache.nbytes <= cache.limit
    assert "c" not in cache
    cache.forget("a")
    cache.get("a")
    assert read[-1] == "a"


def test_what_is_larger_than_all_of_it_is_not_kept() -> None:
    cache = HostCache(adapter("x").nbytes, lambda name: adapter(name, rank=2 if name == "large" else 1))
    cache.get("small")
    assert cache.get("large").name == "large"
    assert "small" in cache
    assert "large" not in cache


@pytest.mark.parametrize("stop", [None, KeyboardInterrupt, ValueError])
def test_threads_that_wait_for_one_reading(stop: type[BaseException] | None) -> None:
    """It is read once; an error is theirs too, but an interrupt is the reading thread's alone."""
    begun, go_on = threading.Event(), threading.Event()
    read: list[str] = []
    got: dict[int, object] = {}

    def read_slowly(name: str) -> AdapterWeights:
        read.append(name)
        if len(read) == 1:
            begun.set()
            go_on.wait(10)
            if stop is not None:
                raise stop
        return adapter(name)

    cache = HostCache(1 << 20, read_slowly)

    def get(i: int) -> None:
        try:
            got[i] = cache.get("a").name
        except BaseException as error:
            got[i] = type(error)

    threads = [threading.Thread(target=get, args=(i,)) for i in range(3)]
    threads[0].start()
    assert begun.wait(10)
    waiting = cache._under_way["a"]
    for thread in threads[1:]:
        thread.start()
    while len(waiting._condition._waiters) < 2:  # both wait for the first by now
        pass
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert got[0] == (stop or "a")
    assert {got[1], got[2]} == {ValueError if stop is ValueError else "a"}
    assert len(read) == (2 if stop is KeyboardInterrupt else 1)
