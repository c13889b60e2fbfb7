"""A layer that sees rows and one that sees rows * tokens in one graph: each takes its own spread of the routing."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import lorafx

ROWS, TOKENS = 3, 4
NAMES = ["one", None, "two"]


class Flattening(nn.Module):
    """As OPT's MLP and MoE routers do: the second layer's input is ``[rows * tokens, in]``."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh().reshape(-1, 6)).view(x.shape)


def adapter(seed: int, rank: int) -> tuple[dict[str, Tensor], LoraConfig]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"up.lora_A": (rank, 8), "up.lora_B": (6, rank), "down.lora_A": (rank, 6), "down.lora_B": (8, rank)}
    tensors = {
        f"base_model.model.{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    return tensors, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["up", "down"])


def expected(model: Flattening, tensors: dict[str, Tensor] | None, x: Tensor) -> Tensor:
    """One row in float64, written out."""

    def layer(name: str, value: Tensor) -> Tensor:
        linear = getattr(model, name)
        y = value @ linear.weight.double().T + linear.bias.double()
        if tensors is None:
            return y
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        return y + 2.0 * (value @ a.T) @ b.T

    return layer("down", layer("up", x.double()).tanh())


HOW = {
    "eager": {"mode": "eager"},
    "graph": {"options": {"inductor": False}},
    "graph, aten": {"options": {"inductor": False, "lowering": "aten"}},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())
def test_each_row_keeps_its_adapter(how: dict) -> None:
    torch.manual_seed(0)
    model, x = Flattening().eval(), torch.randn(ROWS, TOKENS, 8)
    sources = {"one": adapter(1, 2), "two": adapter(2, 3)}
    want = [expected(model, sources[name][0] if name else None, row) for name, row in zip(NAMES, x, strict=True)]
    compiled = lorafx.compile(model, sources, **how)
    with torch.no_grad():
        got = compiled(x, adapter_names=NAMES)
    for mine, right in zip(got.double(), want, strict=True):
        assert (mine - right).norm() <= 1e-6 * right.norm()
    if how is HOW["graph, aten"]:
        assert lorafx.explain(compiled).graphs[0].passes.after["lorafx.row_weights"] == 2
