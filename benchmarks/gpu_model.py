"""Whole forward passes of Llama-3-8B's layers on a GPU, each contender on the same base weights; see ``gpu.py``."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import lorafx
from benchmarks.cuda_timing import captured, medians
from benchmarks.forward_pass import Case, make_step, sharing, with_adapters


def contenders(base: LlamaForCausalLM, case: Case) -> dict[str, Callable[[], Tensor]]:
    """Steps by contender."""
    compiled_base = sharing(base)
    compiled_base.compile()
    steps = {"base": make_step(compiled_base, case)}
    mixed = {"adapter_names": [name or "__base__" for name in case.names]} if len(case.ranks) > 1 else {}

    for name, fold in (("lorafx", True), ("lorafx, not folded", False)):
        fused = with_adapters(sharing(base), case)
        lorafx.compile(fused, options={"fold": fold})
        fused.lora.use(case.names if mixed else case.names[0])
        steps[name] = make_step(fused, case)

    if len(case.ranks) == 1:
        merged = with_adapters(copy.deepcopy(base), case).merge_and_unload()
        merged.compile()
        steps["PEFT, merged and compiled"] = make_step(merged, case)

    steps["PEFT"] = make_step(with_adapters(sharing(base), case), case, **mixed)
    peft = with_adapters(sharing(base), case)
    peft.get_base_model().compile()
    steps["PEFT compiled"] = make_step(peft, case, **mixed)
    if importlib.util.find_spec("polylora"):
        steps["polylora"] = _polylora(base, case)
    return steps


def _polylora(base: LlamaForCausalLM, case: Case) -> Callable[[], Tensor]:
    """Run eagerly, as it is meant to be."""
    from polylora import PolyLoraConfig, PolyLoraModel

    peft = with_adapters(sharing(base), case)
    config = PolyLoraConfig(len(case.ranks), max(case.ranks), list(case.targets))
    model = PolyLoraModel(sharing(base), config).eval()
    for name in peft.peft_config:
        model.add_adapter_from_peft_model(name, peft)
    return make_step(base, case, model, adapter_ids=[name or "__base__" for name in case.names])


def errors(base: LlamaForCausalLM, case: Case, logits: dict[str, Tensor]) -> dict[str, float]:
    """Distance of each contender's logits from PEFT's in float64, rel-L2; of the base model's, what LoRA adds.

    AssertionError: lorafx is more than 1.5 times as far as PEFT run eagerly
    """
    exact = with_adapters(copy.deepcopy(base), case).double()
    names = {"adapter_names": [name or "__base__" for name in case.names]} if len(case.ranks) > 1 else {}
    reference = make_step(exact, case, **names)()
    found = {name: ((out.double() - reference).norm() / reference.norm()).item() for name, out in logits.items()}
    assert max(found["lorafx"], found["lorafx, not folded"]) <= 1.5 * found["PEFT"], found
    return found


def measure(base: LlamaForCausalLM, case: Case, rounds: int = 30) -> dict[str, dict[str, float | None]]:
    """Of each contender: ``graph_ms``, a CUDA graph of the pass (None where it can't be captured), ``call_ms``, the
    same called from Python, both medians in milliseconds, and ``distance``, see ``errors``."""
    steps = contenders(base, case)
    logits = {}
    for name, step in list(steps.items()):
        try:
            logits[name] = step().clone()
        except Exception as error:
            if name != "polylora":
                raise
            print(f"{case}: {name} is left out: {type(error).__name__}: {error}".splitlines()[0])
            del steps[name]
    distances = errors(base, case, logits)
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
