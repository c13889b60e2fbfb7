"""Which layers can be adapted, how wide they are, and how the marker of each is made: linear ones, embeddings, Conv2d.
Adapted parameters, of experts and routers, are no layers (``experts.py``).

The bank knows rank rows only. An embedding from ``entries`` to ``width`` is a layer of as many features; a convolution
is one from ``channels * height * width`` of its kernel to its output channels.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn

from lorafx.quantised import features_of, is_quantised

KINDS = {"embedding": nn.Embedding, "conv2d": nn.Conv2d}


def widths_of(layer: nn.Module) -> tuple[int, int] | None:
    """(in, out) features of the rank rows of A and B; None: no layer that can be adapted, as far as sizes tell."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1], layer.out_channels
    if isinstance(layer, (nn.Conv1d, nn.Conv3d, nn.MultiheadAttention)):
        return None
    if is_quantised(layer):
        return features_of(layer)
    widths = _get_in_out_features(layer)
    return widths if isinstance(widths[0], int) else None


def why_not(layer: nn.Module) -> str | None:
    """Why lorafx can't compute LoRA on this embedding or convolution as PEFT does; None if it can, or it is another
    kind of layer."""
    if isinstance(layer, nn.Embedding):
        if layer.max_norm is not None:
            return "an embedding with max_norm changes its weights as it is called"
        if getattr(layer, "_hf_tp_plan", None) is not None:
            return "an embedding that is sharded over devices"
    elif isinstance(layer, nn.Conv2d):
        if type(layer) is not nn.Conv2d:
            return f"a {type(layer).__name__}, which may compute other than nn.Conv2d"
        if layer.groups != 1:
            return f"a convolution in {layer.groups} groups"
        if layer.dilation != (1, 1) and layer.kernel_size != (1, 1):
            return f"a convolution with dilation {layer.dilation}, which PEFT's branch has not"
        if layer.padding == "same" and any(size % 2 == 0 for size in layer.kernel_size):
            return "a convolution whose padding is not the same on both sides"
    return None


def mark(layer: nn.Module, y: Tensor, x: Tensor, bank: int, site: int) -> Tensor:
    """The marker behind ``layer``, which computed ``y`` from ``x``."""
    described = describe(layer, y)
    if described is None:
        return torch.ops.lorafx.site.default(y, x, bank, site)
    return torch.ops.lorafx.layer_site.default(y, x, *described, bank, site)


def kind_of(layer: nn.Module) -> str | None:
    """ "embedding", "conv2d", or None for a linear layer."""
    return next((kind for kind, cls in KINDS.items() if isinstance(layer, cls)), None)


def describe(layer: nn.Module, y: Tensor) -> tuple[Tensor | None, str, list[int]] | None:
    """factor, kind and window (``kernels/layer_ops.py``); None for a linear layer. ``y``: an output of the layer"""
    if isinstance(layer, nn.Embedding):
        return _embed_scale(layer, y), "embedding", []
    if isinstance(layer, nn.Conv2d):
        return None, "conv2d", [*layer.kernel_size, *layer.stride, *_padding(layer)]
    return None


def _embed_scale(layer: nn.Embedding, y: Tensor) -> Tensor | None:
    """What a scaled embedding (Gemma's) multiplies by, and PEFT its delta too (BaseTunerLayer._get_embed_scale)."""
    scale: Any = getattr(layer, "embed_scale", None)
    if isinstance(scale, (int, float)):
        return torch.full((), scale, dtype=layer.weight.dtype, device=y.device)
    return scale


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        return tuple(size // 2 for size in layer.kernel_size)
    return layer.padding
