"""Layers of PEFT's while lorafx runs them: PEFT's own class, with the branch left to lorafx when it is traced.

``ADAPTED`` says which class of PEFT's becomes which of ours. Another kind of layer is another line in it; those on
quantised layers come into it when one is met (``adapted_quantised.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from lorafx import adapted_quantised, hotswap
from lorafx.adapters import SiteWeights
from lorafx.bank import AdapterBank
from lorafx.errors import UnsupportedModelError
from lorafx.selection import Selection
from lorafx.sites import apply_site, check_rows


class Adapted(nn.Module):  # a layer takes this class in place of PEFT's, which asks for nn.Module's memory layout
    """What stands before PEFT's own class: base layer, then marker, while it is traced; eagerly, what PEFT does."""

    _lorafx_bank: AdapterBank
    _lorafx_site: int
    _lorafx_spoken: object  # another one after each set_adapter that PEFT did not call by itself
    _lorafx_drops: bool  # any of its adapters has dropout

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if any(kwargs.get(name) is not None for name in ("adapter_names", "alora_offsets")):
            return super().forward(x, *args, **kwargs)
        if torch.compiler.is_compiling():
            if needs_gradients(self):  # the branch finder takes PEFT's own branches, with their parameters
                return super().forward(x, *args, **kwargs)
            y = self.base_layer(x, *args, **kwargs)
            return torch.ops.lorafx.site.default(y, x, self._lorafx_bank.key, self._lorafx_site)
        chosen = self._lorafx_bank.chosen
        if chosen is None or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        if self.merged:
            raise UnsupportedModelError(
                f"{', '.join(self.merged_adapters)} is merged into the base weights, which every row reads;"
                " unmerge_adapter() before choosing adapters with model.lora.use or adapter_names."
            )
        if needs_gradients(self):
            return self._with_gradients(chosen, x, *args, **kwargs)
        return apply_site(self._lorafx_bank, self._lorafx_site, self.base_layer(x, *args, **kwargs), x)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's; and whoever speaks last decides, so it is marked. PEFT also calls it by itself, when adapters are
        loaded or enabled: with the list that is active already, or one like it of one name."""
        current = self._active_adapter
        repeated = adapter_names is current or (adapter_names == current and len(adapter_names) == 1)
        super().set_adapter(adapter_names, inference_mode)
        if not repeated:
            self._lorafx_spoken = object()

    def _with_gradients(self, selection: Selection, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The selection row by row, through PEFT's own modules, so that every gradient is there."""
        check_rows(self._lorafx_bank, self._lorafx_site, x, len(selection))
        y = self.base_layer(x, *args, **kwargs)
        rows = torch.arange(x.shape[0], device=x.device) * len(selection) // x.shape[0]
        result = y
        for i, row in enumerate(selection):
            mine = (rows == i).view(-1, *[1] * (y.dim() - 1))
            for name, weight in row:
                if name in self.lora_A:
                    lora_a, lora_b = self.lora_A[name], self.lora_B[name]
                    hidden = self.lora_dropout[name](self._cast_input_dtype(x, lora_a.weight.dtype))
                    delta = lora_b(lora_a(hidden)) * (self.scaling[name] * weight)
                    result = result + torch.where(mine, delta, 0)
        return result.to(y.dtype)


class AdaptedLinear(Adapted, PeftLinear):
    """PEFT's LoRA layer on a linear layer."""


ADAPTED: dict[type[LoraLayer], type[Adapted]] = {PeftLinear: AdaptedLinear}
PLAIN = {ours: theirs for theirs, ours in ADAPTED.items()}


def is_supported(layer: object) -> bool:
    """Whether there is a class of ours for it, or it has it already. Subclasses of PEFT's may do anything."""
    adapted_quantised.learn(type(layer))
    return type(layer) in ADAPTED or type(layer) in PLAIN


def adapt(layer: LoraLayer, bank: AdapterBank, site: int) -> None:
    """Give ``layer`` the class of ours, and its place in the bank."""
    hotswap.mend(Adapted)
    layer.__class__ = ADAPTED.get(type(layer), type(layer))
    vars(layer).update(_lorafx_bank=bank, _lorafx_site=site)
    vars(layer).setdefault("_lorafx_spoken", object())


def release(layer: Adapted) -> None:
    """Undo ``adapt``."""
    layer.__class__ = PLAIN[type(layer)]
    for name in ("_lorafx_bank", "_lorafx_site", "_lorafx_spoken", "_lorafx_drops"):
        vars(layer).pop(name, None)


def weights_of(layer: LoraLayer, name: str) -> SiteWeights:
    """The adapter ``name`` of this layer; the weights are the parameters' own memory."""
    bias = layer.lora_B[name].bias
    return SiteWeights(
        layer.lora_A[name].weight.detach(),
        layer.lora_B[name].weight.detach(),
        None if bias is None else bias.detach(),
        float(layer.scaling[name]),
    )


def needs_gradients(layer: LoraLayer) -> bool:
    """Whether PEFT's own branch has to run: its weights take part in a backward, or its dropout is active."""
    # diffusers leaves its layers in training mode; what is read while traced is guarded, and adapters come and go
    drops = layer.training and getattr(layer, "_lorafx_drops", True)
    if drops and any(getattr(drop, "p", 0) > 0 for drop in layer.lora_dropout.values()):
        return True
    return torch.is_grad_enabled() and any(
        p.requires_grad
        for part in (layer.lora_A, layer.lora_B)
        for module in part.values()
        for p in module.parameters()
    )
