"""Fusing loses no gradient: those of x, base, A, B, biases and scales are eager's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.passes.toys import SCALE, Site, conv1d, fused_by, inputs, siblings

SPELLINGS = {
    "modules": lambda s, x: s.base_layer(x) + s.lora_b(s.lora_a(s.drop(x))) * SCALE,
    "scale parameter": lambda s, x: s.base_layer(x) + s.lora_b(s.lora_a(x)) * s.scale * 0.5,
    "transposed": lambda s, x: x @ s.w.T + (x @ s.a.T @ s.b_t) * SCALE,
    "Conv1D": lambda s, x: conv1d(x, s.w_t, s.bias) + x @ s.a_t @ s.b_t * SCALE,
}


@pytest.mark.parametrize("road", ["dynamo", "fx with inputs"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_gradients_are_eagers(name, road):
    model = siblings(3, SPELLINGS[name], bias=True, lora_bias=name in ("modules", "scale parameter")).train()
    for site in model.children():
        site.drop.p = 0.0
    eager = copy.deepcopy(model)
    x = inputs()
    fused, report = fused_by(road, model, x)
    assert [len(group.branches) for group in report.groups] == [3]
    for parameter in model.parameters():
        parameter.grad = None
    check(gradients(fused, model, x), gradients(eager, eager, x))


def test_gradients_of_a_bf16_base_under_a_float32_adapter():
    def peft(s: Site, x: Tensor) -> Tensor:
        result = s.base_layer(x)
        return (result + s.lora_b(s.lora_a(x.to(s.a.dtype))) * SCALE).to(result.dtype)

    model = siblings(2, peft)
    for site in model.children():
        site.base_layer.to(torch.bfloat16)
    eager, x = copy.deepcopy(model), inputs(dtype=torch.bfloat16)
    fused, report = fused_by("dynamo", model, x)
    assert len(report.groups) == 1
    for parameter in model.parameters():
        parameter.grad = None
    check(gradients(fused, model, x), gradients(eager, eager, x), bound=1e-2)


def test_frozen_base_and_trained_adapter():
    model = siblings(2)
    model.requires_grad_(False)
    for site in model.children():
        site.lora_a.requires_grad_(True)
    fused, _ = fused_by("dynamo", model, x := inputs())
    got = gradients(fused, model, x)
    assert sorted(got) == ["k.lora_a.weight", "q.lora_a.weight", "x"]


def gradients(call, model: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    outs = call(x)
    torch.manual_seed(2)
    sum((out * torch.randn(out.shape)).sum() for out in outs).backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"x": x.grad, **named}


def check(got: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        assert grad.dtype == expected[name].dtype
        error = (grad - expected[name]).norm() / expected[name].norm()
        assert error <= bound, f"{name}: {error:.1e}"
