"""What fused groups cost in work and memory, beside separate branches: counted from shapes, for ``lorafx.explain``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from lorafx.bank import AdapterBank
from lorafx.kernels import cost
from lorafx.kernels.cost import GPUS, Cost, GroupShape
from lorafx.passes.record import FusedBranch, FusedGroup
from lorafx.store import PackedStore


@dataclass(frozen=True)
class Ranks:
    """loaded: the different ranks of the adapters at one layer, ascending; rows: rank rows there, room included"""

    loaded: tuple[int, ...]
    rows: int

    @property
    def highest(self) -> int:
        return max(self.loaded, default=0)


def ranks_in_bank(store: PackedStore) -> dict[str, Ranks]:
    """By the path of the layer."""
    loaded: dict[str, set[int]] = {site.name: set() for site in store.sites}
    for held in store.taken:
        for path, window in held.items():
            loaded[path].add(window.rank // max(store.sites[store.index[path]].experts, 1))
    return {g.name: Ranks(tuple(sorted(loaded[g.name])), g.capacity) for g in store.geometry}


def ranks_in_graph(branch: FusedBranch) -> Ranks:
    """Of a branch whose weights stood in the graph."""
    return Ranks(() if branch.rank is None else (branch.rank,), branch.rank or 0)


@dataclass(frozen=True)
class WorkTable:
    """The adapted layers with no LoRA, with separate branches, and fused; for the adapter of the highest ranks."""

    tokens: int
    without: Cost
    separate: Cost
    fused: Cost
    gpu: str | None = None

    @property
    def title(self) -> str:
        calls = f"{self.tokens:,} token{'s' if self.tokens > 1 else ''}"
        end = f"; least time: the roofline of one {GPUS[self.gpu].name}, from its data sheet" if self.gpu else ""
        return f"the adapted layers, {calls}, highest ranks loaded (counted from shapes, not measured{end})"

    def rows(self) -> list[dict[str, Any]]:
        """One row each, numbers as they are."""
        kinds = {"no LoRA": self.without, "separate branches": self.separate, "lorafx": self.fused}
        rows = [{"": name, "ops": c.launches, "FLOPs": c.flops, "bytes moved": c.bytes} for name, c in kinds.items()]
        for row, c in zip(rows, kinds.values(), strict=True):
            if self.gpu:
                row["least time"] = f"{GPUS[self.gpu].least_seconds(c) * 1e6:,.1f} us"
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        kinds = {"without": self.without, "separate": self.separate, "fused": self.fused}
        return {"tokens": self.tokens, "gpu": self.gpu, **{name: vars(c) for name, c in kinds.items()}}


def work_of(
    groups: Sequence[FusedGroup],
    ranks: Callable[[FusedBranch], Ranks],
    tokens: int,
    bank_itemsize: int,
    folded: bool,
    gpu: str | None,
    late: Collection[str] = (),
) -> WorkTable | None:
    """Of the groups of linear layers. None: there is none, or one of unknown widths (a graph without shapes). late: the
    layers that aLoRA may stand on, which are never folded"""
    groups = [group for group in groups if group.op in ("routed_lora", "fused_lora")]
    known = all(None not in (branch.in_features, branch.out_features) for g in groups for branch in g.branches)
    if not groups or not known:
        return None
    without = separate = fused = Cost()
    for group in groups:
        held = [ranks(branch) for branch in group.branches]
        shape = GroupShape(
            tokens,
            group.branches[0].in_features,
            tuple(branch.out_features for branch in group.branches),
            tuple(one.highest for one in held),
            tuple(one.rows for one in held),
            group.itemsize,
            bank_itemsize,
        )
        without += cost.layers(shape)
        separate += cost.separate(shape)
        here = folded and not any(branch.name in late for branch in group.branches)
        fused += cost.fused(shape, group.lowering, here and _is_folded(group, shape, gpu))
    return WorkTable(tokens, without, separate, fused, gpu)


def _is_folded(group: FusedGroup, shape: GroupShape, gpu: str | None) -> bool:
    """Where layers are folded at all, those of this group are."""
    if group.lowering == "triton":
        named = GPUS[gpu or "h100"]
        return group.itemsize == 2 and cost.fold_pays(named, shape.tokens, shape.in_features, shape.widths, 2)
    return group.lowering == "cpp"


@dataclass(frozen=True)
class Memory:
    """Bytes. weights: of the adapters, as they are; tables: what says where they stand; room: reserved, nobody's yet;
    total: all of it; padded: what the same adapters would take if each group had one B with its zeros stored, as fused
    servers began (None before a graph was seen)"""

    adapters: int
    weights: int
    tables: int
    room: int
    total: int
    padded: int | None

    def sentence(self) -> str:
        """For people."""
        said = (
            f"memory: {self.adapters} adapter(s) of {self.weights:,} bytes, no zero stored; the bank adds"
            f" {_percent(self.tables, self.weights)} of tables and {self.room:,} bytes of reserved room"
        )
        if self.padded is not None:
            said += f"; with zeros stored in B it would be {_percent(self.padded - self.weights, self.weights)} more"
        return said


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole if whole else 0:.1f} %"


def memory_of(bank: AdapterBank, groups: Sequence[FusedGroup] | None) -> Memory:
    """What the bank holds now. groups: those that were fused, None before that"""
    store = bank.store
    item = store.storage.element_size()
    shapes = {site.name: site for site in store.sites}
    weights = zeros = 0
    for held in store.taken:
        for path, window in held.items():
            site = shapes[path]
            bias = site.out_features if window.bias_row >= 0 else 0
            weights += window.rank * (site.in_features + site.out_features) + bias
        for group in groups or ():
            own = [(held[b.name].rank, shapes[b.name].out_features) for b in group.branches if b.name in held]
            rank, width = sum(r for r, _ in own), sum(n for _, n in own)
            zeros += rank * width - sum(r * n for r, n in own)
    tables = store.nbytes - store.reserved - weights * item
    padded = None if groups is None else (weights + zeros) * item
    return Memory(len(bank), weights * item, tables, store.reserved, store.nbytes, padded)
