"""Adapters that come and go at random while threads run forwards; every output is held against plain PEFT's for the
adapters that were there at one moment of that forward."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
from torch import Tensor, nn

import lorafx
from tests.integration.alive import tensor_bytes

ROOM, THREADS = 6, 4
NAMES = [f"n{i}" for i in range(9)]
MEGABYTE = 1 << 20
Call = Callable[..., Tensor]  # of a model, with a name for each row or without: its output, row by row


@dataclass(frozen=True)
class State:
    """What is loaded (name -> index of its content) and what is in use, between two changes."""

    loaded: dict[str, int]
    in_use: tuple[str | None, ...]


@dataclass
class History:
    """``states[k]``: after k changes. ``begun`` runs ahead of ``len(states)`` by the change under way."""

    states: list[State]
    begun: int = 0
    wrong: list[object] = field(default_factory=list)
    forwards: int = 0
    refused: int = 0
    stop: bool = False
    resting: bool = False
    busy: list[threading.Lock] = field(default_factory=lambda: [threading.Lock() for _ in range(THREADS)])

    @contextmanager
    def rest(self) -> Iterator[None]:
        """Every thread stands between two forwards. What lists all objects needs that: it would hold on to a tuple
        that another thread is making, of which CPython makes an error there."""
        self.resting = True
        with ExitStack() as stack:
            for lock in self.busy:
                stack.enter_context(lock)
            yield
            self.resting = False

    def span(self, start: int) -> list[State]:
        """Every state that a forward which began after ``start`` changes, and has just ended, may have seen."""
        return self.states[start : self.begun + 1]


class Judge:
    """Compares outputs with plain PEFT's, row by row.

    contents: adapters; of each ``expected``, plain PEFT's output; call: runs a model on the inputs of these
    """

    def __init__(self, contents: Sequence[Any], base: Tensor, call: Call) -> None:
        self.contents, self.base, self.call = contents, base, call

    def matches(self, got: Tensor, names: list[str | None], state: State) -> bool:
        for row, name in enumerate(names):
            if name is not None and name not in state.loaded:
                return False
            want = self.base[row] if name is None else self.contents[state.loaded[name]].expected[row]
            if float((got[row] - want).norm() / want.norm()) > 1e-5:
                return False
        return True


def work(model: nn.Module, history: History, judge: Judge, seed: int) -> None:
    """One thread: forwards with names of their own, or with what is in use."""
    rng = random.Random(seed)
    while not history.stop and not history.wrong:
        if history.resting:
            time.sleep(1e-3)
            continue
        with history.busy[seed]:
            try:
                forward(model, history, judge, rng)
            except BaseException as error:
                history.wrong.append(error)


def forward(model: nn.Module, history: History, judge: Judge, rng: random.Random) -> None:
    start, rows = len(history.states) - 1, len(judge.base)
    own = rng.random() < 0.7
    loaded = list(history.states[-1].loaded)
    one = rng.choice([*loaded, None])
    names = rng.choice([[one] * rows, [rng.choice([*loaded, None]) for _ in range(rows)]]) if own else None
    try:
        got = judge.call(model, names)
    except lorafx.AdapterMismatchError as error:
        wait_for_record(history)
        if not own or not any(set(names) - {None} - s.loaded.keys() for s in history.span(start)):
            history.wrong.append((error, names))
        history.refused += 1
        return
    wait_for_record(history)
    if not any(judge.matches(got, names if own else list(s.in_use), s) for s in history.span(start)):
        history.wrong.append(("no moment of this forward gives its output", names, history.span(start)))
    history.forwards += 1


def wait_for_record(history: History) -> None:
    """The end of a change may not be on record yet."""
    while len(history.states) <= history.begun and not history.stop:
        time.sleep(0)


def change(model: nn.Module, history: History, sources: Sequence[Any], bad: Any, rng: random.Random) -> None:
    """One change by the main thread, and now and then one that has to fail."""
    state = history.states[-1]
    free = [name for name in NAMES if name not in state.loaded]
    spare = [name for name in state.loaded if name not in state.in_use]
    content, loaded, in_use = rng.randrange(len(sources)), dict(state.loaded), state.in_use
    kind = rng.choice(["load", "load", "replace", "replace", "replace", "unload", "use", "bad"])
    if kind == "load" and len(loaded) < ROOM:
        name = rng.choice(free)
        loaded[name] = content
        action = lambda: model.lora.load(name, sources[content])  # noqa: E731
    elif kind == "unload" and spare:
        name = rng.choice(spare)
        del loaded[name]
        action = lambda: model.lora.unload(name)  # noqa: E731
    elif kind == "use" or not loaded:
        in_use = tuple(rng.choice([*loaded, None]) for _ in in_use)
        action = lambda: model.lora.use(list(in_use))  # noqa: E731
    elif kind == "bad":
        with pytest.raises(lorafx.LorafxError):
            (model.lora.replace if rng.random() < 0.5 else model.lora.load)(next(iter(loaded)), bad)
        return
    else:
        name = rng.choice(list(loaded))
        loaded[name] = content
        action = lambda: model.lora.replace(name, sources[content])  # noqa: E731
    history.begun += 1
    action()
    history.states.append(State(loaded, in_use))


def memory(model: nn.Module) -> list[tuple[int, int]]:
    """Where the bank's tensors are, and how large."""
    store = model.lora.store
    factors = [store.factors] if store.dora is not None else []
    tensors = (store.storage, store.owner, store.scale, store.windows, *factors)
    return [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]


def under_load(model: nn.Module, sources: Sequence[Any], judge: Judge, changes: int, bad: Any) -> History:
    """``changes`` changes while the threads run; the memory after a tenth of them is what it is at the end."""
    rows = len(judge.base)
    history = History([State({}, (None,) * rows)])
    model.lora.use([None] * rows)
    judge.call(model)
    threads = [threading.Thread(target=work, args=(model, history, judge, i), daemon=True) for i in range(THREADS)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    rng, process = random.Random(7), psutil.Process()
    places, graphs = memory(model), len(lorafx.explain(model).graphs)
    try:
        for thread in threads:
            thread.start()
        while history.begun < changes and not history.wrong:
            change(model, history, sources, bad, rng)
            time.sleep(rng.choice([0, 0, 0.005, 0.02]))  # or changes, which go before new forwards, leave none a chance
            if history.begun == changes // 10:
                with history.rest():
                    settled = tensor_bytes(), process.memory_info().rss
    finally:
        history.stop = True
        for thread in threads:
            thread.join(timeout=60)
        sys.setswitchinterval(interval)
    assert not history.wrong, history.wrong[0]
    assert not any(thread.is_alive() for thread in threads)
    assert memory(model) == places
    report = lorafx.explain(model)
    why = [graph.recompiled for graph in report.graphs]
    assert (len(report.graphs), report.recompiles, report.retraces) == (graphs, 0, []), why
    grown = [after - before for after, before in zip((tensor_bytes(), process.memory_info().rss), settled, strict=True)]
    assert grown[0] < MEGABYTE / 2, f"{grown[0]:,} bytes of tensors more than after a tenth of the changes"
    assert grown[1] < 32 * MEGABYTE, f"{grown[1]:,} bytes of memory more than after a tenth of the changes"
    assert history.forwards > changes / 4
    print(f"{changes} changes, {history.forwards} forwards, {history.refused} refused, memory {grown}")
    return history
