"""Swaps under load, as in ``test_swaps.py``, of adapters that are more than LoRA on linear layers; plain ones are among
them, and take their slots and their names in turn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

import lorafx
from tests.integration import other_layers
from tests.integration.models import EAGER_GRAPH, FAMILIES, LLAMA, difference, run, tokens
from tests.integration.under_load import ROOM, Judge, under_load

IDS = tokens(4)
IDS[:, 0] = 5
IDS[:, 1:][IDS[:, 1:] == 5] = 7
IDS[0, 2] = 5  # aLoRA begins at the last 5 of a row
LATE = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [5]}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def on_ids(model: nn.Module, names: Any = None) -> Tensor:
    return run(model, {"input_ids": IDS}, names)


def on_pictures(model: nn.Module, names: Any = None) -> Tensor:
    return other_layers.run(model, names, other_layers.inputs(4))


@dataclass(frozen=True)
class Kind:
    """A model, the fields of adapters for it, what calls it, and the layers that room is reserved at."""

    build: Callable[[], nn.Module]
    adapters: tuple[Mapping[str, Any], ...]
    call: Callable[..., Tensor] = on_ids
    targets: str | list[str] = "all-linear"


PLAIN = {"r": 5, "target_modules": ["q_proj", "down_proj"]}
KINDS = {
    "dora": Kind(
        lambda: LLAMA.build(1),
        (
            {"r": 4, "use_dora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
            {"r": 2, "use_dora": True, "target_modules": ["q_proj"]},
            PLAIN,
            {**PLAIN, "r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        ),
    ),
    "alora": Kind(
        lambda: LLAMA.build(1),
        (
            {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **LATE},
            {"r": 2, "target_modules": ["v_proj"], **LATE},
            PLAIN,
            {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        ),
    ),
    "experts": Kind(
        lambda: FAMILIES["mixtral"].build(1),
        (
            {"r": 4, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
            {"r": 2, "target_modules": [], "target_parameters": EXPERTS[:1]},
            {"r": 4, "target_modules": ["q_proj"]},
        ),
    ),
    "embeddings and convolutions": Kind(
        other_layers.build,
        tuple(
            {**fields, "lora_bias": False} for fields in other_layers.ADAPTERS.values()
        ),  # no room is kept for biases
        on_pictures,
        other_layers.TARGETS,
    ),
    "modules_to_save": Kind(
        lambda: LLAMA.build(1),
        (
            {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
            PLAIN,
        ),
    ),
}


@dataclass(frozen=True)
class Made:
    state: dict[str, Tensor]
    config: LoraConfig
    expected: Tensor


@torch.no_grad()
def made(kind: Kind, seed: int) -> Made:
    """An adapter with signed random numbers, and plain PEFT's output with it alone."""
    fields = {"lora_dropout": 0.0, "init_lora_weights": False, **kind.adapters[seed % len(kind.adapters)]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(kind.build(), LoraConfig(**fields)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        drawn = torch.randn(parameter.shape, generator=generator) * 0.2
        if "lora_magnitude" in name:
            parameter.mul_(1 + drawn)
        elif "lora_" in name or ".modules_to_save." in name:
            parameter.copy_(drawn)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return Made({k: v.clone() for k, v in state.items()}, model.peft_config["default"], kind.call(model))


@pytest.mark.parametrize("changes", [60, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KINDS)
def test_changes_under_load(name, changes):
    kind = KINDS[name]
    contents = [made(kind, seed) for seed in range(3 * len(kind.adapters))]
    base = kind.call(kind.build())
    assert min(difference(one.expected, base) for one in contents) > 1e-2
    room = {"max_adapters": ROOM, "max_rank": 8, "target_modules": kind.targets}
    pairs = [(one.state, one.config) for one in contents]
    everywhere = {f"first {i}": pairs[i] for i in range(len(kind.adapters))}  # places for all that they need
    model = lorafx.compile(kind.build(), everywhere, options=EAGER_GRAPH, **room)
    for first in everywhere:
        model.lora.unload(first)
    sources = [pair if i % 2 else model.lora.read(pair) for i, pair in enumerate(pairs)]
    bad = ({key: value * float("nan") for key, value in contents[0].state.items()}, contents[0].config)
    under_load(model, sources, Judge(contents, base, kind.call), changes, bad)
