"""Adapters come and go at random while four threads run forwards; every output is plain PEFT's for the adapters that
were there at one moment of that forward.

A few hundred changes in CI; ten thousand with ``pytest -m slow tests/integration/test_swaps.py``.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from dataclasses import dataclass, field

import psutil
import pytest
import torch

import lorafx
from tests.integration.alive import tensor_bytes
from tests.integration.many_adapters import LAYERS, Made, Maker
from tests.integration.models import EAGER_GRAPH, LLAMA, run, tokens, with_peft

ROWS, ROOM, THREADS = 4, 6, 4
NAMES = [f"n{i}" for i in range(9)]
INPUTS = {"input_ids": tokens(ROWS)}
MEGABYTE = 1 << 20


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

    def span(self, start: int) -> list[State]:
        """Every state that a forward which began after ``start`` changes, and has just ended, may have seen."""
        return self.states[start : self.begun + 1]


class Judge:
    """Compares outputs with plain PEFT's, row by row."""

    def __init__(self, contents: list[Made], base: torch.Tensor) -> None:
        self.contents, self.base = contents, base

    def matches(self, got: torch.Tensor, names: list[str | None], state: State) -> bool:
        for row, name in enumerate(names):
            if name is not None and name not in state.loaded:
                return False
            want = self.base[row] if name is None else self.contents[state.loaded[name]].expected[row]
            if float((got[row] - want).norm() / want.norm()) > 1e-5:
                return False
        return True


def work(model, history: History, judge: Judge, seed: int) -> None:
    """One thread: forwards with names of their own, or with what is in use."""
    rng = random.Random(seed)
    while not history.stop and not history.wrong:
        start = len(history.states) - 1
        own = rng.random() < 0.7
        loaded = list(history.states[-1].loaded)
        one = rng.choice([*loaded, None])
        names = rng.choice([[one] * ROWS, [rng.choice([*loaded, None]) for _ in range(ROWS)]]) if own else None
        try:
            got = run(model, INPUTS, names)
        except lorafx.AdapterMismatchError as error:
            # the end of the change may not be on record yet: wait for it
            while len(history.states) <= history.begun and not history.stop:
                time.sleep(0)
            if not own or not any(set(names) - {None} - s.loaded.keys() for s in history.span(start)):
                history.wrong.append((error, names))
            history.refused += 1
            continue
        except BaseException as error:
            history.wrong.append(error)
            return
        while len(history.states) <= history.begun and not history.stop:
            time.sleep(0)
        if not any(judge.matches(got, names if own else list(s.in_use), s) for s in history.span(start)):
            history.wrong.append(("no moment of this forward gives its output", names, history.span(start)))
        history.forwards += 1


def change(model, history: History, sources: list, bad: object, rng: random.Random) -> None:
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
        in_use = tuple(rng.choice([*loaded, None]) for _ in range(ROWS))
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


def under_load(model, sources, judge: Judge, changes: int, bad: object) -> History:
    """``changes`` changes while the threads run; the memory after a tenth of them is what it is at the end."""
    history = History([State({}, (None,) * ROWS)])
    model.lora.use([None] * ROWS)
    run(model, INPUTS)
    threads = [threading.Thread(target=work, args=(model, history, judge, i), daemon=True) for i in range(THREADS)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    rng, process = random.Random(7), psutil.Process()
    address, size, graphs = model.lora.store.storage.data_ptr(), model.lora.nbytes, len(lorafx.explain(model).graphs)
    try:
        for thread in threads:
            thread.start()
        while history.begun < changes and not history.wrong:
            change(model, history, sources, bad, rng)
            time.sleep(rng.choice([0, 0, 0.005, 0.02]))  # or changes, which go before new forwards, leave none a chance
            if history.begun == changes // 10:
                settled = tensor_bytes(), process.memory_info().rss
    finally:
        history.stop = True
        for thread in threads:
            thread.join(timeout=60)
        sys.setswitchinterval(interval)
    assert not history.wrong, history.wrong[0]
    assert not any(thread.is_alive() for thread in threads)
    assert (model.lora.store.storage.data_ptr(), model.lora.nbytes) == (address, size)
    report = lorafx.explain(model)
    assert (len(report.graphs), report.recompiles, report.retraces) == (graphs, 0, [])
    grown = [after - before for after, before in zip((tensor_bytes(), process.memory_info().rss), settled, strict=True)]
    assert grown[0] < MEGABYTE / 2, f"{grown[0]:,} bytes of tensors more than after a tenth of the changes"
    assert grown[1] < 32 * MEGABYTE, f"{grown[1]:,} bytes of memory more than after a tenth of the changes"
    assert history.forwards > changes / 4
    print(f"{changes} changes, {history.forwards} forwards, {history.refused} refused, memory {grown}")
    return history


@pytest.fixture(scope="module")
def maker() -> Maker:
    return Maker(INPUTS, largest_rank=64, structures=24)


@pytest.fixture(scope="module")
def judge(maker) -> Judge:
    return Judge([maker.make(i) for i in range(72)], run(LLAMA.build(LAYERS), INPUTS))


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        (500, {"options": EAGER_GRAPH}),
        (500, {"mode": "eager"}),
        pytest.param(10_000, {}, marks=pytest.mark.slow),
    ],
    ids=["graph", "eager", "ten thousand"],
)
def test_changes_under_load(changes, how, judge, tmp_path):
    """Ranks 1 to 64, random layers; from memory, from a folder, and read before."""
    room = {"max_adapters": ROOM, "max_rank": 64, "target_modules": "all-linear"}
    model = lorafx.compile(LLAMA.build(LAYERS), None, **how, **room)
    sources: list[object] = []
    for i, one in enumerate(judge.contents):
        if i % 3 == 0:
            one.save(tmp_path / str(i))
            sources.append(str(tmp_path / str(i)))
        else:
            sources.append((one.state, one.config) if i % 3 == 1 else model.lora.read((one.state, one.config)))
    first = judge.contents[0]
    bad = ({key: value * float("nan") for key, value in first.state.items()}, first.config)
    under_load(model, sources, judge, changes, bad)


@pytest.mark.parametrize("changes", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_changes_of_a_peft_model_under_load(changes, judge, tmp_path):
    """The same through PEFT's layers, where each change also goes through PEFT's own methods."""
    for i, one in enumerate(judge.contents[:12]):
        one.save(tmp_path / str(i))
    whole = next(i for i, one in enumerate(judge.contents) if len(one.config.target_modules) == 7)
    judge.contents[whole].save(tmp_path / "whole")
    peft_model = with_peft(LLAMA.build(LAYERS), {"whole": str(tmp_path / "whole")})
    room = {"max_adapters": ROOM + 1, "max_rank": 64, "target_modules": "all-linear"}
    model = lorafx.compile(peft_model, options=EAGER_GRAPH, **room)
    sources = [str(tmp_path / str(i)) for i in range(12)]
    first = judge.contents[0]
    bad = ({key: value * float("nan") for key, value in first.state.items()}, first.config)
    under_load(model, sources, Judge(judge.contents[:12], judge.base), changes, bad)
