"""An adapter as plain data: what reading makes and the bank packs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lorafx.errors import AdapterFormatError


@dataclass(frozen=True)
class SiteWeights:
    """One adapted layer: ``y + scale * ((x @ a.T) @ b.T + bias)``.

    a: ``[rank, in]``; b: ``[out, rank]``; bias: ``[out]`` or None (PEFT's ``lora_bias``); scale: alpha / rank, or
    alpha / sqrt(rank) with rsLoRA, as PEFT computed it
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def tensors(self) -> list[Tensor]:
        return [self.a, self.b] + ([] if self.bias is None else [self.bias])


@dataclass(frozen=True)
class AdapterWeights:
    """All adapted layers of one adapter, by the path of the layer in the base model."""

    name: str
    sites: dict[str, SiteWeights]

    @cached_property
    def ranks(self) -> list[int]:
        """The different ranks, ascending."""
        return sorted({site.rank for site in self.sites.values()})

    def elements(self) -> int:
        return sum(t.numel() for site in self.sites.values() for t in site.tensors())

    def check_finite(self) -> None:
        """NaN and Inf are refused: in a bank that is masked by zeros they would reach other rows of the batch."""
        for path, site in self.sites.items():
            for label, tensor in (("A", site.a), ("B", site.b), ("bias", site.bias)):
                if tensor is not None and not torch.isfinite(tensor).all():
                    raise AdapterFormatError(
                        f"adapter {self.name!r}: {label} of {path} holds NaN or Inf. lorafx takes finite weights only;"
                        " the file is damaged or its training diverged."
                    )
