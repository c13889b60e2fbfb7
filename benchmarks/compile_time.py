"""How long a decode step takes to compile, whole and with layers that share: ``python -m benchmarks.compile_time``.

SmolLM2-135M's shapes, random weights, a static cache, one row, one adapter of rank 16 on all seven projections.
Each compilation has a process and a cache folder of its own. ``--layers 6`` is for a quick look.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import lorafx
from lorafx import backend, outlined
from lorafx.runtime import runtime_of

ROOM, RANK = 256, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONTENDERS = ("base", "whole", "outlined")  # torch.compile without LoRA; lorafx with outline off and on


def base_model(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def with_adapter(model: nn.Module, outline: bool) -> nn.Module:
    torch.manual_seed(1)
    tensors = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in TARGETS:
            name = f"base_model.model.{path}.lora"
            tensors[f"{name}_A.weight"] = torch.randn(RANK, module.in_features) / module.in_features**0.5
            tensors[f"{name}_B.weight"] = torch.randn(module.out_features, RANK) / 10
    config = LoraConfig(r=RANK, target_modules=list(TARGETS))
    return lorafx.compile(model, {"one": (tensors, config)}, options={"outline": outline})


class Decoder:
    """One contender: a prompt is read uncompiled, then ``step`` decodes a token."""

    def __init__(self, contender: str, layers: int) -> None:
        self.model = base_model(layers)
        if contender == "base":
            self.call: Callable[..., Any] = torch.compile(self.model)
        else:
            self.call = with_adapter(self.model, contender == "outlined")
        self.cache = StaticCache(config=self.model.config, max_cache_len=ROOM)
        self.at = ROOM

    @torch.no_grad()
    def step(self) -> Tensor:
        if self.at == ROOM:
            self.prompt()
        token = torch.tensor([[3 + self.at]])
        out = self.call(token, past_key_values=self.cache, position_ids=torch.tensor([[self.at]]))
        self.at += 1
        return out.logits

    @torch.no_grad()
    def prompt(self) -> None:
        self.cache.reset()
        runtime = runtime_of(self.model)
        with runtime.eagerly() if runtime is not None else nullcontext():
            self.model(torch.arange(3, 19)[None], past_key_values=self.cache)
        self.at = 16


def compile_one(contender: str, layers: int) -> dict[str, float]:
    """Seconds: the first step, and what lorafx's own passes took of it."""
    decoder = Decoder(contender, layers)
    decoder.prompt()
    passes = 0.0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal passes
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                passes += time.perf_counter() - start

        return call

    with (
        mock.patch.object(backend, "run_passes", counted(backend.run_passes)),
        mock.patch.object(outlined, "outline", counted(outlined.outline)),
    ):
        start, spent = time.perf_counter(), cpu_seconds()
        decoder.step()
        seconds, spent = time.perf_counter() - start, cpu_seconds() - spent
    runtime = runtime_of(decoder.model)
    graph = runtime.graphs[-1] if runtime is not None else None
    return {
        "seconds": seconds,
        "cpu": spent,
        "inductor": graph.seconds if graph is not None else 0.0,
        "passes": passes,
        "shared": graph.outlined if graph is not None else 0,
    }


def cpu_seconds() -> float:
    """Of this process and the compilers that it ran: what other work on the machine changes little."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def decode(layers: int, rounds: int) -> dict[str, Any]:
    """Seconds for a token, whole and outlined in turns in one process, and how far their logits are apart."""
    decoders = {name: Decoder(name, layers) for name in CONTENDERS[1:]}
    logits = {name: decoder.step() for name, decoder in decoders.items()}
    apart = (logits["whole"] - logits["outlined"]).norm() / logits["whole"].norm()
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    names = list(decoders)
    for i in range(-10, rounds):
        random.shuffle(names)
        for name in names:
            if decoders[name].at == ROOM:
                decoders[name].prompt()
            start = time.perf_counter()
            decoders[name].step()
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds["outlined"], seconds["whole"], strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {**medians, "ratio": statistics.median(ratios), "apart": apart.item()}


def in_process(task: str, layers: int, caches: str | None, rounds: int = 0) -> dict[str, Any]:
    """``caches``: the folder that compiled code is kept in; None for none."""
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches or empty}
        environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "0" if caches else "1"
        command = [sys.executable, "-m", "benchmarks.compile_time", "--layers", str(layers)]
        command += ["--task", task, "--rounds", str(rounds)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(layers: int, rounds: int) -> None:
    print(f"{layers} layers, seconds of the first decode step, no caches")
    told = {}
    for name in CONTENDERS:
        told[name] = in_process(name, layers, None)
        row = told[name]
        line = f"  {name:10} {row['seconds']:7.1f} s, of CPU time {row['cpu']:7.1f} s"
        if name != "base":
            ratios = [row[key] / told["whole"][key] for key in ("seconds", "cpu", "inductor")]
            line += f", in Inductor {row['inductor']:7.1f} s; to whole {' '.join(f'{r:.2f}' for r in ratios)}"
            line += f"; our passes {row['passes']:.2f} s ({row['passes'] / row['seconds']:.1%}); {row['shared']} shared"
        print(line, flush=True)
    print("with caches: the first process, the second")
    for name in CONTENDERS[1:]:
        with tempfile.TemporaryDirectory() as folder:
            cold, warm = (in_process(name, layers, folder) for _ in range(2))
        print(f"  {name:10} {cold['seconds']:7.1f} s {warm['seconds']:7.1f} s, in Inductor {warm['inductor']:.1f} s")
    row = in_process("decode", layers, None, rounds)
    print(
        f"decode, for a token: whole {row['whole'] * 1e3:.2f} ms, outlined {row['outlined'] * 1e3:.2f} ms,"
        f" ratio {row['ratio']:.3f} (median of {rounds}); logits {row['apart']:.1e} apart (rel-L2)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=200, help="tokens that are timed")
    parser.add_argument("--task", choices=[*CONTENDERS, "decode"], help="one measurement, as JSON")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.task is None:
        report(arguments.layers, arguments.rounds)
    elif arguments.task == "decode":
        print(json.dumps(decode(arguments.layers, arguments.rounds)))
    else:
        print(json.dumps(compile_one(arguments.task, arguments.layers)))


if __name__ == "__main__":
    main()
