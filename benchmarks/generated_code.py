"""What Inductor makes for one decode step on a CPU: `python -m benchmarks.generated_code`. Counts, not times.

C++ kernels that differ are compiled one by one, so their number is what a compile costs; calls are what a token costs.
Layers of SmolLM2-135M's shape, random weights, five rows, room for four adapters of rank 16 on all seven projections.
"""

from __future__ import annotations

import re
import warnings

import torch
from torch._inductor.utils import run_and_get_code
from transformers import LlamaConfig, LlamaForCausalLM

import lorafx

LAYERS = (2, 6)


def model_of(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=1024,
    )
    return LlamaForCausalLM(config).eval()


def counts(model: torch.nn.Module) -> dict[str, int]:
    """Different C++ kernels, calls of them, GEMM calls."""
    torch._dynamo.reset()
    with torch.no_grad():
        _, codes = run_and_get_code(lambda: model(torch.zeros((5, 1), dtype=torch.int64), use_cache=False))
    code = "\n".join(codes)
    body = code[code.index("def call(") :]
    return {
        "different C++ kernels": len(set(re.findall(r"(cpp_fused\w+) = ", code))),
        "calls of C++ kernels": len(re.findall(r"^\s+cpp_fused\w+\(", body, flags=re.MULTILINE)),
        "GEMM calls": len(re.findall(r"extern_kernels\.(?:add|bad)?b?mm\(", body)),
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    for layers in LAYERS:
        base = model_of(layers)
        base.compile()
        fused = lorafx.compile(model_of(layers), max_adapters=4, max_rank=16, target_modules="all-linear")
        for title, model in (("base model", base), ("lorafx", fused)):
            found = ", ".join(f"{value} {name}" for name, value in counts(model).items())
            print(f"{layers} layers, {title:10}: {found}")


if __name__ == "__main__":
    main()
