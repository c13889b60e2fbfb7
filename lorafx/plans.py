"""Where each tensor of an adapter's file belongs: found out once for all files of one structure.

Found out by identity, not by names: see ``skeletons.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain

from torch import Tensor

from lorafx.adapters import AdapterWeights, Magnitude, SiteShape, SiteWeights, tokens_of
from lorafx.errors import AdapterMismatchError
from lorafx.packing_files import Packing, packing_of
from lorafx.peft_tensors import flattened
from lorafx.skeletons import Loaded, lora_parameters, weights_on
from lorafx.token_rows import with_tokens


@dataclass(frozen=True)
class PlannedSite:
    """Which tensors of the file one layer takes, and what that makes of it."""

    a: str
    b: str
    bias: str | None
    shape: SiteShape
    magnitude: str | None = None

    def weights(self, take: Callable[[str], Tensor]) -> SiteWeights:
        bias, magnitude = (None if key is None else take(key) for key in (self.bias, self.magnitude))
        own = None if magnitude is None else Magnitude(magnitude)
        a, b = flattened(take(self.a)), flattened(take(self.b))
        return SiteWeights(a, b, bias, self.shape.scale, own, self.shape.experts)


@dataclass(frozen=True)
class Plan:
    """sites: by the path of the layer; base: which tensors are weights of the base model, and which of them
    starts: where each tensor begins in a file that has them in this order, in one piece
    saved: which tensors are those of modules that the adapter has copies of, by path, by name; tokens: or which rows
    of their weights

    PEFT saves the base weight of an adapted output head with the adapter, and writes it over the model's.
    """

    sites: Mapping[str, PlannedSite]
    base: Mapping[str, str]
    starts: Mapping[str, int]
    saved: Mapping[str, Mapping[str, str]]
    tokens: Mapping[str, Tensor]

    @cached_property
    def shapes(self) -> dict[str, SiteShape]:
        return {path: site.shape for path, site in self.sites.items()}

    def saved_from(self, take: Callable[[str], Tensor]) -> dict[str, dict[str, Tensor]]:
        taken = {path: {name: take(key).clone() for name, key in named.items()} for path, named in self.saved.items()}
        return with_tokens(taken, self.tokens)

    @cached_property
    def saved_outline(self) -> dict[str, tuple[int, ...]]:
        return tokens_of(with_tokens({path: {} for path in self.saved}, self.tokens))

    def with_magnitudes(self, weights: AdapterWeights, take: Callable[[str], Tensor]) -> AdapterWeights:
        """``weights``, which were packed, with what DoRA has beside them."""
        keys = {path: site.magnitude for path, site in self.sites.items() if site.magnitude is not None}
        if not keys:
            return weights
        sites = {
            path: replace(site, magnitude=Magnitude(take(keys[path]).clone())) if path in keys else site
            for path, site in weights.sites.items()
        }
        return replace(weights, sites=sites)

    @cached_property
    def packing(self) -> Packing:
        start = self.starts.get
        return packing_of(
            self.shapes, {path: (start(site.a), start(site.b), start(site.bias)) for path, site in self.sites.items()}
        )


def plan_of(name: str, loaded: Loaded, tensors: Mapping[str, Tensor]) -> Plan | None:
    """Where each of ``tensors``, which were new meta tensors, went. None: PEFT has made others of some.

    AdapterMismatchError: two are the same weight
    """
    names = {_identity(tensor): key for key, tensor in tensors.items()}
    lora = {key: names.get(_identity(tensor)) for key, tensor in lora_parameters(loaded.layers).items()}
    base = {names.get(_identity(tensor)): path for path, tensor in loaded.base.items()}
    saved = {
        path: {key: names.get(_identity(tensor)) for key, tensor in named.items()}
        for path, named in loaded.saved.items()
    }
    taken = [key for named in saved.values() for key in named.values()]
    if None in lora.values() or None in base or None in taken:
        return None
    left = tensors.keys() - {*lora.values(), *base, *taken}
    if left:
        raise AdapterMismatchError(
            f"adapter {name!r} has {len(left)} tensor(s) that are loaded nowhere, for example {min(left)!r}: another"
            " one is the same weight under another name. Expected each weight once; take one of them out."
        )
    sites = {
        path: PlannedSite(
            lora[path, "A"], lora[path, "B"], lora.get((path, "bias")), site.shape, lora.get((path, "magnitude"))
        )
        for path, site in weights_on(loaded).items()
    }
    ends = accumulate(tensor.numel() for tensor in tensors.values())
    return Plan(sites, base, dict(zip(tensors, chain([0], ends), strict=False)), saved, loaded.tokens)


def _identity(tensor: Tensor) -> tuple:
    """Equal for two tensors that are one: memory (or what stands for it on meta), order, and never written to."""
    memory = tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.dtype, tensor._version
    return *memory, *tensor.shape, *tensor.stride()
