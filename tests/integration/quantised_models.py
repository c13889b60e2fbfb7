"""Layers of three projections that read one input, quantised in each way that a CPU runs."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SIZES = {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32)}


class Projections(nn.Module):
    """q, k and v of one input, side by side: nothing comes after them that would blur what is added to each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, sizes in SIZES.items():
            self.add_module(name, nn.Linear(*sizes, bias=name == "q_proj"))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Projections()

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


def each_layer(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name in SIZES:
        setattr(model.attn, name, make(getattr(model.attn, name)))
    return model


def plain(dtype: torch.dtype) -> nn.Module:
    return Model().to(dtype)


def nf4(dtype: torch.dtype) -> nn.Module:
    import bitsandbytes

    def make(layer: nn.Linear) -> nn.Module:
        has_bias = layer.bias is not None
        new = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, has_bias, compute_dtype=dtype, quant_type="nf4"
        )
        new.load_state_dict(layer.state_dict())
        return new.to("cpu")

    model = each_layer(plain(dtype), make)
    model.is_loaded_in_4bit = True  # as transformers marks a model, and PEFT wants it
    return model


def int8(dtype: torch.dtype) -> nn.Module:
    import bitsandbytes

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    def make(layer: nn.Linear) -> nn.Module:
        has_bias = layer.bias is not None
        new = bitsandbytes.nn.Linear8bitLt(
            layer.in_features, layer.out_features, has_bias, has_fp16_weights=False, threshold=6.0
        )
        new.load_state_dict(layer.state_dict())
        return new.to("cpu")

    model = each_layer(plain(dtype), make)
    model.is_loaded_in_8bit = True
    return model


def torchao_int8(dtype: torch.dtype) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = plain(dtype)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def torchao_int4(dtype: torch.dtype) -> nn.Module:
    """Int4WeightOnlyConfig wants a GPU's kernels."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_

    model = plain(dtype)
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4))
    return model


def diffusers_gguf(dtype: torch.dtype) -> nn.Module:
    """diffusers keeps the layers of a GGUF file as they are there, and dequantises at each call."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType.Q8_0

    def make(layer: nn.Linear) -> nn.Module:
        new = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype)
        packed = torch.from_numpy(quants.quantize(layer.weight.detach().float().numpy(), kind))
        new.weight = GGUFParameter(packed, quant_type=kind)
        new.bias = layer.bias
        return new

    return each_layer(plain(dtype), make)


class PackedLinear(nn.Module):
    """What GPTQ and AWQ layers are to lorafx: whole numbers in buffers, and a forward that it does not look into.

    Their package, gptqmodel, has kernels for GPUs only, so its layers can't be made here.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach()
        scales = weight.abs().amax(dim=1, keepdim=True) / 7
        self.register_buffer("scales", scales)
        self.register_buffer("qweight", torch.round(weight / scales).to(torch.int8))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.qweight.to(x.dtype) * self.scales.to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


def packed(dtype: torch.dtype) -> nn.Module:
    return each_layer(plain(dtype), PackedLinear)


KINDS: dict[str, tuple[Callable[[torch.dtype], nn.Module], list[str]]] = {  # and the packages that it needs
    "nf4": (nf4, ["bitsandbytes"]),
    "int8": (int8, ["bitsandbytes"]),
    "torchao int8": (torchao_int8, ["torchao"]),
    "torchao int4": (torchao_int4, ["torchao"]),
    "diffusers gguf": (diffusers_gguf, ["diffusers", "gguf"]),
    "packed": (packed, []),
}


def build(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A quantised model, in eval mode; skips the test where its package is not installed."""
    make, packages = KINDS[kind]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the {package} package is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(dtype).eval()
