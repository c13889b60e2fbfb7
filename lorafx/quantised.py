"""Linear layers whose weight is no plain matrix of floating-point numbers: bitsandbytes, torchao, GGUF, GPTQ, AWQ, ...

lorafx never looks into them: their output is all it needs. None of their packages is imported here.
"""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

SIZES = (("in_features", "out_features"), ("infeatures", "outfeatures"))


def features_of(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer, quantised or not, under PEFT's layer too; None for anything else."""
    if isinstance(module, LoraLayer):
        module = module.get_base_layer()
    if isinstance(module, Conv1D):
        return tuple(module.weight.shape)
    if not isinstance(module, nn.Linear) and not is_quantised(module):
        return None
    return _sizes(module)


def is_quantised(module: nn.Module) -> bool:
    """Whether it is a linear layer, by its sizes, that has no weight as ``nn.Linear`` has it."""
    if _sizes(module) is None or isinstance(module, LoraLayer) or any(True for _ in module.children()):
        return False
    weight = getattr(module, "weight", None)
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
    return not plain


def stand_in(module: nn.Module) -> nn.Linear:
    """A linear layer of these sizes on the meta device, in the place of a quantised one."""
    bias = getattr(module, "bias", None)
    has_bias = bias is not None and bias is not False
    made = nn.Linear(*_sizes(module), bias=has_bias, device="meta", dtype=torch.float32)
    return made.requires_grad_(False).train(module.training)


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    for names in SIZES:
        sizes = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(size, int) and size > 0 for size in sizes):
            return sizes
    return None
