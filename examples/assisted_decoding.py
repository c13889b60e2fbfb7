"""Assisted decoding: the draft model plain, or compiled with an adapter of its own; and prompt lookup.

All of them give what greedy decoding with the adapter gives: a draft can only save time.
"""

import torch
from common import mode, save_adapters, tiny_llama
from peft import PeftModel

import lorafx

how = mode()
adapters = save_adapters()
ids = torch.tensor([[5, 9, 17, 5, 9]])
settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
want = PeftModel.from_pretrained(tiny_llama(), adapters["json"]).generate(input_ids=ids, **settings)

model = lorafx.compile(tiny_llama(), adapters, mode=how)
draft = lorafx.compile(tiny_llama(), adapters["sql"], mode=how)  # its only adapter is in use at once

WAYS = {
    "a plain draft": {"assistant_model": tiny_llama()},
    "a compiled draft": {"assistant_model": draft},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}
for name, way in WAYS.items():
    assert torch.equal(model.generate(ids, adapter_names=["json"], **settings, **way), want)
    with model.lora.using("json"):
        assert torch.equal(model.generate(ids, **settings, **way), want)
    print(f"{name}: {want[0, 5:].tolist()}, as PEFT's greedy decoding")
