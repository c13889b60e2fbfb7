"""What the bank says it holds is what the process holds, and that is the adapters' own bytes and 1 % at most."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

import lorafx
from tests.integration.alive import tensor_bytes

QV, ALL = ["q_proj", "v_proj"], "all-linear"
ADAPTERS = {"a": (8, ALL), "b": (16, QV), "c": (32, ALL), "d": (64, QV), "e": (16, ALL), "f": (8, QV)}


def config(rank, targets):
    return LoraConfig(r=rank, lora_alpha=16, target_modules=targets, init_lora_weights=False)


def build(hidden: int = 128, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()


@pytest.fixture(scope="module")
def sources():
    made = {}
    for name, (rank, targets) in ADAPTERS.items():
        model = get_peft_model(build(), config(rank, targets))
        made[name] = get_peft_model_state_dict(model), model.peft_config["default"]
    return made


def true_bytes(sources) -> int:
    return sum(t.numel() * t.element_size() for state, _ in sources.values() for t in state.values())


@pytest.mark.parametrize("which", ["plain", "peft"])
def test_nbytes_is_what_is_alive(which, sources):
    torch._dynamo.reset()  # what other tests left there goes when it likes
    base, inputs = build(), {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    before = tensor_bytes()
    if which == "plain":
        model = lorafx.compile(base, sources, mode="eager")
    else:
        peft_model = get_peft_model(base, sources["a"][1], adapter_name="a")
        for name in list(ADAPTERS)[1:]:
            peft_model.add_adapter(name, sources[name][1])
        model = lorafx.compile(peft_model.eval(), mode="eager")
    lora = model.lora
    grown = tensor_bytes() - before
    assert lora.names == list(ADAPTERS)
    assert true_bytes(sources) <= lora.nbytes - lora.reserved <= 1.01 * true_bytes(sources)
    assert lora.reserved == 0
    assert lora.nbytes <= grown <= lora.nbytes + 4096  # no second copy anywhere
    with torch.no_grad():
        model(**inputs, adapter_names=["a", "b"])
    for name in ("b", "d"):  # nor after changes
        lora.replace(name, sources["f"])
    lora.unload("c")
    with torch.no_grad():
        model(**inputs, adapter_names=["d", "e"])
    assert tensor_bytes() - before <= lora.nbytes + 4 * 8192 + 4096  # 8 KiB for each routing that is kept
    names = [name for name in ADAPTERS if name != "c"]
    kept = {name: sources["f" if name in ("b", "d") else name] for name in names}
    assert lora.nbytes - lora.reserved <= 1.01 * true_bytes(kept)


def test_room_that_is_reserved_is_shown_apart(sources):
    model = lorafx.compile(build(), {"a": sources["a"]}, max_adapters=4, max_rank=64, mode="eager")
    lora = model.lora
    one = true_bytes({"a": sources["a"]})
    assert one <= lora.nbytes - lora.reserved <= 1.01 * one
    assert lora.reserved > 3 * 64 / 8 * one * 0.99
    assert f"{lora.reserved:,}" in repr(lora)
    size = lora.nbytes
    for name in ("c", "d", "e"):
        lora.load(name, sources[name])
    assert lora.nbytes == size
    held = true_bytes({name: sources[name] for name in ("a", "c", "d", "e")})
    assert held <= lora.nbytes - lora.reserved <= 1.01 * held


PROCESS = """
    import ctypes, gc, json, sys, psutil, torch
    sys.path.insert(0, {root!r})
    torch.set_num_threads(1)
    import lorafx
    from tests.integration.test_memory import *

    def rss():
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return psutil.Process().memory_info().rss

    def draft(model, name, first):
        if first:
            return get_peft_model(model, config(*ADAPTERS[name]), adapter_name=name)
        model.add_adapter(name, config(*ADAPTERS[name]))
        return model

    warm = lorafx.compile(draft(build(), "a", True), mode="eager")  # what is imported and set up once
    ids = torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        warm(ids)
    del warm
    base = build(hidden=1024, layers=8)
    with torch.no_grad():
        base(ids)
    start = rss()
    model = None
    for i, name in enumerate(ADAPTERS):
        model = draft(base if i == 0 else model, name, i == 0)
    with torch.no_grad():
        model.eval()(ids)
    peft = rss() - start
    model = lorafx.compile(model, mode="eager")
    with torch.no_grad():
        model(ids)
    print(json.dumps([peft, rss() - start, model.lora.nbytes]))
"""


def test_the_process_agrees():
    """45 MB of adapters on a PeftModel: packed, they take no more than they did, since PEFT's own copies are gone."""
    root = __file__.rsplit("/tests/", 1)[0]
    script = textwrap.dedent(PROCESS).format(root=root)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    peft, packed, nbytes = json.loads(result.stdout.splitlines()[-1])
    assert nbytes > 40e6
    assert abs(packed - peft) < 0.1 * nbytes, (peft, packed, nbytes)  # a second copy would be all of it
