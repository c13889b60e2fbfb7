"""What is made inside ``torch.inference_mode()`` serves calls outside it, and the other way round."""

from __future__ import annotations

import torch

import lorafx
from tests.integration.models import EAGER_GRAPH, LLAMA, assert_close, run, save_adapters, with_peft

INPUTS = LLAMA.inputs(2)


def test_compiled_and_loaded_in_one_mode_and_used_in_the_other(tmp_path):
    folders = save_adapters(LLAMA, tmp_path, a={"target_modules": ["q_proj"]}, b={"r": 9, "target_modules": ["v_proj"]})
    reference = with_peft(LLAMA.build(), folders)
    with torch.inference_mode():
        model = lorafx.compile(LLAMA.build(), {"a": folders["a"]}, options=EAGER_GRAPH)
        model(**INPUTS)
    model.lora.load("b", folders["b"])  # grows the bank
    with torch.inference_mode():
        model.lora.replace("a", folders["a"])
        model.lora.use(["a", "b"])
        inside = model(**INPUTS).logits.clone()
    names = ["a", "b"]
    assert_close(inside, run(reference, INPUTS, adapter_names=names))
    assert_close(run(model, INPUTS), run(reference, INPUTS, adapter_names=names))


def test_a_routing_made_in_inference_mode_is_no_hindrance_to_a_backward(tmp_path):
    folders = save_adapters(LLAMA, tmp_path, a={"target_modules": ["q_proj"]})
    model = lorafx.compile(LLAMA.build(), folders, options=EAGER_GRAPH)
    with torch.inference_mode():
        model(**INPUTS)
    model(**INPUTS).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
