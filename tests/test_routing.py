"""Selections, routings and the lock."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import torch

from lorafx.errors import AdapterMismatchError, CapacityError
from lorafx.locking import ReadWriteLock
from lorafx.routing import MAX_PAIRS, MAX_ROWS, make_routing
from lorafx.selection import names_in, normalize


def test_every_way_to_choose() -> None:
    assert normalize("a") == ((("a", 1.0),),)
    assert normalize(None) == normalize("__base__") == ((),)
    assert normalize({"a": 0.7, "b": 1}) == ((("a", 0.7), ("b", 1.0)),)
    assert normalize(["a", None, "__base__", {"b": 2}]) == ((("a", 1.0),), (), (), (("b", 2.0),))
    assert names_in(normalize(["a", None, {"b": 2}])) == {"a", "b"}


@pytest.mark.parametrize("choice", [[], 3, [1], [["a"]], {"a": "b"}])
def test_other_choices_are_refused(choice: object) -> None:
    with pytest.raises(AdapterMismatchError, match="got"):
        normalize(choice)


def test_routing_is_what_was_said() -> None:
    routing = make_routing([((2, 1.0),), (), ((0, 0.5), (1, -1.0))], torch.device("cpu"))
    assert routing.slots.shape == routing.weights.shape == (MAX_ROWS, MAX_PAIRS)
    assert routing.slots[:3].tolist() == [[2, -1, -1, -1], [-1] * 4, [0, 1, -1, -1]]
    assert routing.weights[2].tolist() == [0.5, -1.0, 0, 0]
    assert int(routing.count) == 3
    assert not routing.idle
    assert make_routing([(), ()], torch.device("cpu")).idle


def test_too_much_for_a_routing_is_refused_by_name() -> None:
    with pytest.raises(CapacityError, match="rows"):
        make_routing([()] * (MAX_ROWS + 1), torch.device("cpu"))
    with pytest.raises(CapacityError, match="one row"):
        make_routing([tuple((slot, 1.0) for slot in range(MAX_PAIRS + 1))], torch.device("cpu"))


def test_a_writer_is_alone() -> None:
    lock, inside, seen = ReadWriteLock(), [0], []

    def read() -> None:
        for _ in range(200):
            with lock.reading(), lock.reading():
                seen.append(inside[0])

    def write() -> None:
        for _ in range(50):
            with lock.writing(), lock.writing():
                inside[0] += 1
                time.sleep(0.0005)
                inside[0] -= 1

    threads = [threading.Thread(target=target) for target in (read, read, write, read, write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert len(seen) == 600
    assert set(seen) == {0}


def test_a_reader_that_wants_to_write_is_told() -> None:
    lock = ReadWriteLock()
    with lock.reading(), pytest.raises(RuntimeError, match="inside a forward"), lock.writing():
        pass
    with lock.writing():
        pass


def test_a_writer_that_gives_up_holds_nobody_back() -> None:
    """Ctrl-C while it waits for a forward: the readers that stand behind it go on, as soon as it is gone."""
    lock, begun, ended, inside = ReadWriteLock(), threading.Event(), threading.Event(), threading.Event()

    def read() -> None:
        with lock.reading():
            begun.set()
            ended.wait(timeout=60)

    def read_behind() -> None:
        while not lock._waiting:
            time.sleep(0.001)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with lock.reading():
            inside.set()

    def give_up(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, give_up)
    threads = [threading.Thread(target=target, daemon=True) for target in (read, read_behind)]
    try:
        threads[0].start()
        assert begun.wait(timeout=60)
        threads[1].start()
        with pytest.raises(KeyboardInterrupt), lock.writing():
            pass
        assert inside.wait(timeout=10)
    finally:
        signal.signal(signal.SIGALRM, before)
        ended.set()
        for thread in threads:
            thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
