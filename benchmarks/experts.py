"""What adapters on the experts of a mixture cost on a CPU: ``python -m benchmarks.experts``.

One decoder layer with the sizes of Qwen3-30B-A3B (hidden 2048, 128 experts of width 768, 8 of them for each token) and
random weights, through Inductor, float32; adapters on the experts and their router. Contenders take turns in one
process; printed are medians, and ratios to the same layer compiled without adapters. Each is compared with PEFT first.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import lorafx
from benchmarks.turns import ratios, take_turns, timed

SIZES = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 256,  # the head and the embedding play no part here
}
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
CASES = {"1 row of 1 token": (1, 1), "8 rows of 1 token": (8, 1), "1 row of 256 tokens": (1, 256)}
FEW = 3  # rounds of what takes seconds
CLOSE = 1e-4  # rel-L2 of what an adapter adds, to PEFT's, which adds it to the weights


def model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_hidden_layers=1)).eval()


def save(folder: Path, count: int, rank: int) -> dict[str, str]:
    """Adapters whose weights are random and not zero, as PEFT writes them."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=TARGETS, lora_dropout=0.0)
    made = get_peft_model(model(), config)
    folders = {}
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.05, generator=generator)
        folders[f"a{i}"] = str(folder / f"a{i}")
        made.save_pretrained(folders[f"a{i}"])
    return folders


def check(compiled: torch.nn.Module, folder: str, tokens: torch.Tensor) -> None:
    """SystemExit: what the first adapter adds is not what PEFT adds"""
    base = compiled(tokens, adapter_names=[None] * len(tokens)).logits
    got = compiled(tokens, adapter_names=["a0"] * len(tokens)).logits - base
    want = PeftModel.from_pretrained(model(), folder).eval()(tokens).logits - base
    distance = float((got - want).norm() / want.norm())
    if not distance <= CLOSE:
        raise SystemExit(f"what adapter a0 adds is {distance:.1e} from what PEFT adds; expected at most {CLOSE:.0e}")


def show(seconds: dict[str, list[float]], skip: str = "") -> None:
    for name in seconds:
        if name != skip:
            found = ratios(seconds[name], seconds["base"])
            middle = statistics.median(seconds[name]) * 1e3
            print(f"  {name:26s} {middle:9.1f} ms {found.median:6.2f} x base ({found.low:.2f} to {found.high:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=8)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), rank {arguments.rank}")
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        folders = save(Path(folder), arguments.adapters, arguments.rank)
        base, compiled = torch.compile(model()), lorafx.compile(model(), folders)
        peft = PeftModel.from_pretrained(model(), folders["a0"], adapter_name="a0").eval()
        for title, (rows, positions) in CASES.items():
            tokens = torch.randint(256, (rows, positions))
            mixed = [f"a{i % arguments.adapters}" for i in range(rows)]
            contenders = {
                "base": lambda _, tokens=tokens: timed(lambda: base(tokens)),
                "lorafx, no adapter in use": lambda _, tokens=tokens: timed(lambda: compiled(tokens)),
                "lorafx, one adapter": lambda _, tokens=tokens, rows=rows: timed(
                    lambda: compiled(tokens, adapter_names=["a0"] * rows)
                ),
            }
            if rows > 1:
                contenders[f"lorafx, {len(set(mixed))} adapters"] = lambda _, tokens=tokens, mixed=mixed: timed(
                    lambda: compiled(tokens, adapter_names=mixed)
                )
            compiled.lora.use(None)
            check(compiled, folders["a0"], tokens)
            print(f"\n{title}")
            show(take_turns(contenders, arguments.rounds))
        theirs = {"base": contenders["base"], "PEFT, one adapter (eager)": lambda _: timed(lambda: peft(tokens))}
        show(take_turns(theirs, FEW), skip="base")  # seconds for each call: it adds B A to every expert's weight


if __name__ == "__main__":
    main()
