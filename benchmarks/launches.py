"""What one decode step of a layer sends to a GPU: `python -m benchmarks.launches`. Counts, not times; needs no GPU.

One decoder layer of Llama-3-8B in bf16, eight rows of one token, no cache, as Inductor compiles it for an H100: the
base model, PEFT's layers and lorafx, rank 16. Nothing runs, so the weights hold whatever was in memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import lorafx
from tests.fake_cuda import CudaCode, Launches, count_launches, cuda_code

QKV = ("q_proj", "k_proj", "v_proj")
ALL = (*QKV, "o_proj", "gate_proj", "up_proj", "down_proj")
ROWS, RANK, SLOTS = 8, 16, 8
MIXED = ["one", None, "two", "one", "two", None, "one", "two"]
DTYPE = torch.bfloat16


class Step(nn.Module):
    """One decoder layer, called with the cosines and sines of its positions."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=4096,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=14336,
            num_hidden_layers=1,
            attn_implementation="sdpa",
        )
        self.layer = LlamaDecoderLayer(config, 0)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.layer(x, position_embeddings=(cos, sin))


def step(peft_targets: Sequence[str] = ()) -> Step:
    """A layer whose weights were never written, so that their memory is not touched; with PEFT's layers if asked."""
    with torch.device("meta"):
        model = Step()
        if peft_targets:
            config = LoraConfig(r=RANK, target_modules=list(peft_targets))
            inject_adapter_in_model(config, model.layer, low_cpu_mem_usage=True)
    return model.to(DTYPE).to_empty(device="cpu").eval()


def arguments() -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(ROWS, 1, 4096, dtype=DTYPE), *(torch.zeros(1, 1, 128, dtype=DTYPE) for _ in range(2))


def adapter(model: Step, targets: Sequence[str]) -> tuple[dict[str, Tensor], LoraConfig]:
    """An adapter of rank ``RANK`` on the layers with these names."""
    tensors = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in targets:
            prefix = f"base_model.model.{path}.lora"
            tensors[f"{prefix}_A.weight"] = torch.zeros(RANK, module.in_features, dtype=DTYPE)
            tensors[f"{prefix}_B.weight"] = torch.zeros(module.out_features, RANK, dtype=DTYPE)
    return tensors, LoraConfig(r=RANK, target_modules=list(targets))


def compiled(peft_targets: Sequence[str] = ()) -> CudaCode:
    """torch.compile alone."""
    model = torch.compile(step(peft_targets), fullgraph=True)
    return cuda_code(lambda: model(*arguments()))


def fused(targets: Sequence[str], names: Sequence[str | None] | None = None, fold: bool = True) -> CudaCode:
    """lorafx.compile with two adapters, of which ``names`` says which each row uses (default: one of them)."""
    model = step()
    adapters = {name: adapter(model, targets) for name in ("one", "two")}
    lorafx.compile(model, adapters, max_adapters=SLOTS, options={"fold": fold})
    return cuda_code(lambda: model(*arguments(), adapter_names=list(names or ["one"] * ROWS)))


CONTENDERS: dict[str, Callable[[], CudaCode]] = {
    "base model": compiled,
    "PEFT, q k v": lambda: compiled(QKV),
    "PEFT, all seven": lambda: compiled(ALL),
    "lorafx, q k v, not folded": lambda: fused(QKV, fold=False),
    "lorafx, all seven, not folded": lambda: fused(ALL, fold=False),
    "lorafx, q k v": lambda: fused(QKV),
    "lorafx, q k v, mixed batch": lambda: fused(QKV, MIXED),
    "lorafx, all seven": lambda: fused(ALL),
    "lorafx, all seven, mixed batch": lambda: fused(ALL, MIXED),
}


def columns(launches: Launches) -> dict[str, int]:
    return {
        "launches": launches.total,
        "GEMMs": len(launches.gemms),
        "attention": len(launches.others),
        "Inductor's": len(launches.fused),
        "lorafx's": len(launches.user),
        "copies": len(launches.copies),
        "memsets": len(launches.memsets),
        "host syncs": len(launches.host_syncs),
        "allocations": launches.allocations,
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    title = True
    for name, make in CONTENDERS.items():
        counts = columns(count_launches(make()))
        if title:
            print(f"{'':30}" + "".join(f"  {column}" for column in counts))
            title = False
        print(f"{name:30}" + "".join(f"  {value:>{len(column)}}" for column, value in counts.items()), flush=True)


if __name__ == "__main__":
    main()
