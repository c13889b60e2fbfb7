"""``generate`` with a static cache: other adapters compile nothing; and beams, each row its own adapter's."""

import torch
from common import mode, save_adapters, tiny_llama
from peft import PeftModel

import lorafx

adapters = save_adapters()
peft_model = PeftModel.from_pretrained(tiny_llama(), adapters["sql"], adapter_name="sql")
peft_model.load_adapter(adapters["json"], adapter_name="json")
model = lorafx.compile(tiny_llama(), adapters, mode=mode())
settings = {"cache_implementation": "static", "max_new_tokens": 8, "do_sample": False}


def same_as_peft(ids: torch.Tensor, names: list[str], **more: int) -> torch.Tensor:
    arguments = {**settings, **more, "attention_mask": torch.ones_like(ids), "adapter_names": names}
    got = model.generate(ids, **arguments)
    assert torch.equal(got, peft_model.generate(input_ids=ids, **arguments))
    return got


ids = torch.arange(4, 20).view(2, 8)
print(same_as_peft(ids, ["sql", "json"])[:, 8:])
graphs = len(lorafx.explain(model).graphs)
print(same_as_peft(ids, ["json", "__base__"])[:, 8:])
assert len(lorafx.explain(model).graphs) == graphs  # other adapters, nothing compiled
print(same_as_peft(ids, ["sql", "json"], num_beams=2)[:, 8:])
