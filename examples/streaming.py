"""``generate`` with a streamer, in a thread, each request with an adapter of its own."""

from threading import Thread

import torch
from common import mode, save_adapters, tiny_llama, tiny_tokenizer
from peft import PeftModel
from transformers import TextIteratorStreamer, TextStreamer

import lorafx

adapters, tokenizer = save_adapters(), tiny_tokenizer()
model = lorafx.compile(tiny_llama(), adapters, mode=mode())
inputs = tokenizer("w5 w9 w17", return_tensors="pt", return_token_type_ids=False)
settings = {**inputs, "max_new_tokens": 8, "do_sample": False}

for name, folder in adapters.items():
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    arguments = {**settings, "streamer": streamer, "adapter_names": [name]}
    thread = Thread(target=model.generate, kwargs=arguments)
    thread.start()
    pieces = list(streamer)
    thread.join()
    want = PeftModel.from_pretrained(tiny_llama(), folder).generate(**settings)[0, inputs["input_ids"].shape[1] :]
    assert "".join(pieces) == tokenizer.decode(want, skip_special_tokens=True)
    print(f"{name}, in {len(pieces)} pieces: {''.join(pieces)}")

assert model.lora.in_use == ((),)  # names of one call are gone with it
print("base: ", end="")
got = model.generate(**settings, streamer=TextStreamer(tokenizer, skip_prompt=True))
assert torch.equal(got, tiny_llama().generate(**settings))
