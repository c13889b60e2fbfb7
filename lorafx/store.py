"""The bank's memory: every adapter's weights in one flat tensor, no zero stored, and the tables that find them.

For each site (an adapted layer) there is a block of rank rows of A and one of B; an adapter takes as many rows of each
as its rank there, none where it does not adapt that layer. Sites that may become one group (same parent, same input
width) stand next to each other, so the group's A's are one matrix without any copy. See ``kernels/ops.py`` for a
worked example of the tables.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor, nn

from lorafx.adapters import AdapterOutline, AdapterWeights, SiteShape, SiteWeights
from lorafx.dora import Dora
from lorafx.errors import AdapterMismatchError, CapacityError
from lorafx.packing import Layout, Piece, Run, copy_all, find_runs, kind_of, sources, targets
from lorafx.passes.context import SiteGeometry
from lorafx.placing import Room, Window, find_room

ALIGNMENT = 16  # elements: 64 bytes in float32, what a vector load and a cache line want


@dataclass(frozen=True)
class Site:
    """A layer that can be adapted."""

    name: str
    in_features: int
    out_features: int
    experts: int = 0  # as in SiteShape

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Held:
    """What a slot holds, kept so that numbers of the same layout are written at once: the runs and their views."""

    layout: Layout
    columns: numpy.ndarray  # of its sites, in the tables
    runs: list[Run]
    views: list[Tensor]


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
    int16 where that is enough; scale ``[slots, sites]`` float32; dora: the model, and the sites that DoRA may stand on;
    late: the sites that aLoRA may stand on
    """

    @torch.inference_mode(False)  # what is made here outlives the caller's mode
    def __init__(
        self,
        sites: Sequence[Site],
        capacities: Mapping[str, int],
        biases: Mapping[str, int],
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        dora: tuple[nn.Module, Collection[str]] | None = None,
        late: Collection[str] = (),
    ) -> None:
        self.sites = order_sites(sites)
        self.geometry = plan(self.sites, capacities, biases)
        self.index = {site.name: i for i, site in enumerate(self.sites)}
        self.slots = slots
        last = self.geometry[-1] if self.geometry else None
        size = last.b_offset + last.lanes * last.out_features if last else 0
        lanes = last.lane + last.lanes if last else 0
        small = max([slots, *(g.lanes for g in self.geometry)]) <= torch.iinfo(torch.int16).max
        whole = numpy.int16 if small else numpy.int32
        # the tables are written here, then copied whole to where the kernels read them
        self._owner = numpy.full(lanes, -1, dtype=whole)
        self._scale = numpy.zeros((slots, len(self.sites)), dtype=numpy.float32)
        self._windows = numpy.zeros((slots, len(self.sites), 3), dtype=whole)
        self._windows[..., 2] = -1
        self.storage = torch.zeros(size, dtype=dtype, device=device)
        self.owner, self.scale, self.windows = (
            torch.tensor(table, device=device) for table in (self._owner, self._scale, self._windows)
        )
        self.taken: list[dict[str, Window]] = [{} for _ in range(slots)]  # by slot, by site
        self._held: list[Held | None] = [None] * slots
        self.late = frozenset(late)
        self.invocations: list[tuple[int, ...]] = [()] * slots  # of aLoRA, the token ids at which it begins
        self.dora: Dora | None = None  # where any adapter has it
        if dora is not None and dora[1]:
            outs = {site.name: site.out_features for site in self.sites if site.name in dora[1]}
            self.dora = Dora(dora[0], outs, slots, dtype, device)

    def __getstate__(self) -> dict:
        return {**vars(self), "_held": [None] * self.slots}  # views: a copy makes its own

    @torch.inference_mode(False)
    def to(self, device: torch.device) -> None:
        """Move all memory."""
        moved = {field: getattr(self, field).to(device) for field in ("storage", "owner", "scale", "windows")}
        vars(self).update(moved, _held=[None] * self.slots)
        if self.dora is not None:
            self.dora.to(device)

    # -------------------------------------------------------------------------------------------- room

    def find_room(self, shapes: Mapping[str, SiteShape], instead_of: int | None = None) -> Room | None:
        """Rows for an adapter of these shapes, as if slot ``instead_of`` were empty; None if there are too few."""
        if not self.takes_dora(shapes):
            return None
        geometry = {g.name: g for g in self.geometry}
        return find_room(geometry, self.taken, shapes, instead_of)

    def takes_dora(self, shapes: Mapping[str, SiteShape]) -> bool:
        """Whether there are factors at all sites that ``shapes`` has DoRA on."""
        return all(self.dora is not None and path in self.dora.sites for path, s in shapes.items() if s.dora)

    def takes_late(self, adapter: AdapterOutline | AdapterWeights) -> bool:
        """Whether ``adapter`` is no aLoRA, or may be one at all of its sites."""
        return not adapter.invocation or self.late.issuperset(adapter.sites)

    def check_late(self, adapter: AdapterOutline | AdapterWeights) -> None:
        """CapacityError: ``adapter`` is aLoRA where none may be"""
        if not self.takes_late(adapter):
            raise CapacityError(
                f"adapter {adapter.name!r} is aLoRA on layers where no aLoRA was expected. Compile the AdapterStore"
                " without max_rank or without target_modules, so that its adapters are looked at first."
            )

    def fits(self, slots: Sequence[int], adapters: Sequence[Mapping[str, SiteShape]]) -> bool:
        """Whether adapters of these shapes have room, one after the other, once all of ``slots`` are empty."""
        left = {g.name: [g.capacity, g.biases] for g in self.geometry}
        for slot, held in enumerate(self.taken):
            for path, window in held.items() if slot not in slots else ():
                left[path][0] -= window.rank
                left[path][1] -= window.bias_row >= 0
        for shapes in adapters:
            if not self.takes_dora(shapes):
                return False
            for path, shape in shapes.items():
                if path not in left:
                    return False
                left[path][0] -= shape.rank
                left[path][1] -= shape.bias
        return all(rows >= 0 and biases >= 0 for rows, biases in left.values())

    def holds(self, slot: int, layout: Layout | None) -> bool:
        """Whether ``slot`` holds an adapter of this layout, so that another one is only a copy of its numbers."""
        held = self._held[slot]
        return held is not None and held.layout is layout

    def free_slot(self, used: Iterable[int]) -> int | None:
        busy = set(used)
        return next((slot for slot in range(self.slots) if slot not in busy), None)

    # -------------------------------------------------------------------------------------------- writing

    @torch.no_grad()
    def put(self, slot: int, adapter: AdapterWeights) -> None:
        """Make ``adapter`` what slot ``slot`` holds. All or nothing: whatever stops it, the store is as before.

        CapacityError: no room
        """
        adapter = adapter.packed(self.storage.dtype, self.storage.device)
        self.check_late(adapter)
        before, self.invocations[slot] = self.invocations[slot], adapter.invocation
        try:
            with self.dora.putting(slot, adapter) if self.dora is not None else nullcontext():
                self._put(slot, adapter)
        except BaseException:
            self.invocations[slot] = before
            raise

    def rewrite(self, slot: int, adapter: AdapterWeights) -> bool:
        """Put ``adapter`` there if nothing but its numbers differs from what ``slot`` holds, and say whether that is
        so. One call writes them, and nothing comes before it or after it: an exception from outside finds all of it
        done or none. Without gradients only."""
        held = self._held[slot]
        if held is None or held.layout is not adapter.layout or self.dora is not None:
            return False
        if adapter.flat.dtype != self.storage.dtype or adapter.flat.device != self.storage.device:
            return False
        if adapter.invocation != self.invocations[slot] or not self._same_scales(slot, adapter, held):
            return False
        copy_all(held.views, sources(adapter.flat, held.runs))
        return True

    def _same_scales(self, slot: int, adapter: AdapterWeights, held: Held) -> bool:
        return bool((self._scale[slot].take(held.columns) == adapter.scales).all())

    def _put(self, slot: int, adapter: AdapterWeights) -> None:
        if self.holds(slot, adapter.layout):
            self._rewrite(slot, adapter, self._held[slot])
            return
        self._check_widths(adapter)
        room = self.find_room(adapter.shapes, instead_of=slot)
        if room is None:
            raise CapacityError(f"adapter {adapter.name!r} needs more rank rows than are free at some layer")
        runs = find_runs(self._pieces(room.windows.items(), adapter.layout))
        with self._all_or_nothing(slot, room):
            self._clear(slot)
            self._move(room.moved)
            self._describe(slot, room.windows, adapter)
            views = targets(self.storage, runs)
            copy_all(views, sources(adapter.flat, runs))
            columns = numpy.array([self.index[path] for path in room.windows])
            self._held[slot] = Held(adapter.layout, columns, runs, views)

    def _check_widths(self, adapter: AdapterWeights) -> None:
        """Layers of the model say how wide they are; of a part of a fused one adapters may say different things."""
        for path, shape in adapter.shapes.items():
            site = self.sites[self.index[path]] if path in self.index else None
            if site is not None and (site.in_features, site.out_features) != (shape.in_features, shape.out_features):
                raise AdapterMismatchError(
                    f"adapter {adapter.name!r} takes {path} for {shape.in_features} to {shape.out_features} features,"
                    f" what is loaded takes it for {site.in_features} to {site.out_features}. One of them is of another"
                    " model; lorafx.compile(..., fused=...) says how wide the parts of fused layers are."
                )

    def _rewrite(self, slot: int, adapter: AdapterWeights, held: Held) -> None:
        """The same rows with other numbers. Saving the old ones first would double the cost: the one call that writes
        them is the last thing done, and nothing can stop it half-way."""
        numbers = sources(adapter.flat, held.runs)
        if self._same_scales(slot, adapter, held):
            copy_all(held.views, numbers)
            return
        scale = self._scale[slot].copy()
        try:
            self._scale[slot, held.columns] = adapter.scales
            self.scale[slot].copy_(torch.from_numpy(self._scale[slot]))
            copy_all(held.views, numbers)
        except BaseException:
            self._scale[slot] = scale
            self.scale[slot].copy_(torch.from_numpy(scale))
            raise

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Forget what ``slot`` holds; its rows become zero, which the ATen lowering relies on."""
        with self._all_or_nothing(slot, Room()):
            self._clear(slot)
            self._write_tables()
            if self.dora is not None:
                self.dora.clear(slot)
            self.invocations[slot] = ()

    @torch.no_grad()
    def set_scale(self, slot: int, path: str, scale: float) -> None:
        """A new scale for one site of one adapter."""
        column = self.index[path]
        self._scale[slot, column] = scale
        self.scale[slot, column] = scale
        if self.dora is not None:
            self.dora.rescale(slot, path, self.weights(slot, path, scale))

    def follow_magnitudes(self) -> None:
        """Compute anew what edits in place have changed."""
        for slot, path in self.dora.changed(range(self.slots)) if self.dora is not None else ():
            self.dora.rescale(slot, path, self.weights(slot, path, self.dora.held[slot][path].scale))

    def _clear(self, slot: int) -> None:
        for rows in self._views(self.taken[slot].items()):
            rows.zero_()
        for path, window in self.taken[slot].items():
            self._own(-1, path, window)
        self.taken[slot], self._held[slot] = {}, None
        self._scale[slot], self._windows[slot] = 0, (0, 0, -1)

    def _move(self, moved: Mapping[str, Mapping[int, Window]]) -> None:
        """Rows of other adapters to lower rows of the same sites; in ascending order none is written over."""
        for path, windows in moved.items():
            for slot, window in windows.items():
                old = self.taken[slot][path]
                a, b, _ = self._rows(path, old)
                kept = a.clone(), b.clone()
                a.zero_(), b.zero_()
                for rows, numbers in zip(self._rows(path, window), kept, strict=False):
                    rows.copy_(numbers)
                self._own(-1, path, old)
                self._own(slot, path, window)
                self.taken[slot] = {**self.taken[slot], path: window}
                self._windows[slot, self.index[path]] = (window.start, window.rank, window.bias_row)
                self._held[slot] = None

    def _describe(self, slot: int, windows: dict[str, Window], adapter: AdapterWeights) -> None:
        for path, window in windows.items():
            self._own(slot, path, window)
            self._windows[slot, self.index[path]] = (window.start, window.rank, window.bias_row)
            self._scale[slot, self.index[path]] = adapter.sites[path].scale
        self.taken[slot] = windows
        self._write_tables()

    def _own(self, slot: int, path: str, window: Window) -> None:
        lane = self.geometry[self.index[path]].lane
        self._owner[lane + window.start : lane + window.start + window.rank] = slot
        if window.bias_row >= 0:
            self._owner[lane + window.bias_row] = slot

    def _write_tables(self) -> None:
        for table, kept in ((self.owner, self._owner), (self.scale, self._scale), (self.windows, self._windows)):
            table.copy_(torch.from_numpy(kept))

    def _rows(self, path: str, window: Window) -> tuple[Tensor, Tensor, Tensor | None]:
        """Views: A ``[rank, in]``, B ``[rank, out]``, bias ``[out]`` or None."""
        g = self.geometry[self.index[path]]
        a = self.storage[g.a_offset :][: g.capacity * g.in_features].view(g.capacity, g.in_features)
        b = self.storage[g.b_offset :][: g.lanes * g.out_features].view(g.lanes, g.out_features)
        rows = slice(window.start, window.start + window.rank)
        return a[rows], b[rows], b[window.bias_row] if window.bias_row >= 0 else None

    def _pieces(self, windows: Iterable[tuple[str, Window]], layout: Layout | None = None) -> Iterator[Piece]:
        """The rows of these windows, and where a packed adapter has them. Layers of one name make runs."""
        for path, window in windows:
            g = self.geometry[self.index[path]]
            starts = (
                g.a_offset + window.start * g.in_features,
                g.b_offset + window.start * g.out_features,
                g.b_offset + window.bias_row * g.out_features,
            )
            lengths = (window.rank * g.in_features, window.rank * g.out_features, g.out_features)
            packed = layout.offsets[path] if layout is not None else starts
            for part in range(2 if window.bias_row < 0 else 3):
                yield Piece(kind_of(path, part), starts[part], packed[part], lengths[part])

    def _views(self, windows: Iterable[tuple[str, Window]]) -> list[Tensor]:
        """All rows of these windows, as few views."""
        return targets(self.storage, find_runs(self._pieces(windows)))

    @contextmanager
    def _all_or_nothing(self, slot: int, room: Room) -> Iterator[None]:
        """Whatever stops what is done inside, all rows and tables that it may touch are put back."""
        touched = [*self.taken[slot].items(), *room.windows.items()]
        for path, windows in room.moved.items():
            for other, window in windows.items():
                touched += [(path, self.taken[other][path]), (path, window)]
        rows = [(view, view.clone()) for view in self._views(touched)]
        kept = [(table, table.copy()) for table in (self._owner, self._scale, self._windows)]
        taken, held = list(self.taken), list(self._held)
        try:
            yield
        except BaseException:
            for view, old in rows:
                view.copy_(old)
            for table, before in kept:
                table[...] = before
            self._write_tables()
            self.taken, self._held = taken, held
            raise

    # -------------------------------------------------------------------------------------------- reading

    def views(self, slot: int, path: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """What ``slot`` holds at ``path``, as PEFT shapes it: A ``[rank, in]``, B ``[out, rank]``, bias ``[out]``."""
        a, b, bias = self._rows(path, self.taken[slot][path])
        return a, b.t(), bias

    def weights(self, slot: int, path: str, scale: float) -> SiteWeights:
        """The same, with what else belongs to it."""
        held = self.dora.held[slot].get(path) if self.dora is not None else None
        magnitude = None if held is None else held.magnitude
        return SiteWeights(*self.views(slot, path), scale, magnitude, self.sites[self.index[path]].experts)

    def adapter(self, slot: int, name: str) -> AdapterWeights:
        """All that ``slot`` holds: views of this memory."""
        scales = self.scale[slot].tolist()
        sites = {path: self.weights(slot, path, scales[self.index[path]]) for path in self.taken[slot]}
        return AdapterWeights(name, sites, invocation=self.invocations[slot])

    @property
    def factors(self) -> Tensor:
        """Of DoRA, flat: see ``Dora``."""
        return self.dora.factors

    def table(self, name: str, start: int, length: int | None) -> Tensor:
        """``storage``, ``windows``, or a part of ``owner`` (lanes), ``scale`` (columns) or ``factors``: a view."""
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
        own = sum(t.numel() * t.element_size() for t in (self.storage, self.owner, self.scale, self.windows))
        return own + (self.dora.nbytes if self.dora is not None else 0)

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
        own = free * self.storage.element_size() + lanes * self.owner.element_size() + empty * tables
        return own + (self.dora.reserved if self.dora is not None else 0)
