"""bitsandbytes' 4-bit layers pack their weights for CPUs with bf16 products as they are called: before any graph, once.

On other CPUs nothing packs, and these tests hold of themselves.
"""

from __future__ import annotations

import signal
import threading
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lorafx

from .in_threads import repeating
from .models import EAGER_GRAPH, difference
from .quantised_models import SIZES, build, need

X = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(4))


def packed(model):
    layers = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    return [getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers]


def trainable(kind="nf4"):
    torch.manual_seed(2)
    return get_peft_model(build(kind), LoraConfig(r=4, target_modules=list(SIZES), init_lora_weights=False))


@torch.no_grad()
def call(model):
    return model(X)


@pytest.mark.parametrize("before", ["training", "a call with gradients", "saving"])
def test_packed_before_a_graph_whatever_came_before(before):
    """Inductor can't compile what packs, and once it had failed, it failed at each call."""
    model, reference = trainable().eval(), trainable().eval()
    want = call(reference)
    lorafx.compile(model)
    if before == "training":
        model.train()
        model(X).sum().backward()
        model.eval()
    elif before == "a call with gradients":
        model(X.clone().requires_grad_(True)).sum().backward()  # layers whose input needs a gradient don't pack
    else:
        call(model)
        for each in (model, reference):
            each.state_dict()  # unpacks them, and rounds their scales
        want = call(reference)
    assert not any(packed(model))
    assert difference(call(model), want) <= 1e-5
    assert packed(model) == packed(reference)
    assert {len(group.branches) for group in lorafx.explain(model).groups} == {len(SIZES)}


def test_a_call_with_gradients_packs_what_bitsandbytes_packs():
    """And runs uncompiled till then: packed layers hand no gradient on, so lorafx packs none in its stead."""
    model, reference = trainable().eval(), trainable().eval()
    lorafx.compile(model, options=EAGER_GRAPH)
    for x in (X.clone().requires_grad_(True), X):
        got, want = model(x), reference(x)
        assert packed(model) == packed(reference)
        assert difference(got.detach(), want.detach()) <= 1e-5
        for each in (got, want):
            each.square().sum().backward()
    for (name, mine), (_, theirs) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        if mine.requires_grad:
            assert difference(mine.grad, theirs.grad) <= 1e-5, name


@pytest.mark.parametrize("how", [{"mode": "eager"}, {"options": EAGER_GRAPH}], ids=["eager", "graph"])
def test_threads_that_come_first_together(how, monkeypatch):
    """Packing changes a layer in place: a second thread must neither pack it too nor run it meanwhile."""
    need("bitsandbytes")
    import bitsandbytes.nn.modules as theirs

    inside, most, count = [], [], []
    pack = theirs._convert_weight_packed_for_cpu

    def slowly(*args):
        inside.append(1)
        most.append(len(inside))
        count.append(1)
        done = pack(*args)  # which says already that the layer is packed; its weight follows
        time.sleep(0.1)
        inside.pop()
        return done

    model = trainable().eval()
    lorafx.compile(model, **how)
    want = call(trainable().eval())
    monkeypatch.setattr(theirs, "_convert_weight_packed_for_cpu", slowly)
    with repeating(lambda: check(call(model), want), 3):
        time.sleep(1)
    assert set(most) <= {1}
    assert len(count) in (0, len(SIZES))


def test_a_thread_that_comes_while_the_last_layer_is_packed(monkeypatch):
    """It says already that it is packed, and its weight is still as it was."""
    need("bitsandbytes")
    import bitsandbytes.nn.modules as theirs

    model, pack, late, got = trainable().eval(), theirs._convert_weight_packed_for_cpu, [], []
    lorafx.compile(model, mode="eager")
    want = call(trainable().eval())

    def and_then_another_comes(*args):
        done = pack(*args)
        late.append(None)
        if len(late) == len(SIZES):
            late[-1] = threading.Thread(target=lambda: got.append(call(model)))
            late[-1].start()
            late[-1].join(timeout=0.5)
        return done

    monkeypatch.setattr(theirs, "_convert_weight_packed_for_cpu", and_then_another_comes)
    got.append(call(model))
    for thread in late[-1:]:
        thread.join()
        assert len(got) == 2
    for each in got:
        check(each, want)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_waits_for_the_end_of_a_layer(monkeypatch):
    need("bitsandbytes")
    import bitsandbytes.nn.modules as theirs

    model, pack = trainable().eval(), theirs._convert_weight_packed_for_cpu
    lorafx.compile(model, mode="eager")
    want = call(trainable().eval())

    def interrupted(*args):
        done = pack(*args)
        signal.raise_signal(signal.SIGINT)
        return done

    if any(packed_by_a_call()):
        monkeypatch.setattr(theirs, "_convert_weight_packed_for_cpu", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call(model)
        monkeypatch.undo()
        assert packed(model) == [True, False, False]
    check(call(model), want)


def packed_by_a_call():
    model = build("nf4")
    call(model)
    return packed(model)


def check(got, want):
    assert difference(got, want) <= 1e-5


def test_dtypes_that_a_layer_takes_from_its_first_input():
    """A layer made by hand without compute_dtype computes in its first input's dtype, not in that of what packed it."""
    model = build("nf4")
    for layer in model.attn.children():
        layer.compute_dtype, layer.compute_type_is_set = None, False
    reference, x = build("nf4"), X.bfloat16()
    for layer in reference.attn.children():
        layer.compute_dtype, layer.compute_type_is_set = None, False
    lorafx.compile(model, mode="eager", target_modules=list(SIZES), max_adapters=1)
    with torch.no_grad():
        assert torch.equal(model(x), reference(x))
    assert {layer.compute_dtype for layer in model.attn.children()} == {torch.bfloat16}
