"""PEFT code as it is: a PeftModel is compiled in place, and its verbs go on meaning what they mean."""

import torch
from common import mode, save_adapters, tiny_llama
from peft import PeftModel

import lorafx

adapters = save_adapters()
extra = save_adapters(chat={"r": 6, "target_modules": ["q_proj", "k_proj"], "task_type": "CAUSAL_LM"})
ids = torch.arange(4, 24).view(2, 10)


def peft_model() -> PeftModel:
    model = PeftModel.from_pretrained(tiny_llama(), adapters["sql"], adapter_name="sql")
    model.load_adapter(adapters["json"], adapter_name="json")
    return model.eval()


VERBS = {
    "as loaded": lambda model: None,
    "set_adapter": lambda model: model.set_adapter("json"),
    "load_adapter": lambda model: model.load_adapter(extra["chat"], adapter_name="chat"),
    "set_adapter to it": lambda model: model.set_adapter("chat"),
    "add_weighted_adapter": lambda model: model.add_weighted_adapter(["sql", "chat"], [0.6, 0.4], "mix", "cat"),
    "set_adapter to the mix": lambda model: model.set_adapter("mix"),
    "delete_adapter": lambda model: model.delete_adapter("chat"),
}
reference = peft_model()
model = lorafx.compile(peft_model(), max_adapters=4, max_rank=10, mode=mode())
with torch.no_grad():
    for verb, apply in VERBS.items():
        apply(model)
        apply(reference)
        got, want = model(ids).logits, reference(ids).logits
        assert torch.allclose(got, want, atol=1e-5)
        print(f"{verb:22} {len(lorafx.explain(model).graphs)} graph(s), {abs(got - want).max():.0e} from PEFT's")
    with model.disable_adapter():
        assert torch.allclose(model(ids).logits, tiny_llama()(ids).logits, atol=1e-5)
    names = ["sql", "__base__"]
    assert torch.allclose(model(ids, adapter_names=names).logits, reference(ids, adapter_names=names).logits, atol=1e-5)
    report = lorafx.explain(model)
    assert len(report.graphs) <= 1
    assert not report.retraces

    merged = lorafx.uncompile(model).merge_and_unload()  # the adapters stay on it until they are merged
    assert torch.allclose(merged(ids).logits, reference.merge_and_unload()(ids).logits, atol=1e-5)
print(f"disable_adapter and adapter_names: one graph still; then merged into a {type(merged).__name__}")
