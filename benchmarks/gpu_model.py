"""Whole forward passes of Llama-3-8B's layers on a GPU, each contender on the same base weights; see ``gpu.py``."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import lorafx
from benchmarks.cuda_timing import captured, medians
from benchmarks.forward_pass import Case, make_step, sharing, with_adapters


def contenders(base: LlamaForCausalLM, case: Case) -> dict[str, Callable[[], Tensor]]:
    """Steps by contender. Merged weights are not among them: they run as the base model does."""
    compiled_base = sharing(base)
    compiled_base.compile()
    steps = {"base": make_step(compiled_base, case)}
    mixed = {"adapter_names": [name or "__base__" for name in case.names]} if len(case.ranks) > 1 else {}

    fused = with_adapters(sharing(base), case)
    lorafx.compile(fused)
    fused.lora.use(case.names if mixed else case.names[0])
    steps["lorafx"] = make_step(fused, case)

    steps["PEFT"] = make_step(with_adapters(sharing(base), case), case, **mixed)
    peft = with_adapters(sharing(base), case)
    peft.get_base_model().compile()
    steps["PEFT compiled"] = make_step(peft, case, **mixed)
    return steps


def errors(base: LlamaForCausalLM, case: Case, logits: dict[str, Tensor]) -> dict[str, float]:
    """Distance of each contender's logits from PEFT's in float64, rel-L2; of the base model's, what LoRA adds.

    AssertionError: lorafx is more than 1.5 times as far as PEFT run eagerly
    """
    exact = with_adapters(copy.deepcopy(base), case).double()
    names = {"adapter_names": [name or "__base__" for name in case.names]} if len(case.ranks) > 1 else {}
    reference = make_step(exact, case, **names)()
    found = {name: ((out.double() - reference).norm() / reference.norm()).item() for name, out in logits.items()}
    assert found["lorafx"] <= 1.5 * found["PEFT"], found
    return found


def measure(base: LlamaForCausalLM, case: Case, rounds: int = 30) -> dict[str, dict[str, float | None]]:
    """Of each contender: ``graph_ms``, a CUDA graph of the pass (None where it can't be captured), ``call_ms``, the
    same called from Python, both medians in milliseconds, and ``distance``, see ``errors``."""
    steps = contenders(base, case)
    distances = errors(base, case, {name: step().clone() for name, step in steps.items()})
    graphs = {}
    for name, step in steps.items():
        try:
            graphs[name] = captured(step).replay
        except RuntimeError:  # PEFT's mixed batches copy from the host
            torch.cuda.synchronize()
    replayed, called = medians(graphs, rounds), medians(steps, rounds // 3)
    return {
        name: {"graph_ms": replayed.get(name), "call_ms": called[name], "distance": distances[name]} for name in steps
    }
