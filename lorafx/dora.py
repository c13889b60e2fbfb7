"""DoRA: the factors that the rows of a layer's output are multiplied by, computed once for each change of a weight.

A DoRA adapter holds a magnitude for each output of a layer; PEFT computes at every call the norm of each row of
``W + scale * B @ A`` and takes ``m = magnitude / norm`` (``peft/tuners/lora/dora.py``). Here ``m - 1`` is kept, one row
for each slot, and computed anew only where what it is made of has changed. See ``kernels/row_factors.py`` for its use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafx.adapters import AdapterWeights, Magnitude, SiteShape, SiteWeights
from lorafx.errors import UnsupportedModelError

BLOCK = 1 << 22  # numbers of W + scale * B @ A that are there at once

Parameters = Mapping[str, Any]  # `_parameters` of a module


@dataclass
class Held:
    """One adapter at one layer: what its factors were computed from. ``stamps``: as it was then."""

    magnitude: Magnitude
    scale: float
    fixed: tuple[Parameters, ...]  # the layer's own weight, the magnitude: watched, and where they are
    moving: tuple[Parameters, ...]  # A and B, which are views of the bank: where they are is watched by others
    stamps: list[Any] | None = None

    def read(self) -> list[Any]:
        fixed = [table["weight"] for table in self.fixed]
        tensors = fixed + [table["weight"] for table in self.moving]
        return [*tensors, *map(Tensor.data_ptr, fixed), *map(_version, tensors)]

    def is_of(self, other: Held) -> bool:
        """The same parameters of PEFT's, unchanged since: so are the factors."""
        tables = self.fixed + self.moving, other.fixed + other.moving
        return bool(self.moving) and self.scale == other.scale and all(map(is_, *tables)) and self.holds()

    def holds(self) -> bool:
        now = self.read()
        count = len(self.fixed) + len(self.moving)
        return (
            self.stamps is not None and all(map(is_, now[:count], self.stamps)) and now[count:] == self.stamps[count:]
        )


class Dora:
    """The factors of a store's sites, and which adapters have any.

    root: the model, whose weights are read; sites: output features of those that DoRA may stand on, by path
    factors: flat; of each site ``[slots + 1, out]``, zero where a slot has no DoRA, and in the last row
    """

    @torch.inference_mode(False)
    def __init__(
        self, root: nn.Module, sites: Mapping[str, int], slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.root, self.sites, self.slots = root, dict(sites), slots
        self.places: dict[str, tuple[int, int]] = {}  # rows, and where they begin
        start = 0
        for path, out in self.sites.items():
            self.places[path] = slots + 1, start
            start += (slots + 1) * out
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.factors = torch.zeros(start, dtype=wide, device=device)
        self.held: list[dict[str, Held]] = [{} for _ in range(slots)]
        self.computed = 0  # how many rows of factors were computed

    @torch.inference_mode(False)
    def to(self, device: torch.device) -> None:
        self.factors = self.factors.to(device)
        for held in self._all():
            if not held.magnitude.tables:  # ours; PEFT's go with the model
                held.magnitude = Magnitude(held.magnitude.weight.to(device))
                held.fixed = held.fixed[0], {"weight": held.magnitude.weight}

    def table(self, path: str) -> Tensor:
        """``[slots + 1, out]``, a view."""
        rows, start = self.places[path]
        return self.factors[start : start + rows * self.sites[path]].view(rows, self.sites[path])

    # ------------------------------------------------------------------------------------------ changing

    @contextmanager
    def putting(self, slot: int, adapter: AdapterWeights) -> Iterator[None]:
        """Slot ``slot`` holds ``adapter``'s factors inside and after; if what is done inside fails, the old ones."""
        new, rows, before = {}, {}, self.held[slot]
        for path, site in adapter.sites.items():
            if site.magnitude is None:
                continue
            new[path] = self._held_for(path, site)
            if path in before and before[path].is_of(new[path]):
                new[path], rows[path] = before[path], self.table(path)[slot].clone()
            else:
                rows[path] = self._row(path, new[path], site.a, site.b)
        old = {path: self.table(path)[slot].clone() for path in before.keys() | new.keys()}
        try:
            self._write(slot, new, {**dict.fromkeys(before, 0.0), **rows})
            yield
        except BaseException:
            self._write(slot, before, old)
            raise

    def clear(self, slot: int) -> None:
        self._write(slot, {}, dict.fromkeys(self.held[slot], 0.0))

    def _write(self, slot: int, held: dict[str, Held], rows: Mapping[str, Tensor | float]) -> None:
        for path, row in rows.items():
            target = self.table(path)[slot]
            target.copy_(row) if isinstance(row, Tensor) else target.fill_(row)
        self.held[slot] = held

    def rescale(self, slot: int, path: str, site: SiteWeights) -> None:
        """The scale of an adapter at one layer has changed, or anything else of it."""
        held = self.held[slot].get(path)
        if held is not None:
            held.scale, held.stamps = site.scale, None
            self.table(path)[slot].copy_(self._row(path, held, site.a, site.b))

    def changed(self, slots: Iterable[int]) -> list[tuple[int, str]]:
        """Whose weights, or the layer's own, have been edited, moved or exchanged since."""
        return [(slot, path) for slot in slots for path, held in self.held[slot].items() if not held.holds()]

    def _held_for(self, path: str, site: SiteWeights) -> Held:
        layer, tables = base_layer(self.root, path), site.magnitude.tables
        check_layer(path, layer)
        own = tables[0] if tables else {"weight": site.magnitude.weight}
        return Held(site.magnitude, site.scale, (layer._parameters, own), tables[1:])

    def _row(self, path: str, held: Held, a: Tensor, b: Tensor) -> Tensor:
        """``m - 1``, ``[out]``."""
        layer = base_layer(self.root, path)
        check_layer(path, layer)
        stamps, self.computed = held.read(), self.computed + 1
        weight, magnitude = (table["weight"] for table in held.fixed)
        if weight.is_meta:  # a model of shapes alone
            return self.factors.new_zeros(self.sites[path])
        norm = norms(weight.t() if isinstance(layer, Conv1D) else weight, a, b, held.scale, self.factors.dtype)
        factors = (magnitude.detach().to(norm) / norm - 1).to(self.factors)
        held.stamps = stamps
        return factors

    def _all(self) -> Iterator[Held]:
        return (held for slot in self.held for held in slot.values())

    @property
    def nbytes(self) -> int:
        """The factors, and the magnitudes that are not PEFT's."""
        ours = [held.magnitude.weight for held in self._all() if not held.magnitude.tables]
        return sum(t.numel() * t.element_size() for t in (self.factors, *ours))

    @property
    def reserved(self) -> int:
        """Bytes of factors that no adapter has: of slots without DoRA, and the row of zeros of each site."""
        taken = sum(self.sites[path] for slot in self.held for path in slot)
        return (self.factors.numel() - taken) * self.factors.element_size()


@torch.no_grad()
def norms(weight: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The length of each row of ``weight + scale * b @ a``, some rows at a time, so that no product is kept.

    weight: ``[out, in]``; a: ``[rank, in]``; b: ``[out, rank]``; dtype: of the products. ``[out]`` in double precision
    where the device has it: what counts in the end is how far ``m`` is from 1.
    """
    wide = torch.float64 if weight.device.type in ("cpu", "cuda", "xpu") else dtype
    rows = max(1, BLOCK // max(1, weight.shape[1]))
    a = a.to(dtype)
    parts = [
        torch.linalg.vector_norm(torch.addmm(w.to(dtype), part.to(dtype), a, alpha=scale), dim=1, dtype=wide)
        for w, part in zip(weight.detach().split(rows), b.split(rows), strict=True)
    ]
    return torch.cat(parts)


def base_layer(root: nn.Module, path: str) -> nn.Module | None:
    """The layer of the model itself; None where it has none, but computes this as a part of a fused one."""
    try:
        layer = root.get_submodule(path)
    except AttributeError:
        return None
    return getattr(layer, "base_layer", layer)


def unreadable(layer: nn.Module | None) -> str | None:
    """Why the norms of this layer's weight can't be computed; None if they can."""
    if layer is None:
        return "it is a part of a fused layer"
    weight = layer._parameters.get("weight")
    if not isinstance(layer, (nn.Linear, Conv1D)) or weight is None:
        return f"it is a {type(layer).__name__}"
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.dim() != 2:
        return f"its weight is quantised ({type(weight).__name__}, {weight.dtype})"
    return None


def check_layer(path: str, layer: nn.Module | None) -> None:
    """UnsupportedModelError: a layer whose weight can't be read, so that no norm can be computed"""
    if reason := unreadable(layer):
        raise UnsupportedModelError(
            f"DoRA on {path} needs the norms of that layer's weight, and {reason}. Use an adapter without DoRA there,"
            " or a base model that is neither quantised nor fused there."
        )


def check_layers(root: nn.Module, sites: Mapping[str, SiteShape]) -> None:
    """The same for all layers that an adapter has DoRA on, before anything is changed."""
    for path, shape in sites.items():
        if shape.dora:
            check_layer(path, base_layer(root, path))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


__all__ = ["Dora", "base_layer", "check_layer", "check_layers", "norms", "unreadable"]
