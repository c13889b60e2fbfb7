"""Layers of three projections that read one input, quantised in each way that a CPU runs."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Callable
from functools import partial
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


class FusedModel(nn.Module):
    """q, k and v in one layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.attn = nn.Module()
        self.attn.qkv_proj = nn.Linear(64, sum(wide for _, wide in SIZES.values()))

    def forward(self, x: Tensor) -> Tensor:
        return self.attn.qkv_proj(x)


def each_layer(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name, layer in list(model.attn.named_children()):
        setattr(model.attn, name, make(layer))
    return model


def bits4(model: nn.Module, quant_type: str = "nf4", double: bool = True) -> nn.Module:
    import bitsandbytes

    def make(layer: nn.Linear) -> nn.Module:
        new = bitsandbytes.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            compute_dtype=layer.weight.dtype,
            compress_statistics=double,
            quant_type=quant_type,
        )
        new.load_state_dict(layer.state_dict())
        return new.to("cpu")

    each_layer(model, make)
    model.is_loaded_in_4bit = True  # as transformers marks a model, and PEFT wants it
    return model


def int8(model: nn.Module, threshold: float = 6.0) -> nn.Module:
    import bitsandbytes

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    def make(layer: nn.Linear) -> nn.Module:
        has_bias = layer.bias is not None
        new = bitsandbytes.nn.Linear8bitLt(
            layer.in_features, layer.out_features, has_bias, has_fp16_weights=False, threshold=threshold
        )
        new.load_state_dict(layer.state_dict())
        return new.to("cpu")

    each_layer(model, make)
    model.is_loaded_in_8bit = True
    return model


def torchao(model: nn.Module, config: str, **settings: Any) -> nn.Module:
    import torchao.quantization

    torchao.quantization.quantize_(model, getattr(torchao.quantization, config)(**settings))
    return model


def diffusers_gguf(model: nn.Module) -> nn.Module:
    """diffusers keeps the layers of a GGUF file as they are there, and dequantises at each call."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType.Q8_0

    def make(layer: nn.Linear) -> nn.Module:
        new = GGUFLinear(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=layer.weight.dtype
        )
        packed = torch.from_numpy(quants.quantize(layer.weight.detach().float().numpy(), kind))
        new.weight = GGUFParameter(packed, quant_type=kind)
        new.bias = layer.bias
        return new

    return each_layer(model, make)


def transformers_gguf(model: nn.Module) -> nn.Module:
    """What transformers keeps of a GGUF file where it has a kernel for it. Without one these layers run too, from 9
    rows on."""
    from gguf import GGMLQuantizationType, quants
    from transformers.integrations.gguf.utils import GgufLinear

    kind = GGMLQuantizationType.Q8_0

    def make(layer: nn.Linear) -> nn.Module:
        new = GgufLinear(layer.in_features, layer.out_features, kind, layer.bias is not None)
        new.weight.data = torch.from_numpy(quants.quantize(layer.weight.detach().float().numpy(), kind))
        new.bias = layer.bias
        return new

    return each_layer(model, make)


def gptq(model: nn.Module) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    return gptqmodel_model(TorchLinear, model)


def awq(model: nn.Module) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    return gptqmodel_model(AwqTorchLinear, model)


def gptqmodel_model(cls: type, model: nn.Module) -> nn.Module:
    each_layer(model, lambda layer: gptqmodel_layer(cls, layer))
    model.register_parameter("any", nn.Parameter(torch.zeros(1)))  # PEFT asks the first one where it is
    return model


@torch.no_grad()
def gptqmodel_layer(cls: type, layer: nn.Linear, group: int = 32) -> nn.Module:
    """Rounded to 4 bits, each ``group`` of input features from its smallest to its largest weight."""
    columns, rows = layer.in_features, layer.out_features
    weight = layer.weight.detach().float().view(rows, columns // group, group)
    scales = (weight.amax(-1) - weight.amin(-1)) / 15
    zeros = (-weight.amin(-1) / scales).round().clamp(0, 15)
    new = cls(4, group, sym=False, desc_act=False, in_features=columns, out_features=rows, bias=layer.bias is not None)
    pack = getattr(new, "pack_original", new.pack)  # the other one of GPTQ's compiles C++
    pack(layer, scales, zeros, torch.arange(columns) // group)
    new.optimized = True  # else GPTQ's compiles itself with Inductor, for seconds
    new.post_init()
    return new


class PackedLinear(nn.Module):
    """What GPTQ and AWQ layers are to lorafx: whole numbers in buffers, and a forward that it does not look into."""

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


def packed(model: nn.Module) -> nn.Module:
    return each_layer(model, PackedLinear)


KINDS: dict[str, tuple[Callable[[nn.Module], nn.Module], list[str]]] = {  # and the packages that it needs
    "nf4": (bits4, ["bitsandbytes"]),  # with its scales quantised too
    "fp4": (partial(bits4, quant_type="fp4", double=False), ["bitsandbytes"]),
    "int8": (int8, ["bitsandbytes"]),
    "int8 without outliers": (partial(int8, threshold=0.0), ["bitsandbytes"]),
    "torchao int8": (partial(torchao, config="Int8WeightOnlyConfig"), ["torchao"]),
    "torchao int8 activations": (partial(torchao, config="Int8DynamicActivationInt8WeightConfig"), ["torchao"]),
    # Int4WeightOnlyConfig's packings want a GPU, all four
    "torchao int4": (partial(torchao, config="IntxWeightOnlyConfig", weight_dtype=torch.int4), ["torchao"]),
    "torchao float8": (partial(torchao, config="Float8WeightOnlyConfig"), ["torchao"]),
    "gptq": (gptq, ["gptqmodel"]),
    "awq": (awq, ["gptqmodel"]),
    "diffusers gguf": (diffusers_gguf, ["diffusers", "gguf"]),
    "transformers gguf": (transformers_gguf, ["gguf"]),
    "packed": (packed, []),
}


def need(*packages: str) -> None:
    """Skips the test where one is not installed; with LORAFX_QUANTISED set, as `make quantised` does, it fails."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            assert not os.environ.get("LORAFX_QUANTISED"), f"{package} is not installed"
            pytest.skip(f"{package} is not installed here; `make quantised` runs this with it")


def build(kind: str, dtype: torch.dtype = torch.float32, make: type[nn.Module] = Model) -> Any:
    """A quantised model, in eval mode; skips the test where its package is not installed."""
    quantise, packages = KINDS[kind]
    need(*packages)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantise(make().to(dtype)).eval()
