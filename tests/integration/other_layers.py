"""A small model with an embedding, convolutions and a linear layer, and PEFT's adapters for it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from .models import assert_close

TARGETS = ["labels", "strided", "same", "mixing", "head"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "lora_alpha": 6, "target_modules": TARGETS},
    "b": {"r": 7, "lora_alpha": 7, "use_rslora": True, "lora_bias": True, "target_modules": TARGETS[1:4]},
    "c": {"r": 2, "target_modules": ["labels", "strided"]},
}
MIXED = ["b", None, "a", "c", "a"]


class Pictures(nn.Module):
    """Strides, unequal kernels, padding by name and of another mode, and a label for each row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.labels = nn.Embedding(10, 6, padding_idx=0)
        self.strided = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.same = nn.Conv2d(8, 8, (3, 5), padding="same", padding_mode="circular")
        self.mixing = nn.Conv2d(8, 6, 1, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden = self.mixing(torch.tanh(self.same(torch.tanh(self.strided(x)))))
        return self.head((hidden + self.labels(labels)[:, 0, :, None, None]).movedim(1, -1))


def build(dtype: torch.dtype = torch.float32) -> Pictures:
    return Pictures().eval().to(dtype)


def inputs(rows: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, 3, 9, 8, generator=generator).to(dtype)
    return x, torch.randint(0, 10, (rows, 1), generator=generator)


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """LoRA weights that are signed and far from zero, whatever PEFT began with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def with_adapters(model: nn.Module, configs: Mapping[str, Mapping[str, Any]]) -> Any:
    """A PeftModel with these; the first is active."""
    made = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, fields in configs.items():
            config = LoraConfig(**{"init_lora_weights": False, **fields})
            if made is None:
                made = get_peft_model(model, config, adapter_name=name)
            else:
                made.add_adapter(name, config)
    return filled(made)


def state_of(model: Any, name: str) -> tuple[dict[str, Tensor], LoraConfig]:
    """What ``save_pretrained`` would write."""
    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False), model.peft_config[name]


@torch.no_grad()
def run(model: nn.Module, names: Any = None, given: tuple[Tensor, Tensor] | None = None) -> Tensor:
    extra = {} if names is None else {"adapter_names": names}
    return model(*(given or inputs()), **extra).clone()


def pefts_names(names: list[str | None]) -> list[str]:
    return ["__base__" if name is None else name for name in names]


def assert_same_delta(got: Tensor, want: Tensor, base: Tensor, tolerance: float = 1e-5) -> None:
    assert (want - base).norm() > 0.01 * base.norm()
    assert_close(got.double() - base.double(), want.double() - base.double(), tolerance)
