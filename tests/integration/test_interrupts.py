"""Ctrl-C at every line that a change of the bank runs: afterwards everything is as before, or the change is whole.

In CI at every 13th line; at each one with ``-m slow``.
"""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
import time
from functools import partial

import numpy
import pytest
import torch

import lorafx
from lorafx.interrupts import uninterrupted
from tests.integration.many_adapters import LAYERS, Maker
from tests.integration.models import EAGER_GRAPH, LLAMA, assert_close, run, tokens
from tests.interrupting import interrupt_at

INPUTS = {"input_ids": tokens(2)}


@pytest.fixture(scope="module")
def made():
    maker = Maker(INPUTS, largest_rank=8, structures=6)
    return [maker.make(i) for i in range(7)]  # the last is of the first one's structure


def snapshot(model) -> dict:
    """Everything that a change may touch."""
    bank = model.lora
    store = bank.store
    return {
        "names": dict(bank._slots),
        "in use": (bank._chosen, bank.in_use),
        "tensors": [t.clone() for t in (store.storage, store.owner, store.scale, store.windows)],
        "tables": [t.copy() for t in (store._owner, store._scale, store._windows)],
        "taken": [dict(held) for held in store.taken],
        "which": (id(store), bank.key),
        "hooks": [(path, hook.site) for path, m in model.named_modules() for hook in m._forward_hooks.values()],
        "retraces": list(lorafx.explain(model).retraces),
        "output": run(model, INPUTS),
    }


def same(one: dict, other: dict) -> bool:
    tensors = all(torch.equal(a, b) for a, b in zip(one["tensors"], other["tensors"], strict=True))
    tables = all(numpy.array_equal(a, b) for a, b in zip(one["tables"], other["tables"], strict=True))
    rest = ("names", "in use", "taken", "which", "hooks", "retraces")
    return tensors and tables and torch.equal(one["output"], other["output"]) and all(one[k] == other[k] for k in rest)


EVERY = [13, pytest.param(1, marks=pytest.mark.slow)]


@pytest.mark.parametrize("step", EVERY)
@pytest.mark.parametrize("name", ["load", "replace", "rewrite", "rescale", "unload", "use", "grow"])
def test_every_line_of_a_change(name, step, made):
    reader = lorafx.compile(LLAMA.build(LAYERS), mode="eager").lora
    sources = [reader.read((one.state, one.config)) for one in made]  # what reading stops at changes nothing anyway
    rescaled = reader.read((made[6].state, {**made[6].config.to_dict(), "lora_alpha": 3}))
    room = {} if name == "grow" else {"max_adapters": 3, "max_rank": 8, "target_modules": "all-linear"}

    def fresh():
        model = lorafx.compile(
            LLAMA.build(LAYERS),
            {"a": sources[0], "b": sources[1]},
            mode="eager" if name != "grow" else None,
            options=EAGER_GRAPH,
            **room,
        )
        model.lora.use("a")
        run(model, INPUTS)
        return model

    def change(model) -> None:
        {
            "load": lambda: model.lora.load("c", sources[2]),
            "grow": lambda: model.lora.load("c", sources[2]),
            "replace": lambda: model.lora.replace("a", sources[2]),
            "rewrite": lambda: model.lora.replace("a", sources[6]),
            "rescale": lambda: model.lora.replace("a", rescaled),
            "unload": lambda: model.lora.unload("b"),
            "use": lambda: model.lora.use(["b", None]),
        }[name]()

    goal = fresh()
    change(goal)
    expected = snapshot(goal)
    model = fresh()
    before, whole = snapshot(model), 0
    for line in itertools.count(1, step):
        if not interrupt_at(line, "lorafx", partial(change, model)):
            break
        after = snapshot(model)
        if not same(before, after):
            done = {**after, "which": expected["which"]}
            assert same(done, expected), f"neither the old state nor the new one after line {line}"
            whole += 1
            model = fresh()
            before = snapshot(model)
    assert line > 10 * step or name == "use"
    assert whole * step < line / 3  # the change is whole only from its last lines on
    assert same({**snapshot(model), "which": expected["which"]}, expected)  # and a clean one still works


@pytest.mark.parametrize("step", EVERY)
def test_every_line_of_an_exchange(step, made, tmp_path):
    """Two adapters for two others in a store with room for two."""
    for i, one in enumerate(made):
        one.save(tmp_path / f"a{i}")
    store = lorafx.AdapterStore(tmp_path)
    model = lorafx.compile(LLAMA.build(LAYERS), store, max_adapters=2, mode="eager")
    outputs = {f"a{i}": one.expected for i, one in enumerate(made)}
    run(model, INPUTS, ["a0", "a1"])
    store.prefetch(outputs, wait=True)
    for line in itertools.count(1, step):
        stopped = interrupt_at(line, "lorafx", lambda: run(model, INPUTS, ["a2", "a3"]), ("locking.py", "sites.py"))
        if store._pinned:  # stopped in its last lines, and a traceback holds on to the call
            gc.collect()
        assert not store._pinned
        assert sorted(store.resident) == sorted(model.lora.names)
        assert sorted(model.lora.names) in (["a0", "a1"], ["a2", "a3"])
        here = model.lora.names
        assert_close(run(model, INPUTS, here), torch.stack([outputs[name][i] for i, name in enumerate(here)]))
        if not stopped:
            break
        run(model, INPUTS, ["a0", "a1"])
    assert line > 100


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_waits_for_the_end_of_a_change():
    """A real SIGINT, in the middle of a block that must not be left half-way."""
    done = []

    def block() -> None:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            done.append("whole")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == ["whole"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(ZeroDivisionError), uninterrupted():
        raise ZeroDivisionError
    thread = threading.Thread(target=lambda: uninterrupted().__enter__())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
