"""Hundreds of small adapters of different ranks and layers, on disk or in memory, and what plain PEFT makes of each."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from tests.integration.models import LLAMA, run

LAYERS = 2
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Made:
    """state, config: as PEFT writes them; expected: plain PEFT's output for each row of the inputs."""

    state: dict[str, Tensor]
    config: LoraConfig
    expected: Tensor

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        save_file(self.state, str(folder / "adapter_model.safetensors"))
        values = self.config.to_dict()
        values = {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}
        (folder / "adapter_config.json").write_text(json.dumps(values, default=str))


class Maker:
    """Makes adapters whose expected outputs are plain PEFT's, one PeftModel for each structure of them."""

    def __init__(self, inputs: Mapping[str, Tensor], largest_rank: int, structures: int, seed: int = 0) -> None:
        self.inputs = inputs
        rng = random.Random(seed)
        self.models = []
        for i in range(structures):
            rank = 1 if i == 0 else largest_rank if i == 1 else rng.randint(1, largest_rank)
            targets = rng.sample(TARGETS, rng.randint(1, len(TARGETS)))
            config = LoraConfig(
                r=rank,
                lora_alpha=rng.choice([4, 8, 32]),
                target_modules=targets,
                init_lora_weights=False,
                use_rslora=rng.random() < 0.3,
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.models.append(get_peft_model(LLAMA.build(LAYERS), config).eval())

    @torch.no_grad()
    def make(self, seed: int) -> Made:
        model = self.models[seed % len(self.models)]
        generator = torch.Generator().manual_seed(1000 + seed)
        state = {
            key: torch.randn(value.shape, generator=generator) * 0.05
            for key, value in get_peft_model_state_dict(model).items()
        }
        for key, value in state.items():
            model.get_parameter(key.replace(".weight", ".default.weight")).copy_(value)
        return Made(state, model.peft_config["default"], run(model, self.inputs))
