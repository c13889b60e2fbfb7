"""The packed store: no zero stored, rows found and freed, all or nothing."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from lorafx.adapters import AdapterWeights, SiteWeights
from lorafx.errors import AdapterFormatError, CapacityError
from lorafx.store import PackedStore, Site, order_sites, plan
from tests.interrupting import interrupt_at

CPU = torch.device("cpu")
SITES = [Site("l.q", 64, 64), Site("l.k", 64, 32), Site("l.v", 64, 32), Site("l.o", 48, 64), Site("m.up", 64, 96)]


def adapter(name: str, ranks: dict[str, int], bias: bool = False) -> AdapterWeights:
    shapes = {site.name: (site.in_features, site.out_features) for site in SITES}
    return AdapterWeights(
        name,
        {
            path: SiteWeights(
                torch.randn(rank, shapes[path][0]),
                torch.randn(shapes[path][1], rank),
                torch.randn(shapes[path][1]) if bias else None,
                2.0 / rank,
            )
            for path, rank in ranks.items()
        },
    )


def store_for(*adapters: AdapterWeights, slots: int | None = None, spare: int = 0) -> PackedStore:
    capacities = {s.name: spare + sum(a.sites[s.name].rank for a in adapters if s.name in a.sites) for s in SITES}
    biases = {s.name: sum(a.sites[s.name].bias is not None for a in adapters if s.name in a.sites) for s in SITES}
    store = PackedStore(SITES, capacities, biases, slots or len(adapters), torch.float32, torch.device("cpu"))
    for slot, one in enumerate(adapters):
        store.put(slot, one)
    return store


def check_holds(store: PackedStore, slot: int, held: AdapterWeights) -> None:
    """Weights, owners, windows and scales of one slot, to the bit."""
    assert store.taken[slot].keys() == held.sites.keys()
    for site in SITES:
        g = store.geometry[store.index[site.name]]
        owned = (store.owner[g.lane : g.lane + g.lanes] == slot).nonzero().flatten().tolist()
        start, rank, bias_row = store.windows[slot, g.column].tolist()
        if site.name not in held.sites:
            assert (owned, rank, float(store.scale[slot, g.column])) == ([], 0, 0.0)
            continue
        weights = held.sites[site.name]
        a, b, bias = store.views(slot, site.name)
        assert torch.equal(a, weights.a)
        assert torch.equal(b, weights.b)
        assert (bias is None) == (weights.bias is None)
        assert bias is None or torch.equal(bias, weights.bias)
        rows = list(range(start, start + rank)) + ([] if bias is None else [bias_row])
        assert (owned, rank) == (rows, weights.rank)
        assert float(store.scale[slot, g.column]) == pytest.approx(weights.scale)


def snapshot(store: PackedStore) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in (store.storage, store.owner, store.scale, store.windows)]


def test_siblings_stand_next_to_each_other() -> None:
    sites = order_sites([Site("a.q", 8, 8), Site("b.q", 8, 8), Site("a.v", 8, 4), Site("a.o", 4, 8)])
    assert [site.name for site in sites] == ["a.q", "a.v", "b.q", "a.o"]
    q, v, *_ = plan(sites, {site.name: 3 for site in sites}, {})
    assert v.a_offset == q.a_offset + 3 * 8
    assert v.lane == q.lane + 3


def test_windows_never_overlap() -> None:
    """Every element of the storage belongs to one block at most: offsets that never advance would show here."""
    geometry = plan(order_sites(SITES), {s.name: 1 + i for i, s in enumerate(SITES)}, {"l.q": 2})
    taken: set[int] = set()
    for g in geometry:
        for start, size in ((g.a_offset, g.capacity * g.in_features), (g.b_offset, g.lanes * g.out_features)):
            block = set(range(start, start + size))
            assert not block & taken
            taken |= block
    lanes = [lane for g in geometry for lane in range(g.lane, g.lane + g.lanes)]
    assert lanes == list(range(len(lanes)))


def test_holds_what_was_put_and_no_zero() -> None:
    one, two = adapter("one", {"l.q": 4, "l.v": 7}, bias=True), adapter("two", {s.name: 16 for s in SITES})
    store = store_for(one, two)
    for slot, held in enumerate((one, two)):
        for path, site in held.sites.items():
            a, b, bias = store.views(slot, path)
            assert torch.equal(a, site.a)
            assert torch.equal(b, site.b)
            assert (bias is None) == (site.bias is None)
            assert bias is None or torch.equal(bias, site.bias)
    padding = store.storage.numel() - one.elements() - two.elements()
    assert int((store.storage == 0).sum()) == padding
    assert padding < 16 * 2 * len(SITES)  # alignment of blocks only, whatever the ranks
    assert store.reserved == 0


def test_freed_rows_are_zero_and_taken_again() -> None:
    one, two, three = (adapter(n, {"l.q": r}) for n, r in (("one", 4), ("two", 8), ("three", 3)))
    store = store_for(one, two)
    store.clear(0)
    # its rows in float32, their owners, and its slot's windows and scales
    assert store.reserved == 4 * (64 + 64) * 4 + 4 * 2 + len(SITES) * (3 * 2 + 4)
    assert int((store.storage != 0).sum()) == two.elements()
    assert (store.owner == 0).sum() == 0
    store.put(0, three)
    assert torch.equal(store.views(0, "l.q")[0], three.sites["l.q"].a)
    assert torch.equal(store.views(1, "l.q")[1], two.sites["l.q"].b)


def test_no_room_changes_nothing() -> None:
    one = adapter("one", {"l.q": 4})
    store = store_for(one, slots=2)
    before = snapshot(store)
    with pytest.raises(CapacityError, match="rank rows"):
        store.put(1, adapter("two", {"l.q": 1}))
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(store), strict=True))


@pytest.mark.parametrize("other", ["same rows", "other rows", "rows that have to be made"])
def test_interrupts_at_every_line_change_nothing(other: str) -> None:
    one, two = adapter("one", {"l.q": 4, "l.v": 4}, bias=True), adapter("two", {"l.q": 4, "l.k": 3})
    three = adapter("three", {"l.q": 2, "l.v": 5})
    new = {
        "same rows": adapter("new", {"l.q": 4, "l.v": 4}, bias=True),
        "other rows": adapter("new", {"l.q": 3, "l.v": 2}),
        "rows that have to be made": adapter("new", {"l.q": 6, "l.v": 4}),
    }[other]
    store = store_for(one, two, three, spare=2)
    assert bool(store.find_room(new.outline.sites, instead_of=0).moved) == (other == "rows that have to be made")
    for line in itertools.count(1):
        before, taken = snapshot(store), [dict(held) for held in store.taken]
        stopped = interrupt_at(line, "lorafx", lambda: store.put(0, new))
        if not stopped:
            break
        after = snapshot(store)
        if store.taken[0].keys() == new.sites.keys() and torch.equal(store.views(0, "l.q")[0], new.sites["l.q"].a):
            store.put(0, one)  # it came after the last line that matters
            continue
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), line
        assert store.taken == taken
    assert line > 20
    for slot, held in enumerate((new, two, three)):
        check_holds(store, slot, held)


def test_rows_that_are_free_in_pieces_are_made_one() -> None:
    """8 rows: 2, 3 and 2 are taken, the 2nd goes, and 4 are wanted: the third moves up, all in place."""
    first, second, third = (adapter(n, {"l.q": r, "l.o": 1}) for n, r in (("1", 2), ("2", 3), ("3", 2)))
    store = store_for(first, second, third, slots=3, spare=1)
    address = store.storage.data_ptr()
    store.clear(1)
    wide = adapter("wide", {"l.q": 4})
    store.put(1, wide)
    assert store.storage.data_ptr() == address
    for slot, held in enumerate((first, wide, third)):
        check_holds(store, slot, held)


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_changes(seed: int) -> None:
    """Adapters whose ranks fit into the rows always find room, and every one is held to the bit."""
    rng = random.Random(seed)
    slots, largest = 5, 7
    store = PackedStore(
        SITES, {s.name: slots * largest for s in SITES}, {s.name: 1 for s in SITES}, slots, torch.float32, CPU
    )
    held: dict[int, AdapterWeights] = {}
    for _ in range(60):
        slot = rng.randrange(slots)
        if rng.random() < 0.3:
            store.clear(slot)
            held.pop(slot, None)
        else:
            sites = rng.sample(SITES, rng.randint(1, len(SITES)))
            free_of_bias = all(s.bias is None for at, one in held.items() if at != slot for s in one.sites.values())
            bias = free_of_bias and rng.random() < 0.3
            held[slot] = adapter("x", {s.name: rng.randint(1, largest) for s in sites}, bias)
            store.put(slot, held[slot])
        live = 0
        for at, one in held.items():
            check_holds(store, at, one)
            live += one.elements()
        assert int((store.storage != 0).sum()) == live  # every other row is zero
        assert int((store.owner >= 0).sum()) == sum(
            site.rank + (site.bias is not None) for one in held.values() for site in one.sites.values()
        )


@pytest.mark.parametrize("part", ["a", "b", "bias"])
def test_weights_that_are_not_finite_are_refused(part: str) -> None:
    bad = adapter("bad", {"l.q": 2}, bias=True)
    getattr(bad.sites["l.q"], part).view(-1)[-1] = float("nan")
    with pytest.raises(AdapterFormatError, match=r"'bad'.*l\.q.*NaN"):
        bad.check_finite()
