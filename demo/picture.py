"""Draws docs/layer.svg, one layer of the demo model's shape before and after, and docs/group.svg: how a group's weights
lie. `python -m demo.picture` (Graphviz)."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorafx
from demo import group_picture

TARGET = Path(__file__).parent.parent / "docs" / "layer.svg"


def main() -> None:
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=128,
    )
    model = lorafx.compile(
        LlamaForCausalLM(config).eval(),
        max_adapters=4,
        max_rank=8,
        target_modules=["all-linear"],
        options={"inductor": False},
    )
    with torch.no_grad():
        model(torch.arange(5)[None])
    print(lorafx.explain(model).svg(TARGET))
    group_picture.main()


if __name__ == "__main__":
    main()
