"""Layers of PEFT's while lorafx runs them: PEFT's own class, with the branch left to lorafx when it is traced.

``ADAPTED`` says which class of PEFT's becomes which of ours. Another kind of layer is another line in it; those on
quantised layers come into it when one is met (``adapted_quantised.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d as PeftConv2d
from peft.tuners.lora.layer import Embedding as PeftEmbedding
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant, DoraLinearVariant
from torch import Tensor, nn

from lorafx import adapted_quantised, hotswap
from lorafx.bank import AdapterBank
from lorafx.errors import UnsupportedModelError
from lorafx.kernels.layer_ops import rows_shape
from lorafx.layer_kinds import describe, mark
from lorafx.peft_tensors import all_parameters, names_on
from lorafx.selection import Selection
from lorafx.sites import apply_behind, apply_dora, check_rows, marked


class Adapted(nn.Module):  # a layer takes this class in place of PEFT's, which asks for nn.Module's memory layout
    """What stands before PEFT's own class: base layer, then marker, while it is traced; eagerly, what PEFT does."""

    _lorafx_bank: AdapterBank
    _lorafx_site: int
    _lorafx_spoken: object  # another one after each set_adapter that PEFT did not call by itself
    _lorafx_dora: bool  # any adapter may have DoRA here
    _lorafx_drops: bool  # any of its adapters has dropout

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if any(kwargs.get(name) is not None for name in ("adapter_names", "alora_offsets")):
            return super().forward(x, *args, **kwargs)
        if torch.compiler.is_compiling():
            if needs_gradients(self):  # the branch finder takes PEFT's own branches, with their parameters
                return super().forward(x, *args, **kwargs)
            y = self.base_layer(x, *args, **kwargs)
            if self._lorafx_dora:
                return marked(y, x, self.base_layer.bias, self._lorafx_bank.key, self._lorafx_site)
            return mark(self.base_layer, y, x, self._lorafx_bank.key, self._lorafx_site)
        bank = self._lorafx_bank
        chosen = bank.chosen
        if chosen is None and bank.late_in_use and not needs_gradients(self):
            chosen = bank.in_use  # PEFT's own forward is told where aLoRA begins by hooks, which are not there
        if chosen is None or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        if self.merged:
            raise UnsupportedModelError(
                f"{', '.join(self.merged_adapters)} is merged into the base weights, which every row reads;"
                " unmerge_adapter() before choosing adapters with model.lora.use or adapter_names."
            )
        if needs_gradients(self):
            return self._with_gradients(chosen, x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        if self._lorafx_dora:
            return apply_dora(self._lorafx_bank, self._lorafx_site, y, x, self.base_layer.bias)
        return apply_behind(self.base_layer, self._lorafx_bank, self._lorafx_site, y, x)

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
        return self._added_to(self.base_layer(x, *args, **kwargs), selection, x)

    def _added_to(self, y: Tensor, selection: Selection, x: Tensor) -> Tensor:
        """``y``, the layer's own output, and what the adapters make of ``x``."""
        described = describe(self.base_layer, y)
        shape = tuple(x.shape) if described is None else rows_shape(described[1], tuple(x.shape))
        check_rows(self._lorafx_bank, self._lorafx_site, shape, len(selection))
        leading = x.shape[0] if len(shape) > 1 else 1
        rows = torch.arange(leading, device=x.device) * len(selection) // leading
        result = y
        for i, row in enumerate(selection):
            mine = (rows == i).view(-1, *[1] * (y.dim() - 1))
            for name, weight in row:
                if isinstance(self.lora_variant.get(name), ALoraLinearVariant):
                    raise UnsupportedModelError(
                        f"adapter {name!r} is aLoRA, and its weights need gradients: what model.lora.use chooses can't"
                        " be trained. Choose it with PEFT's set_adapter, or call the model under torch.no_grad()."
                    )
                if name in self.lora_variant:
                    drawn = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
                    scaled = self.lora_variant[name].forward(self, active_adapter=name, x=drawn, result=result)
                    result = torch.where(mine, scaled, result)
                elif name in names_on(self):
                    delta = self._delta(name, x) * (self.scaling[name] * weight)
                    result = result + torch.where(mine, delta, 0)
        return result.to(y.dtype)

    def _delta(self, name: str, x: Tensor) -> Tensor:
        """What PEFT's modules make of ``x``, not scaled yet."""
        lora_a, lora_b = self.lora_A[name], self.lora_B[name]
        return lora_b(lora_a(self.lora_dropout[name](self._cast_input_dtype(x, lora_a.weight.dtype))))


class AdaptedLinear(Adapted, PeftLinear):
    """PEFT's LoRA layer on a linear layer."""


class AdaptedConv2d(Adapted, PeftConv2d):
    """PEFT's LoRA layer on a convolution."""


class AdaptedEmbedding(Adapted, PeftEmbedding):
    """PEFT's LoRA layer on an embedding, whose dropout PEFT never uses."""

    def _delta(self, name: str, x: Tensor) -> Tensor:
        delta = self._embed(x, self.lora_embedding_A[name].T) @ self.lora_embedding_B[name].T
        scale = self._get_embed_scale()
        return delta if scale is None else delta * scale.to(delta.dtype)


ADAPTED: dict[type[LoraLayer], type[Adapted]] = {
    PeftLinear: AdaptedLinear,
    PeftEmbedding: AdaptedEmbedding,
    PeftConv2d: AdaptedConv2d,
}
PLAIN = {ours: theirs for theirs, ours in ADAPTED.items()}


def is_supported(layer: object) -> bool:
    """Whether there is a class of ours for it, or it has it already. Subclasses of PEFT's may do anything."""
    adapted_quantised.learn(type(layer))
    return type(layer) in ADAPTED or type(layer) in PLAIN


def other_variants(layer: LoraLayer) -> list[str]:
    """Kinds of LoRA on this layer that are neither plain LoRA nor DoRA nor aLoRA, each once."""
    fused = (DoraLinearVariant, ALoraLinearVariant)
    return sorted({type(v).__name__ for v in layer.lora_variant.values() if type(v) not in fused})


def has_dora(layer: LoraLayer) -> bool:
    return any(type(v) is DoraLinearVariant for v in layer.lora_variant.values())


def adapt(layer: LoraLayer, bank: AdapterBank, site: int) -> None:
    """Give ``layer`` the class of ours, and its place in the bank."""
    hotswap.mend(Adapted)
    dora = bank.store.dora is not None and bank.store.sites[site].name in bank.store.dora.sites
    vars(layer).update(_lorafx_bank=bank, _lorafx_site=site, _lorafx_dora=dora)
    vars(layer).setdefault("_lorafx_spoken", object())
    layer.__class__ = ADAPTED.get(type(layer), type(layer))  # the last: what stops us before leaves a layer of PEFT's


def release(layer: Adapted) -> None:
    """Undo ``adapt``."""
    layer.__class__ = PLAIN[type(layer)]
    for name in ("_lorafx_bank", "_lorafx_site", "_lorafx_dora", "_lorafx_spoken", "_lorafx_drops"):
        vars(layer).pop(name, None)


def needs_gradients(layer: LoraLayer) -> bool:
    """Whether PEFT's own branch has to run: its weights take part in a backward, or its dropout is active."""
    # diffusers leaves its layers in training mode; what is read while traced is guarded, and adapters come and go
    drops = layer.training and getattr(layer, "_lorafx_drops", True)
    if drops and any(getattr(drop, "p", 0) > 0 for drop in layer.lora_dropout.values()):
        return True
    if not torch.is_grad_enabled():  # what is read below would be guarded
        return False
    magnitudes = (p for module in layer.lora_magnitude_vector.values() for p in module.parameters())
    return any(p.requires_grad for p in (*all_parameters(layer), *magnitudes))
