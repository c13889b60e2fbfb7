"""``lorafx.warmup``: what a server would meet first is compiled before it serves."""

import torch
from common import mode, save_adapters, tiny_llama

import lorafx

model = lorafx.compile(tiny_llama(), save_adapters(), mode=mode())
for (rows, length), seconds in lorafx.warmup(model, batch_sizes=[1, 2], lengths=[16]).items():
    print(f"{rows} row(s) of {length} tokens: {seconds:.1f} s")

graphs = len(lorafx.explain(model).graphs)
for rows in (1, 2):
    ids = torch.randint(4, 96, (rows, 16))
    names = ["sql", "json"][:rows]
    model.generate(ids, attention_mask=torch.ones_like(ids), adapter_names=names, max_new_tokens=12)
assert len(lorafx.explain(model).graphs) == graphs
print(f"{graphs} graph(s), and no further one for real calls")
