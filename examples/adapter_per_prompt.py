"""A pipeline of prompts with an adapter each, whatever its ``batch_size``.

A pipeline passes the same arguments to every batch, so ``adapter_names=`` there fits a single batch only (another size
is refused by name). What belongs to one prompt has to travel with it, as its tokens do: ``preprocess`` is for that.
"""

from common import mode, save_adapters, tiny_llama, tiny_tokenizer
from peft import PeftModel
from transformers import TextGenerationPipeline, pipeline

import lorafx


class PerPrompt(TextGenerationPipeline):
    """Takes (prompt, adapter name or None) in place of a prompt."""

    def preprocess(self, item, **settings):
        prompt, name = item
        return {**super().preprocess(prompt, **settings), "adapter_names": name}

    def _forward(self, model_inputs, **settings):
        names = model_inputs.pop("adapter_names")  # a list where prompts were put into a batch
        names = names if isinstance(names, list) else [names]
        return super()._forward(model_inputs, adapter_names=names, **settings)


adapters, tokenizer = save_adapters(), tiny_tokenizer()
model = lorafx.compile(tiny_llama(), adapters, mode=mode())
generate = pipeline("text-generation", model=model, tokenizer=tokenizer, pipeline_class=PerPrompt)
items = [("w5 w9 w17", "sql"), ("w40", None), ("w7 w8", "json")]
settings = {"max_new_tokens": 8, "do_sample": False}

got = generate(items, batch_size=2, **settings)  # the last batch has one prompt
for (prompt, name), [text] in zip(items, got, strict=True):
    alone = PeftModel.from_pretrained(tiny_llama(), adapters[name]).merge_and_unload() if name else tiny_llama()
    assert pipeline("text-generation", model=alone, tokenizer=tokenizer)(prompt, **settings) == [text]
    print(f"{name or 'base'}: {text['generated_text']}")

plain = pipeline("text-generation", model=model, tokenizer=tokenizer)
try:
    plain([prompt for prompt, _ in items], batch_size=2, adapter_names=["sql", "json"], **settings)
except lorafx.AdapterMismatchError as error:
    print(f"refused: {error}")
else:
    raise AssertionError("the last batch has one prompt")
