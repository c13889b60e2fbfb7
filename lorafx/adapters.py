"""An adapter as plain data: what reading makes and the bank packs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy
import torch
from torch import Tensor

from lorafx.errors import AdapterFormatError
from lorafx.packing import Layout, layout_of

TOKENS = "token_indices"  # beside the tensors of a module, where rows of its weight are brought, not a copy of it


@dataclass(frozen=True)
class SiteShape:
    """What one adapted layer takes, known before any weight is read."""

    rank: int
    in_features: int
    out_features: int
    bias: bool
    scale: float
    dora: bool = False
    experts: int = 0  # whose rank rows these are together; 0: a layer; 1: a parameter that is a linear layer's weight

    @property
    def elements(self) -> int:
        return self.rank * (self.in_features + self.out_features) + (self.bias + self.dora) * self.out_features


@dataclass(frozen=True)
class Magnitude:
    """What a DoRA adapter has at one layer besides A and B.

    weight: ``[out]``; tables: where it is PEFT's, the ``_parameters`` of its module, of A's and of B's, in which edits
    in place are noticed
    """

    weight: Tensor
    tables: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class SiteWeights:
    """One adapted layer: ``y + scale * ((x @ a.T) @ b.T + bias)``.

    a: ``[rank, in]``; b: ``[out, rank]``; bias: ``[out]`` or None (PEFT's ``lora_bias``); scale: alpha / rank, or
    alpha / sqrt(rank) with rsLoRA, as PEFT computed it; magnitude: of DoRA (``kernels/row_factors.py`` says what it
    makes of that); experts: ``SiteShape``'s, with A and B as ``kernels/experts.py`` says
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None
    scale: float
    magnitude: Magnitude | None = None
    experts: int = 0

    @property
    def shape(self) -> SiteShape:
        bias, dora = self.bias is not None, self.magnitude is not None
        return SiteShape(self.a.shape[0], self.a.shape[1], self.b.shape[0], bias, self.scale, dora, self.experts)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def tensors(self) -> list[Tensor]:
        """What stands in packed memory."""
        return [self.a, self.b] + ([] if self.bias is None else [self.bias])

    def all_tensors(self) -> list[Tensor]:
        return self.tensors() + ([] if self.magnitude is None else [self.magnitude.weight])


def tokens_of(saved: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    """As an outline says it: of each module the tokens whose rows are there, none where it is copied."""
    return {path: tuple(each[TOKENS].tolist()) if TOKENS in each else () for path, each in saved.items()}


def rank_of(site: SiteShape | SiteWeights) -> int:
    """The rank of the adapter there: of experts each has as many rank rows."""
    return site.rank // max(site.experts, 1)


@dataclass(frozen=True)
class AdapterOutline:
    """An adapter whose weights are still to be read: enough to say whether it fits, and to refuse it for nothing.

    sites: by the path of the layer in the base model; read: the weights, packed (``AdapterWeights.packed``); layout:
    of weights that are packed already
    """

    name: str
    sites: Mapping[str, SiteShape]
    read: Callable[[], AdapterWeights] = field(repr=False)
    # modules of the model that it has its own copies of; or tokens, whose rows of the module's weight it has
    saved: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    invocation: tuple[int, ...] = ()  # aLoRA: the token ids at which it begins
    layout: Layout | None = None

    @cached_property
    def ranks(self) -> list[int]:
        """The different ranks, ascending."""
        return sorted({rank_of(site) for site in self.sites.values()})


@dataclass(frozen=True)
class AdapterWeights:
    """All adapted layers of one adapter, by the path of the layer in the base model."""

    name: str
    sites: Mapping[str, SiteWeights]
    flat: Tensor | None = field(default=None, repr=False)  # where it is packed: the memory of all sites
    layout: Layout | None = field(default=None, repr=False)  # and where each stands in it
    saved: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict, repr=False)  # own modules, by path, by name
    invocation: tuple[int, ...] = ()  # aLoRA: the token ids at which it begins

    @cached_property
    def ranks(self) -> list[int]:
        """The different ranks, ascending."""
        return sorted({rank_of(site) for site in self.sites.values()})

    @cached_property
    def shapes(self) -> dict[str, SiteShape]:
        return {path: site.shape for path, site in self.sites.items()}

    @property
    def outline(self) -> AdapterOutline:
        return AdapterOutline(self.name, self.shapes, lambda: self, tokens_of(self.saved), self.invocation)

    @cached_property
    def scales(self) -> numpy.ndarray:
        """Of each site, float32."""
        return numpy.array([site.scale for site in self.sites.values()], dtype=numpy.float32)

    @cached_property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for site in self.sites.values() for t in site.all_tensors())

    def elements(self) -> int:
        return sum(t.numel() for site in self.sites.values() for t in site.all_tensors())

    def packed(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> AdapterWeights:
        """The same numbers in one piece of memory, each B as rank rows: what the bank takes by plain copies.

        This adapter itself if it is packed, of this dtype, on this device.
        """
        if self.flat is not None and self.flat.dtype == dtype and self.flat.device == torch.device(device):
            return self
        return self._packed(dtype, device)

    @torch.no_grad()
    def _packed(self, dtype: torch.dtype, device: torch.device | str) -> AdapterWeights:
        layout = layout_of(self.shapes)
        flat = torch.empty(layout.size, dtype=dtype, device=device)
        sites = {}
        for path, site in self.sites.items():
            a, b, bias = (flat[offset:] for offset in layout.offsets[path])
            rows = b[: site.b.numel()].view(site.b.t().shape)
            sites[path] = SiteWeights(
                a[: site.a.numel()].view(site.a.shape).copy_(site.a),
                rows.copy_(site.b.t()).t(),
                None if site.bias is None else bias[: site.bias.numel()].copy_(site.bias),
                site.scale,
                site.magnitude,
                site.experts,
            )
        return AdapterWeights(self.name, sites, flat, layout, self.saved, self.invocation)

    def check_finite(self) -> None:
        """NaN and Inf are refused: in a bank that is masked by zeros they would reach other rows of the batch."""
        for path, site in self.sites.items():
            magnitude = None if site.magnitude is None else site.magnitude.weight
            for label, tensor in (("A", site.a), ("B", site.b), ("bias", site.bias), ("magnitude", magnitude)):
                if tensor is not None and not torch.isfinite(tensor).all():
                    raise AdapterFormatError(
                        f"adapter {self.name!r}: {label} of {path} holds NaN or Inf. lorafx takes finite weights only;"
                        " the file is damaged or its training diverged."
                    )
