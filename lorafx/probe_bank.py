"""A bank to try rewritten graphs on: the same geometry, other adapters, and poison where nothing may be read.

Several adapters of different ranks, weighted and mixed over the rows as far as the batch allows, among them rows of
the base model. What a site is to give is computed one site at a time, in float64, by the reference lowering. The store
takes as much memory as the bank does, for as long as one graph is being validated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lorafx.adapters import AdapterWeights, SiteWeights
from lorafx.bank import AdapterBank
from lorafx.kernels import layer_kinds, reference
from lorafx.kernels.layer_ops import unbatched
from lorafx.kernels.ops import resolve_lowering
from lorafx.passes.attach_inputs import KEY
from lorafx.passes.checkpointed import bodies_of
from lorafx.passes.context import SiteGeometry
from lorafx.passes.fuse_layers import LAYER_SITE, ROUTED_LAYER
from lorafx.passes.graph_reading import example
from lorafx.passes.group_markers import SITE
from lorafx.passes.record import STANDS_FOR
from lorafx.passes.scale_rows import MAGNITUDE
from lorafx.passes.share_routing import LOWERING, ROUTED, X
from lorafx.probe_inputs import rms
from lorafx.routing import EVERYWHERE, MAX_PAIRS, MAX_ROWS, Pairs, make_routing
from lorafx.store import PackedStore

SITES = (SITE, LAYER_SITE, MAGNITUDE)  # the last two arguments of these markers are the bank and the site
LASTS = (2, EVERYWHERE, 1, 0)  # of row after row, how many last positions have the adapters, where that may differ
HUGE = 1e4  # poison for lowerings that multiply idle lanes by zero; it fits into half precision


class ProbeBank:
    """bank: whose sites these are, read only; rows: of the batch, 1 where rows can't be told apart"""

    def __init__(self, bank: AdapterBank, rows: int) -> None:
        real = bank.store
        self.key, self._geometry = bank.key, real.geometry
        self._generator = torch.Generator().manual_seed(1)
        capacities = {site.name: site.capacity for site in real.geometry}
        biases = {site.name: site.biases for site in real.geometry}
        memory = real.storage.dtype, real.storage.device
        dora = None if real.dora is None else (real.dora.root, real.dora.sites)
        self.store = PackedStore(real.sites, capacities, biases, real.slots, *memory, dora, real.late)
        entries = self._entries(min(rows, MAX_ROWS) if rows else 1)
        self._last = [LASTS[row % len(LASTS)] for row in range(len(entries))]
        self.routing = make_routing(entries, real.storage.device, self._last if real.late else None)
        self._fill(sorted({slot for pairs in entries for slot, _ in pairs}))
        self._fill_factors({pairs[0][0] for pairs in entries if pairs})
        self._calibrated: set[int] = set()

    def inputs(self, node: fx.Node) -> Tensor:
        """What the placeholder ``node``, which ``attach_input`` made, is to hold."""
        wanted = node.meta[KEY]
        return getattr(self.routing, wanted.name) if wanted.of_call else self.store.table(*vars(wanted).values())

    def knows(self, node: fx.Node) -> bool:
        """Whether ``node`` is the marker of a site of this bank."""
        return node.target in SITES and node.args[-2] == self.key and isinstance(node.args[-1], int)

    def in_features(self, node: fx.Node) -> int:
        """Of the layer behind which this marker stands."""
        return self._geometry[node.args[-1]].in_features

    def delta(self, node: fx.Node, y: Tensor, x: Tensor | None, *kind: Any) -> Tensor:
        """What the marker ``node`` is to add to ``y``, in float64; ``x``, ``kind``: its other arguments. The first
        time, the site is scaled so that it is as large as y."""
        site = node.args[-1]
        if node.target is MAGNITUDE:
            return self._scaled(site, y, x)
        delta = self._delta_of(node, y, x, *kind)
        if site not in self._calibrated:
            self._calibrated.add(site)
            if (size := rms(delta)) and (wanted := rms(y)):
                self.store.scale[:, self._geometry[site].column] *= wanted / size
                delta = self._delta_of(node, y, x, *kind)
        return delta

    def poison(self, gm: fx.GraphModule) -> None:
        """Fill the rank rows that no adapter has: with NaN, where the lowering of ``gm`` promises not to read them."""
        lenient = set()  # sites whose lowering multiplies what it does not want by zero
        for node in (node for one in (*bodies_of(gm).values(), gm) for node in one.graph.nodes):
            stand_in = node.meta.get(STANDS_FOR)
            if stand_in is None:
                continue
            if node.target is ROUTED_LAYER or (node.args[0].target is ROUTED and not _reads_live_rows_alone(node)):
                lenient.add(stand_in.name)
        for i, site in enumerate(self._geometry):
            tensors = self.store.site_tensors(i)
            free = tensors["owner"] < 0
            tensors["a"][free[: site.capacity]] = torch.nan
            tensors["b"][free] = HUGE if site.name in lenient else torch.nan

    def _delta_of(self, node: fx.Node, y: Tensor, x: Tensor, *kind: Any) -> Tensor:
        site = node.args[-1]
        if node.target is SITE:
            return self._late(site, self._delta(site, y, x))
        return self._delta_of_layer(site, y, x, *kind[:3])

    def _delta_of_layer(
        self, site: int, y: Tensor, x: Tensor, factor: Tensor | None, kind: str, window: list[int]
    ) -> Tensor:
        """The layer taken for a linear one, as the reference lowering takes it."""
        if unbatched(kind, x):
            return self._delta_of_layer(site, y[None], x[None], factor, kind, window)[0]
        as_y, as_x = layer_kinds.as_linear(kind, y, x, window, self._geometry[site].in_features)
        delta = self._delta(site, as_y, as_x) * (1.0 if factor is None else factor.double())
        return layer_kinds.from_linear(kind, delta, y.double())

    def _delta(self, site: int, y: Tensor, x: Tensor) -> Tensor:
        """Rows that the routing treats alike are one row to the reference, which goes through them one by one."""
        if x.dim() == 1:
            return self._delta(site, y[None], x[None])[0]
        tensors, count, rows = self.store.site_tensors(site), len(self.routing.rows), x.shape[0]
        capacity = self._geometry[site].capacity
        one = torch.ones((), dtype=torch.int64)
        parts = []
        for entry in range(count):
            span = slice(-(-entry * rows // count), -(-(entry + 1) * rows // count))
            routed = (self.routing.slots[entry, None], self.routing.weights[entry, None], one)
            tables = (tensors["scale"], tensors["windows"])
            zero = torch.zeros_like(y[span], dtype=torch.float64)
            (part,) = reference.routed_lora(
                [zero.reshape(1, -1, y.shape[-1])],
                x[span].reshape(1, -1, x.shape[-1]),
                [tensors["a"]],
                [tensors["b"]],
                [capacity],
                *routed,
                *tables,
            )
            parts.append(part.reshape(zero.shape))
        return torch.cat(parts)

    def _late(self, site: int, delta: Tensor) -> Tensor:
        """``delta`` where the adapters of its row are active, if adapters of this site may begin at a position."""
        if self._geometry[site].name not in self.store.late:
            return delta
        if delta.dim() == 1:
            return self._late(site, delta[None])[0]
        count, rows, delta = len(self.routing.rows), len(delta), delta.clone()
        for row in range(rows):
            last = self._last[row * count // rows]
            if delta.dim() == 2:  # the positions of an entry are rows that follow each other
                positions = rows // count
                delta[row] *= row % positions >= positions - last
            else:
                delta[row, : max(0, delta.shape[1] - last)] = 0.0
        return delta

    def _scaled(self, site: int, y: Tensor, bias: Tensor | None) -> Tensor:
        """``f * (y - bias)``: the factors of each row are those of the first adapter it names."""
        if y.dim() == 1:
            return self._scaled(site, y[None], bias)[0]
        table, count, rows = self.store.dora.table(self._geometry[site].name).double(), len(self.routing.rows), len(y)
        own = y.double() if bias is None else y.double() - bias.double()
        first = [self.routing.rows[row * count // rows][:1] for row in range(rows)]
        factors = [table[pairs[0][0]] if pairs else torch.zeros_like(table[0]) for pairs in first]
        return torch.stack([factor * row for factor, row in zip(factors, own, strict=True)])

    # ------------------------------------------------------------------------------------------ making it up

    def _entries(self, rows: int) -> list[Pairs]:
        """The first row uses as many adapters as a row can, the second one none, the others one or two."""
        slots = self.store.slots
        entries = [self._pairs([0, *range(1, slots)][:MAX_PAIRS])]
        for row in range(1, rows):
            some = [self._draw(slots) for _ in range(1 + row % 2)]
            entries.append(() if row % 4 == 1 else self._pairs(sorted({*some})))
        return entries

    def _pairs(self, slots: list[int]) -> Pairs:
        return tuple((slot, (-1) ** slot * (0.5 + self._draw(100) / 100)) for slot in slots)

    def _fill(self, slots: list[int]) -> None:
        rows = {site.name: site.capacity for site in self._geometry}
        biases = {site.name: site.biases for site in self._geometry}
        for slot in slots:
            sites = {}
            for site in self._geometry:
                most = min(rows[site.name], -(-2 * site.capacity // len(slots)))
                rank = min(most, self._draw(most + 1) + (slot == slots[0]))
                if rank:
                    sites[site.name] = self._weights(site, rank, biases[site.name] > 0)
                    rows[site.name] -= rank
                    biases[site.name] -= biases[site.name] > 0
            if sites:
                self.store.put(slot, AdapterWeights(f"probe {slot}", sites))

    def _fill_factors(self, used: set[int]) -> None:
        """Factors of DoRA in these slots, poison in those of the others."""
        for path in self.store.dora.sites if self.store.dora is not None else ():
            table = self.store.dora.table(path)
            sizes = 0.2 + 0.7 * torch.rand(table.shape, generator=self._generator)
            signs = torch.randint(0, 2, table.shape, generator=self._generator) * 2 - 1
            table[:-1].copy_((sizes * signs)[:-1])
            table[[slot for slot in range(self.store.slots) if slot not in used]] = torch.nan

    def _weights(self, site: SiteGeometry, rank: int, bias: bool) -> SiteWeights:
        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=self._generator)

        a, b = noise(rank, site.in_features) / site.in_features**0.5, noise(site.out_features, rank)
        return SiteWeights(a, b, noise(site.out_features) if bias else None, 0.5 + self._draw(100) / 100)

    def _draw(self, below: int) -> int:
        return int(torch.randint(0, below, (), generator=self._generator))


def _reads_live_rows_alone(out: fx.Node) -> bool:
    """Whether the op that ``out`` is taken from promises not to read rank rows that nobody uses."""
    op = out.args[0]
    x, y = example(op.args[X]), example(out)
    if x is None or y is None:
        return False
    lowering = resolve_lowering(op.args[LOWERING], x)
    return lowering in ("triton", "reference") or (lowering == "cpp" and y.dtype == x.dtype)


__all__ = ["SITES", "ProbeBank"]
