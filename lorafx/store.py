"""The bank's memory: every adapter's weights in one flat tensor, no zero stored, and the tables that find them.

For each site (an adapted layer) there is a block of rank rows of A and one of B; an adapter takes as many rows of each
as its rank there, none where it does not adapt that layer. Sites that may become one group (same parent, same input
width) stand next to each other, so the group's A's are one matrix without any copy. See ``kernels/ops.py`` for a
worked example of the tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafx.adapters import AdapterWeights
from lorafx.errors import CapacityError
from lorafx.passes.context import SiteGeometry

ALIGNMENT = 16  # elements: 64 bytes in float32, what a vector load and a cache line want


@dataclass(frozen=True)
class Site:
    """A layer that can be adapted."""

    name: str
    in_features: int
    out_features: int

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Window:
    """The rows of one adapter at one site: ``start .. start + rank`` of A and B, and the row of B with its bias."""

    start: int
    rank: int
    bias_row: int = -1


def order_sites(sites: Iterable[Site]) -> list[Site]:
    """Possible siblings next to each other, otherwise as they come."""
    buckets: dict[tuple[str, int], list[Site]] = {}
    for site in sites:
        buckets.setdefault((site.parent, site.in_features), []).append(site)
    return [site for bucket in buckets.values() for site in bucket]


def plan(sites: Sequence[Site], capacities: Mapping[str, int], biases: Mapping[str, int]) -> list[SiteGeometry]:
    """Where each site's blocks stand; ``sites`` as ``order_sites`` gives them. Pure."""

    def up(offset: int) -> int:
        return -(-offset // ALIGNMENT) * ALIGNMENT

    geometry: list[SiteGeometry] = []
    offset = lane = 0
    position = 0
    while position < len(sites):
        key = (sites[position].parent, sites[position].in_features)
        bucket = [s for s in sites[position:] if (s.parent, s.in_features) == key]
        a_offset = up(offset)
        b_offset = up(a_offset + sum(capacities[s.name] for s in bucket) * key[1])
        for site in bucket:
            capacity, extra = capacities[site.name], biases.get(site.name, 0)
            geometry.append(
                SiteGeometry(
                    site.name,
                    site.parent,
                    site.in_features,
                    site.out_features,
                    capacity,
                    extra,
                    a_offset,
                    b_offset,
                    lane,
                    len(geometry),
                )
            )
            a_offset += capacity * site.in_features
            b_offset = up(b_offset + (capacity + extra) * site.out_features)
            lane += capacity + extra
        offset = b_offset
        position += len(bucket)
    return geometry


class PackedStore:
    """Rank rows for ``slots`` adapters over fixed sites. Not thread-safe: the bank sees to that.

    storage: flat, the bank's dtype; owner ``[lanes]``, windows ``[slots, sites, 3]`` (first row, rank, bias row), both
    int16 where that is enough; scale ``[slots, sites]`` float32
    """

    def __init__(
        self,
        sites: Sequence[Site],
        capacities: Mapping[str, int],
        biases: Mapping[str, int],
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.sites = order_sites(sites)
        self.geometry = plan(self.sites, capacities, biases)
        self.index = {site.name: i for i, site in enumerate(self.sites)}
        self.slots = slots
        last = self.geometry[-1] if self.geometry else None
        size = last.b_offset + last.lanes * last.out_features if last else 0
        lanes = last.lane + last.lanes if last else 0
        self.storage = torch.zeros(size, dtype=dtype, device=device)
        small = max([slots, *(g.lanes for g in self.geometry)]) <= torch.iinfo(torch.int16).max
        whole = torch.int16 if small else torch.int32
        self.owner = torch.full((lanes,), -1, dtype=whole, device=device)
        self.scale = torch.zeros((slots, len(self.sites)), dtype=torch.float32, device=device)
        self.windows = torch.zeros((slots, len(self.sites), 3), dtype=whole, device=device)
        self.windows[..., 2] = -1
        self.taken: list[dict[str, Window]] = [{} for _ in range(slots)]  # by slot, by site

    # -------------------------------------------------------------------------------------------- room

    def find_room(self, adapter: AdapterWeights, instead_of: int | None = None) -> dict[str, Window] | None:
        """Rows for ``adapter``, as if slot ``instead_of`` were empty; None if some site has too few left in a row."""
        windows: dict[str, Window] = {}
        for path, site in adapter.sites.items():
            room = None
            if path in self.index:
                room = self._room_at(path, site.rank, site.bias is not None, instead_of)
            if room is None:
                return None
            windows[path] = room
        return windows

    def _room_at(self, path: str, rank: int, bias: bool, instead_of: int | None) -> Window | None:
        geometry = self.geometry[self.index[path]]
        used = sorted(
            (w.start, w.start + w.rank)
            for slot, windows in enumerate(self.taken)
            if slot != instead_of and (w := windows.get(path))
        )
        bias_rows = {
            windows[path].bias_row for slot, windows in enumerate(self.taken) if slot != instead_of and path in windows
        }
        start = 0
        for begin, end in used:
            if start + rank <= begin:
                break
            start = end
        if start + rank > geometry.capacity:
            return None
        bias_row = -1
        if bias:
            free = [row for row in range(geometry.capacity, geometry.lanes) if row not in bias_rows]
            if not free:
                return None
            bias_row = free[0]
        return Window(start, rank, bias_row)

    def free_slot(self, used: Iterable[int]) -> int | None:
        busy = set(used)
        return next((slot for slot in range(self.slots) if slot not in busy), None)

    # -------------------------------------------------------------------------------------------- writing

    @torch.no_grad()
    def put(self, slot: int, adapter: AdapterWeights) -> None:
        """Make ``adapter`` what slot ``slot`` holds. All or nothing: whatever stops it, the store is as before.

        CapacityError: no room
        """
        windows = self.find_room(adapter, instead_of=slot)
        if windows is None:
            raise CapacityError(f"adapter {adapter.name!r} needs more rank rows than are free at some layer")
        saved = self._save(slot, windows)
        try:
            self._clear(slot)
            for path, site in adapter.sites.items():
                a, b, bias = self._rows(path, windows[path])
                a.copy_(site.a)
                b.copy_(site.b.t())
                if bias is not None:
                    bias.copy_(site.bias)
                self._describe(slot, path, windows[path], site.scale)
            self.taken[slot] = windows
        except BaseException:
            self._restore(saved)
            raise

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Forget what ``slot`` holds; its rows become zero, which the ATen lowering relies on."""
        saved = self._save(slot, {})
        try:
            self._clear(slot)
            self.taken[slot] = {}
        except BaseException:
            self._restore(saved)
            raise

    @torch.no_grad()
    def set_scale(self, slot: int, path: str, scale: float) -> None:
        """A new scale for one site of one adapter."""
        self._describe(slot, path, self.taken[slot][path], scale)

    def _clear(self, slot: int) -> None:
        for path, window in self.taken[slot].items():
            for rows in self._rows(path, window):
                if rows is not None:
                    rows.zero_()
            geometry = self.geometry[self.index[path]]
            for first, count in self._lanes(geometry, window):
                self.owner[first : first + count] = -1
        self.scale[slot] = 0
        self.windows[slot] = torch.tensor([0, 0, -1])

    def _describe(self, slot: int, path: str, window: Window, scale: float) -> None:
        geometry = self.geometry[self.index[path]]
        for first, count in self._lanes(geometry, window):
            self.owner[first : first + count] = slot
        self.scale[slot, geometry.column] = scale
        self.windows[slot, geometry.column] = torch.tensor([window.start, window.rank, window.bias_row])

    @staticmethod
    def _lanes(geometry: SiteGeometry, window: Window) -> list[tuple[int, int]]:
        runs = [(geometry.lane + window.start, window.rank)]
        return runs if window.bias_row < 0 else [*runs, (geometry.lane + window.bias_row, 1)]

    def _rows(self, path: str, window: Window) -> tuple[Tensor, Tensor, Tensor | None]:
        """Views: A ``[rank, in]``, B ``[rank, out]``, bias ``[out]`` or None."""
        g = self.geometry[self.index[path]]
        a = self.storage[g.a_offset :][: g.capacity * g.in_features].view(g.capacity, g.in_features)
        b = self.storage[g.b_offset :][: g.lanes * g.out_features].view(g.lanes, g.out_features)
        rows = slice(window.start, window.start + window.rank)
        return a[rows], b[rows], b[window.bias_row] if window.bias_row >= 0 else None

    def _save(self, slot: int, windows: Mapping[str, Window]) -> tuple:
        touched = [*self.taken[slot].items(), *windows.items()]
        rows = [[(view, view.clone()) for view in self._rows(*item) if view is not None] for item in touched]
        tables = [(table, table.clone()) for table in (self.owner, self.scale, self.windows)]
        return [pair for pairs in rows for pair in pairs] + tables, slot, self.taken[slot]

    def _restore(self, saved: tuple) -> None:
        pairs, slot, taken = saved
        for view, old in pairs:
            view.copy_(old)
        self.taken[slot] = taken

    # -------------------------------------------------------------------------------------------- reading

    def views(self, slot: int, path: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """What ``slot`` holds at ``path``, as PEFT shapes it: A ``[rank, in]``, B ``[out, rank]``, bias ``[out]``."""
        a, b, bias = self._rows(path, self.taken[slot][path])
        return a, b.t(), bias

    def table(self, name: str, start: int, length: int | None) -> Tensor:
        """``storage``, ``windows``, or a part of ``owner`` (lanes) or ``scale`` (columns): a view."""
        tensor: Tensor = getattr(self, name)
        return tensor if length is None else tensor.narrow(1 if name == "scale" else 0, start, length)

    def site_tensors(self, index: int) -> dict[str, Tensor]:
        """The blocks and tables of one site, as the routed op wants them."""
        g = self.geometry[index]
        lanes = slice(g.lane, g.lane + g.lanes)
        return {
            "a": self.storage[g.a_offset :][: g.capacity * g.in_features].view(g.capacity, g.in_features),
            "b": self.storage[g.b_offset :][: g.lanes * g.out_features].view(g.lanes, g.out_features),
            "owner": self.owner[lanes],
            "scale": self.scale[:, g.column : g.column + 1],
            "windows": self.windows[:, g.column : g.column + 1],
        }

    @property
    def nbytes(self) -> int:
        """All storage held: weights, room, tables."""
        return sum(t.numel() * t.element_size() for t in (self.storage, self.owner, self.scale, self.windows))

    @property
    def reserved(self) -> int:
        """Bytes of rank rows and slots that no adapter has taken, and of their entries in the tables."""
        free = lanes = 0
        for i, g in enumerate(self.geometry):
            windows = [held[self.sites[i].name] for held in self.taken if self.sites[i].name in held]
            ranks = sum(w.rank for w in windows)
            bias_rows = sum(w.bias_row >= 0 for w in windows)
            free += (g.capacity - ranks) * (g.in_features + g.out_features) + (g.biases - bias_rows) * g.out_features
            lanes += g.lanes - ranks - bias_rows
        tables = self.scale.element_size() + 3 * self.windows.element_size()
        empty = sum(not held for held in self.taken) * len(self.sites)
        return free * self.storage.element_size() + lanes * self.owner.element_size() + empty * tables
