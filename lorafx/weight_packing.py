"""bitsandbytes' 4-bit layers on a CPU that has bf16 products, which lay their weights out anew as they are called.

``Linear4bit.forward`` does so in place, in eval mode, where its input needs no gradient; ``state_dict()`` undoes it.
Inductor can't compile that, and of two threads that do it at once one finds the layer half changed. So it is done
before the model is called, by one thread. Packed layers pass no gradient on to their input, so a call with gradients
leaves it to the layers: it runs uncompiled while any is not packed.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from lorafx.interrupts import uninterrupted

PACKS_ITSELF = "support_avx512bf16_for_cpu"


class WeightPacking:
    """The layers of ``root`` that pack themselves; they are looked for at the first call."""

    def __init__(self, root: nn.Module) -> None:
        self._root, self._lock = root, threading.Lock()
        self._layers: list[nn.Module] | None = None

    def done(self) -> bool:
        """Whether a call can be compiled: no layer will change its weights in it. Packs them, without gradients."""
        if self._layers is None:
            self._layers = [layer for layer in self._root.modules() if getattr(layer, PACKS_ITSELF, False)]
        if not self._layers:
            return True
        with self._lock:  # also to look: a layer that is being packed says that it is before its weight changes
            due = [layer for layer in self._layers if _is_due(layer)]
            if due and torch.is_grad_enabled():
                return False
            with torch.inference_mode(False), torch.no_grad():
                for layer in due:
                    with uninterrupted():  # a layer half packed is a wrong one
                        _pack(layer)
        return True


def _is_due(layer: nn.Module) -> bool:
    weight = layer._parameters["weight"]
    state = getattr(weight, "quant_state", None)
    return not layer.training and weight.device.type == "cpu" and not getattr(state, "packing_format_for_cpu", False)


def _pack(layer: Any) -> None:
    """By a call with one row, past its hooks. One that takes its dtype from its first input still waits for that."""
    bias = layer._parameters.get("bias")
    known = layer.compute_dtype, layer.compute_type_is_set
    dtype = layer.compute_dtype or (torch.float32 if bias is None else bias.dtype)
    type(layer).forward(layer, torch.zeros(1, layer.in_features, dtype=dtype))
    layer.compute_dtype, layer.compute_type_is_set = known
