"""A change of the bank on a GPU: the lock orders launches only, so the streams have to be waited for too."""

from __future__ import annotations

import pytest
import torch

import lorafx
from lorafx import bank
from tests.integration.models import LLAMA, save_adapters


@pytest.mark.parametrize(("device", "waits"), [("cpu", 0), ("meta", 0), ("cuda", 1), ("xpu", 1)])
def test_only_a_gpu_is_waited_for(device, waits, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.accelerator, "synchronize", seen.append)
    bank._finish_launched(torch.device(device))
    assert len(seen) == waits


QUERIES = {"target_modules": ["q_proj"]}
CHANGES = {  # verb, names; "two" has the layout of "one", "three" has not
    "load": ("load", "new", "two"),
    "other numbers": ("replace", "one", "two"),
    "another layout": ("replace", "one", "three"),
    "unload": ("unload", "one"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_before_and_after_what_is_written(change, tmp_path, monkeypatch):
    folders = save_adapters(LLAMA, tmp_path, one=QUERIES, two=QUERIES, three={"r": 2, **QUERIES})
    model = lorafx.compile(LLAMA.build(), {"one": folders["one"]}, mode="eager", max_adapters=2)
    model.lora.use(None)  # what is in use can't be unloaded
    order, store = [], type(model.lora.store)
    monkeypatch.setattr(bank, "_finish_launched", lambda device: order.append("wait"))
    for name in ("put", "clear", "rewrite"):
        write = getattr(store, name)
        monkeypatch.setattr(store, name, lambda *args, write=write: (order.append("write"), write(*args))[1])
    verb, name, *source = CHANGES[change]
    getattr(model.lora, verb)(name, *map(folders.get, source))
    assert order == ["wait", "write", "wait"]
