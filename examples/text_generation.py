"""``pipeline("text-generation")`` on a compiled model: the pipeline knows nothing of it."""

from common import mode, save_adapters, tiny_llama, tiny_tokenizer
from peft import PeftModel
from transformers import pipeline

import lorafx

adapters, tokenizer = save_adapters(), tiny_tokenizer()
prompts = ["w5 w9 w17", "w40", "w7 w8"]
settings = {"max_new_tokens": 8, "do_sample": False, "batch_size": 3}

model = lorafx.compile(tiny_llama(), adapters, mode=mode())
generate = pipeline("text-generation", model=model, tokenizer=tokenizer)

for name, folder in adapters.items():
    model.lora.use(name)
    got = generate(prompts, **settings)
    peft_model = PeftModel.from_pretrained(tiny_llama(), folder).merge_and_unload()
    want = pipeline("text-generation", model=peft_model, tokenizer=tokenizer)(prompts, **settings)
    assert got == want
    print(f"{name}: {got[0][0]['generated_text']}")

# one adapter for each prompt, where all of them are one batch
got = generate(prompts, adapter_names=["json", None, "sql"], **settings)
assert got[0] == want[0]
print(f"json, base, sql in one batch: {[text[0]['generated_text'] for text in got]}")

lorafx.uncompile(model)
assert generate(prompts[1], **settings) == got[1]
print("uncompiled, the pipeline goes on, with the base model")
