"""A larger store, for an adapter that does not fit the one that there is."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lorafx.adapters import AdapterWeights
from lorafx.store import PackedStore, Site

RESERVED_BY = {  # by whether they are parameters, which target_modules can't name
    False: "target_modules reserves room there",
    True: "room for weights of experts and routers comes with an adapter of them given to lorafx.compile, with"
    " max_adapters",
}


def why_larger(store: PackedStore, adapter: AdapterWeights) -> str:
    """What ``store`` has no place for."""
    missing = {path: shape for path, shape in adapter.shapes.items() if path not in store.index}
    if missing:
        of_parameters = {bool(shape.experts) for shape in missing.values()}
        cures = [cure for which, cure in RESERVED_BY.items() if which in of_parameters]
        return (
            f"adapter {adapter.name!r} adapts {len(missing)} layer(s) that none did before, such as"
            f" {next(iter(missing))} ({'; '.join(cures)})"
        )
    if not store.takes_dora(adapter.shapes):
        return f"adapter {adapter.name!r} has DoRA on layers where none had it before"
    if not store.takes_late(adapter):
        return f"adapter {adapter.name!r} is aLoRA on layers where none was before"
    return f"adapter {adapter.name!r} needs more room than was reserved (max_adapters, max_rank reserve it)"


def larger(
    old: PackedStore, names: Mapping[int, str], adapter: AdapterWeights, slot: int | None, root: nn.Module
) -> PackedStore:
    """A new store with what ``old`` holds of ``names`` (by slot), and with ``adapter`` in ``slot`` (None: a new one).

    root: the model that the sites are of, which DoRA asks for norms
    """
    weights = {at: old.adapter(at, name) for at, name in names.items()}
    slots = old.slots if slot is not None else old.slots + 1
    weights[slot if slot is not None else old.slots] = adapter
    sites = {site.name: site for site in old.sites}
    for path, site in adapter.sites.items():
        sites.setdefault(path, Site(path, site.a.shape[1], site.b.shape[0], site.experts))
    capacities = {g.name: g.capacity for g in old.geometry}
    biases = {g.name: g.biases for g in old.geometry}
    for path in sites:
        here = [w.sites[path] for w in weights.values() if path in w.sites]
        capacities[path] = max(capacities.get(path, 0), sum(s.rank for s in here))
        biases[path] = max(biases.get(path, 0), sum(s.bias is not None for s in here))
    dora = {*(old.dora.sites if old.dora is not None else ())}
    dora.update(path for path, shape in adapter.shapes.items() if shape.dora)
    late = old.late.union(adapter.sites if adapter.invocation else ())
    memory = old.storage.dtype, old.storage.device
    store = PackedStore(list(sites.values()), capacities, biases, slots, *memory, (root, dora), late)
    for at, held in weights.items():
        store.put(at, held)
    return store
