"""How much room a bank is made with: for the adapters that are given, and for those that are to come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from lorafx import peft_layers
from lorafx.adapters import AdapterOutline, AdapterWeights, SiteShape
from lorafx.dora import base_layer, unreadable
from lorafx.errors import AdapterMismatchError, CapacityError, LorafxError, UnsupportedModelError
from lorafx.fused_layers import Fusions
from lorafx.layer_kinds import why_not, widths_of
from lorafx.store import PackedStore, Site


def bank_dtype(root: nn.Module) -> torch.dtype:
    """float32, as PEFT keeps adapters beside a float32, bf16 or fp16 base; float64 beside a float64 base."""
    doubles = any(p.dtype == torch.float64 for p in root.parameters())
    return torch.float64 if doubles else torch.float32


def make_store(
    root: nn.Module,
    weights: Sequence[AdapterWeights],
    *,
    max_adapters: int | None = None,
    max_rank: int | None = None,
    target_modules: Iterable[str] | str | None = None,
    others: Sequence[AdapterOutline] = (),
    fusions: Fusions | None = None,
) -> PackedStore:
    """An empty store with room for ``weights`` and for what is reserved.

    fusions: which layers are fused; what is none of the model's own layers is a part of one of these
    others: adapters of which any may come: as many of them as there are slots left then fit, whichever they are

    LorafxError: arguments that contradict each other, layers that the model has not
    """
    for name, value in (("max_adapters", max_adapters), ("max_rank", max_rank)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise LorafxError(f"got {name}={value!r}; expected a whole number of at least 1")
    if max_adapters is not None and len(weights) > max_adapters:
        raise CapacityError(f"{len(weights)} adapters for max_adapters={max_adapters}")
    largest = max((adapter.ranks[-1] for adapter in weights if adapter.ranks), default=None)
    if max_rank is not None and largest is not None and largest > max_rank:
        raise CapacityError(f"an adapter has rank {largest}, max_rank is {max_rank}")
    slots = max(max_adapters or 0, len(weights), 1)
    parts = fusions.sizes(root) if fusions is not None else {}
    reserved = set(_targets(root, target_modules, parts))
    rank = max_rank or largest or 0
    coming = _coming(others, slots - len(weights), max_rank)
    sites, capacities, biases = [], {}, {}
    given = {path for adapter in weights for path in adapter.sites}
    modules = dict(root.named_modules())
    wanted = given | reserved | coming.keys()
    places = dict.fromkeys([*modules, *parts, *(path for adapter in weights for path in adapter.sites), *coming])
    for path in filter(wanted.__contains__, places):
        here = [adapter.shapes[path] for adapter in weights if path in adapter.sites]
        known = here + coming.get(path, [])
        shape = (known[0].in_features, known[0].out_features) if known else parts.get(path)
        shape = shape or linear_shape(modules[path], path)
        experts = known[0].experts if known else 0
        sites.append(Site(path, *shape, experts))
        asked = path in reserved or (path in given and (max_adapters is not None or target_modules is not None))
        whole = slots * rank * max(experts, 1) if asked else 0  # any of them may be replaced by one of that rank
        capacities[path] = max(whole, sum(site.rank for site in known))
        biases[path] = slots if asked and any(site.bias for site in known) else sum(site.bias for site in known)
    sample = next((site for adapter in weights for site in adapter.sites.values()), None)
    parameter = next(root.parameters(), None)
    dtype = sample.a.dtype if sample is not None else bank_dtype(root)
    device = parameter.device if parameter is not None else torch.device("cpu")
    dora = {
        path
        for shapes in (*(a.shapes for a in weights), *(a.sites for a in others))
        for path in shapes
        if shapes[path].dora
    }
    if dora and (max_adapters is not None or target_modules is not None):
        dora = {path for path in capacities if unreadable(base_layer(root, path)) is None}  # any that room is for
    late = {path for adapter in (*weights, *others) if adapter.invocation for path in adapter.sites}
    if late and (max_adapters is not None or target_modules is not None):
        late = set(capacities)
    return PackedStore(sites, capacities, biases, slots, dtype, device, (root, dora), late)


def _coming(others: Sequence[AdapterOutline], slots: int, max_rank: int | None) -> dict[str, list[SiteShape]]:
    """For each layer the shapes of the ``slots`` adapters that take most there: no other choice of them takes more."""
    shapes: dict[str, list[SiteShape]] = {}
    for adapter in others:
        if max_rank is None or not adapter.ranks or adapter.ranks[-1] <= max_rank:
            for path, shape in adapter.sites.items():
                shapes.setdefault(path, []).append(shape)
    return {path: _largest(here, slots) for path, here in shapes.items()}


def _largest(shapes: list[SiteShape], count: int) -> list[SiteShape]:
    """The ``count`` of largest rank; a bias counts apart, so as many of those with one come first."""
    ranks = sorted((s.rank for s in shapes), reverse=True)[:count]
    biases = sum(s.bias for s in shapes)
    first = shapes[0]
    return [
        SiteShape(rank, first.in_features, first.out_features, i < biases, first.scale, experts=first.experts)
        for i, rank in enumerate(ranks)
    ]


def _targets(root: nn.Module, target_modules: Iterable[str] | str | None, parts: Iterable[str]) -> list[str]:
    """Layers named by ``target_modules``, as PEFT matches names: the end of the path."""
    if target_modules is None:
        return []
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if wanted == ["all-linear"]:
        return peft_layers.all_linear(root)
    paths = [*(path for path, _ in root.named_modules()), *parts]
    found = [path for path in paths if any(path == name or path.endswith(f".{name}") for name in wanted)]
    missing = [name for name in wanted if not any(path == name or path.endswith(f".{name}") for path in found)]
    if missing:
        raise AdapterMismatchError(
            f"target_modules names {missing[0]!r}, which {type(root).__name__} has no layer of; expected the end of"
            " a module's path, such as 'q_proj'"
        )
    return found


def linear_shape(module: nn.Module, path: str) -> tuple[int, int]:
    """(in, out) of a layer that can be adapted, whatever class it is of."""
    reason = why_not(module)
    widths = widths_of(module) if reason is None else None
    if widths is None:
        raise UnsupportedModelError(
            f"{path} is {reason or f'a {type(module).__name__}'}, no layer that lorafx adapts; room can't be reserved"
            " there"
        )
    return widths
