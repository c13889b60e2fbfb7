"""What it costs to route a batch and to swap an adapter: ``python -m benchmarks.swaps``.

Everything is a ratio or a time of one run on this machine, from rounds in which the contenders take turns; medians,
with the quartiles beside them. SmolLM2-135M's own shapes (30 layers, hidden 576, q 576, k and v 192), random weights:
nothing of the cost depends on their values.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lorafx
from benchmarks.turns import take_turns, timed
from lorafx.adapters import AdapterWeights
from lorafx.runtime import runtime_of

RESIDENT, ROWS, RANK = 16, 64, 16
RING = 24  # adapters of 5 MB that replace and the copies take in turn
TARGETS = ["q_proj", "k_proj", "v_proj"]


def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,  # the head and the embedding play no part here
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    return LlamaForCausalLM(config).eval()


def show(title: str, seconds: Mapping[str, list[float]], unit: str, against: str) -> None:
    scale = {"us": 1e6, "ms": 1e3}[unit]
    print(f"\n{title}")
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        ratios = [a / b for a, b in zip(values, seconds[against], strict=True)]
        ratio = "" if name == against else f"  {statistics.median(ratios):6.2f} x {against}"
        shortest = min(values) * scale
        times = f"{middle * scale:9.2f} {unit}  ({low * scale:.2f} to {high * scale:.2f}, shortest {shortest:.2f})"
        print(f"  {name:44s} {times}{ratio}")


def routing(compiled, names: list[str], rounds: int) -> None:
    """From a new list of names for every batch to the tensors that the ops read, and all that a call does around it."""
    bank, runtime = compiled.lora, runtime_of(compiled)
    batches = [[random.choice([*names, None]) for _ in range(ROWS)] for _ in range(rounds + 3)]

    same = [random.choice([*names, None]) for _ in range(ROWS)]

    def the_same_list(_: int) -> float:
        def enter() -> None:
            with runtime.selected(same), bank.forward():
                pass

        return timed(enter)

    def a_list(i: int) -> float:
        def enter() -> None:
            with runtime.selected(batches[i]), bank.forward():
                pass

        return timed(enter)

    def one_name(i: int) -> float:
        def enter() -> None:
            with runtime.selected(names[i % len(names)]), bank.forward():
                pass

        return timed(enter)

    contenders = {
        f"{ROWS} rows, a new list of names each time": a_list,
        f"{ROWS} rows, the same list again": the_same_list,
        "one name for the batch": one_name,
    }
    show(
        f"routing among {len(names)} resident adapters, all that a call with adapter_names does before the model",
        take_turns(contenders, rounds),
        "us",
        "one name for the batch",
    )


def swapping(compiled, spare: list[AdapterWeights], rounds: int) -> None:
    """``replace`` from weights already read, beside plain copies of the same bytes.

    All walk one ring of adapters, a third of it apart, so that the bytes of each were last read equally long ago, and
    the ring is larger than a cache: what is read comes from memory, as it does where many adapters are kept.
    """
    bank, flat = compiled.lora, torch.empty_like(spare[0].flat)
    tensors = [torch.empty_like(tensor) for site in spare[0].sites.values() for tensor in site.tensors()]

    third = len(spare) // 3

    def plain(i: int) -> float:
        source = spare[i % len(spare)].flat
        return timed(lambda: flat.copy_(source))

    def tensor_by_tensor(i: int) -> float:
        source = [tensor for site in spare[(i + third) % len(spare)].sites.values() for tensor in site.tensors()]
        return timed(lambda: [mine.copy_(other) for mine, other in zip(tensors, source, strict=True)])

    def replace(i: int) -> float:
        adapter = spare[(i + 2 * third) % len(spare)]
        return timed(lambda: bank.replace("a0", adapter))

    contenders = {
        "one copy of its bytes": plain,
        "a copy of each of its tensors": tensor_by_tensor,
        "model.lora.replace, weights read before": replace,
    }
    seconds = take_turns(contenders, rounds)
    megabytes = spare[0].nbytes / 1e6
    show(
        f"replacing a rank-{RANK} adapter on q, k, v of 30 layers: {megabytes:.1f} MB",
        seconds,
        "ms",
        "one copy of its bytes",
    )


def reading(compiled, folder: Path, rounds: int) -> None:
    """The same from its files: nothing was read before."""
    bank = compiled.lora

    def peft_reads(_: int) -> float:
        from peft.utils import load_peft_weights

        return timed(lambda: load_peft_weights(str(folder), device="cpu"))

    contenders = {
        "PEFT reads the file, and loads nothing": peft_reads,
        "model.lora.read": lambda i: timed(lambda: bank.read(str(folder))),
        "model.lora.replace from the folder": lambda i: timed(lambda: bank.replace("a1", str(folder))),
    }
    show("from its files", take_turns(contenders, rounds), "ms", "PEFT reads the file, and loads nothing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    config = LoraConfig(r=RANK, lora_alpha=32, target_modules=TARGETS, init_lora_weights=False)
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(model(), config).save_pretrained(folder)
        compiled = lorafx.compile(
            model(), None, max_adapters=RESIDENT, max_rank=RANK, target_modules=TARGETS, mode="eager"
        )
        names = [f"a{i}" for i in range(RESIDENT)]
        for name in names:
            compiled.lora.load(name, folder)
        spare = [compiled.lora.read(folder) for _ in range(RING)]
        print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {time.strftime('%Y-%m-%d')}")
        routing(compiled, names, rounds)
        swapping(compiled, spare, rounds)
        reading(compiled, Path(folder), max(rounds // 10, 10))


if __name__ == "__main__":
    main()
