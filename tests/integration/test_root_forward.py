"""``model.forward(...)`` is the compiled call too: sentence-transformers and others call it so."""

from __future__ import annotations

import inspect

import pytest
import torch

import lorafx

from .models import EAGER_GRAPH, LLAMA, assert_close, compiled_llama, main_output, run, save_adapters, with_peft

INPUTS = LLAMA.inputs(2)
NAMES = ["b", "__base__"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    configs = {"a": {"target_modules": ["q_proj"]}, "b": {"r": 7, "target_modules": "all-linear"}}
    return save_adapters(LLAMA, tmp_path_factory.mktemp("adapters"), 1, **configs)


@pytest.fixture(scope="module")
def reference(folders):
    return with_peft(LLAMA.build(1), folders)


@torch.no_grad()
def forward(model, **arguments):
    return main_output(model.forward(**INPUTS, **arguments))


def test_is_compiled_and_takes_names(folders, reference):
    model = compiled_llama(folders, 1)
    assert_close(forward(model, adapter_names=NAMES), run(reference, INPUTS, NAMES))
    assert len(lorafx.explain(model).graphs) == 1
    model.lora.use("a")
    reference.set_adapter("a")
    assert torch.equal(forward(model), run(model, INPUTS))
    assert_close(forward(model), run(reference, INPUTS))
    assert len(lorafx.explain(model).graphs) == 1
    assert inspect.signature(model.forward) == inspect.signature(LLAMA.build(1).forward)
    with pytest.raises(lorafx.AdapterMismatchError, match="3 adapter_names for a batch of 2"):
        forward(model, adapter_names=["a"] * 3)


def test_of_peft_models_base(folders, reference):
    model = lorafx.compile(with_peft(LLAMA.build(1), folders), options=EAGER_GRAPH)
    model.set_adapter("b")
    reference.set_adapter("b")
    assert_close(forward(model.get_base_model()), run(reference, INPUTS))
    assert len(lorafx.explain(model).graphs) == 1


@pytest.mark.parametrize("wrapped", [False, True])
def test_uncompiled_it_is_the_models_own(wrapped, folders):
    """Also where others, as accelerate does, keep what ``forward`` was."""
    model = compiled_llama(folders, 1, mode="eager", options=None)
    kept = model.forward
    if wrapped:
        model.forward = lambda **kwargs: kept(**kwargs)
    assert_close(
        forward(model, adapter_names=NAMES) if not wrapped else run(model, INPUTS, NAMES), run(model, INPUTS, NAMES)
    )
    lorafx.uncompile(model)
    assert ("forward" in vars(model)) is wrapped
    assert torch.equal(forward(model), run(LLAMA.build(1), INPUTS))
    assert torch.equal(main_output(kept(**INPUTS)), run(LLAMA.build(1), INPUTS))


def test_hooks_that_others_put_on_the_model_run(tmp_path):
    """With none the compiled call goes straight to the class's forward; with one it may not."""
    model = lorafx.compile(LLAMA.build(), max_adapters=1, target_modules=["q_proj"], options=EAGER_GRAPH)
    inputs = LLAMA.inputs(2)
    plain = run(model, inputs)
    doubled = model.register_forward_hook(lambda module, args, out: out.__class__(logits=out.logits * 2))
    assert torch.equal(run(model, inputs), plain * 2)
    doubled.remove()
    assert torch.equal(run(model, inputs), plain)
    other = {"input_ids": inputs["input_ids"].flip(1)}
    swapped = model.register_forward_pre_hook(lambda module, args, kwargs: (args, other), with_kwargs=True)
    flipped = run(model, inputs)
    swapped.remove()
    assert torch.equal(flipped, run(model, other))
    assert not torch.equal(flipped, plain)
