"""``lorafx.site`` markers become ``lorafx.routed_lora``, which reads the bank's flat storage through windows of it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import fx

from lorafx.passes import PassContext, SiteGeometry, run_passes
from lorafx.passes.attach_inputs import ROUTING, RoutedInput, attach_input, routed_inputs
from tests.kernels.cases import Case, assert_delta, make_case

SITE, ROUTED = torch.ops.lorafx.site.default, torch.ops.lorafx.routed_lora.default
BANK = 7


def stored(case: Case, adjacent: bool) -> tuple[torch.Tensor, list[SiteGeometry]]:
    """The case's weights as a bank stores them; not ``adjacent``: something stands between the A's."""
    pieces, sites, at, lane = [], [], 0, 0
    k = case.x.shape[-1]
    a_offsets = []
    for a in case.a[0].split(case.caps):
        a_offsets.append(at)
        gap = [] if adjacent else [torch.full((5,), torch.nan)]
        pieces += [a.flatten(), *gap]
        at += a.numel() + sum(map(len, gap))
    for i, (name, b, cap) in enumerate(zip("qkvgu", case.b, case.caps, strict=False)):
        sites.append(SiteGeometry(f"attn.{name}", "attn", k, b.shape[1], cap, len(b) - cap, a_offsets[i], at, lane, i))
        pieces.append(b.flatten())
        at, lane = at + b.numel(), lane + len(b)
    return torch.cat(pieces), sites


def graph_of(order: list[int], count: int, bank: int = BANK) -> fx.GraphModule:
    """A graph of markers in ``order``; between them their results are used, and base outputs are computed late."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    ys = [graph.placeholder(f"y{i}") for i in range(count)]
    outs: dict[int, fx.Node] = {}
    for i in order:
        y = graph.call_function(torch.neg, (ys[i],))
        marker = graph.call_function(SITE, (y, x, bank, i))
        outs[i] = graph.call_method("clone", (marker,))
    graph.output(tuple(outs[i] for i in sorted(outs)))
    return fx.GraphModule(torch.nn.Module(), graph)


def run(gm: fx.GraphModule, case: Case, storage: torch.Tensor) -> list[torch.Tensor]:
    held = {**vars(case), "storage": storage}
    dims = {"owner": 0, "scale": 1}
    extras = [
        held[one.name] if one.length is None else held[one.name].narrow(dims[one.name], one.start, one.length)
        for one in routed_inputs(gm)
    ]
    return gm(case.x, *[-y for y in case.ys], *extras)


def routed_ops(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target is ROUTED]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize("lowering", ["aten", "reference"])
def test_siblings_read_one_storage(lowering, adjacent, bias):
    case = make_case((8, 3, 5), bias=bias, poison="free_a")
    storage, sites = stored(case, adjacent)
    gm = graph_of([0, 1, 2], 3)
    record = run_passes(gm, context := PassContext(lowering, BANK, sites))
    assert record is context.record
    (op,) = routed_ops(gm)
    assert len(op.args[2]) == (1 if adjacent else 3)
    assert op.args[-1] == lowering
    assert record.before["lorafx.site"] == 3
    assert record.after["lorafx.site"] == 0
    assert record.after["lorafx.routed_lora"] == 1
    (group,) = record.groups
    assert (group.op, group.parent, group.lowering) == ("routed_lora", "attn", lowering)
    assert [branch.name for branch in group.branches] == ["attn.q", "attn.k", "attn.v"]
    assert_delta(case, run(gm, case, storage))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_graphs_order_does_not_matter(order):
    """The op takes siblings as they are stored, so that their A's are one matrix."""
    case = make_case((8, 3, 5), poison="free_a")
    storage, sites = stored(case, adjacent=True)
    gm = graph_of(list(order), 3)
    run_passes(gm, PassContext("aten", BANK, sites))
    (op,) = routed_ops(gm)
    assert len(op.args[2]) == 1
    assert op.args[4] == case.caps
    assert_delta(case, run(gm, case, storage))


@pytest.mark.parametrize("present", [[0, 2], [2], [0], [1, 2], [0, 1]])
def test_some_siblings_are_not_in_the_graph(present):
    """q and v alone: k's rows stand between theirs."""
    case = make_case((8, 3, 5), poison="free_a")
    storage, sites = stored(case, adjacent=True)
    gm = graph_of(present, 3)
    run_passes(gm, PassContext("aten", BANK, sites))
    (op,) = routed_ops(gm)
    assert len(op.args[2]) == (2 if present == [0, 2] else 1)
    outs, expected = run(gm, case, storage), case.expected()
    for out, i in zip(outs, present, strict=True):
        torch.testing.assert_close(out.double(), expected[i], rtol=1e-5, atol=1e-5)


def test_a_sibling_without_rows_does_not_shift_the_windows():
    """k holds nothing, so q and v are adjacent in storage but not in the table of windows."""
    case = make_case((8, 3, 5), poison="free_a")
    storage, sites = stored(case, adjacent=True)
    q, k, v = sites
    gap = k.capacity * k.in_features
    kept = torch.cat([storage[: k.a_offset], storage[k.a_offset + gap :]])
    moved = {"b_offset": -gap}
    sites = [
        shifted(q, **moved),
        shifted(k, **moved, capacity=-k.capacity),
        shifted(v, **moved, a_offset=-gap, lane=-k.lanes),
    ]
    lanes = [*range(q.lanes), *range(q.lanes + k.lanes, len(case.owner))]
    narrower = replace(case, owner=case.owner[lanes])
    gm = graph_of([0, 2], 3)
    run_passes(gm, PassContext("reference", BANK, sites))
    outs, expected = run(gm, narrower, kept), case.expected()
    for out, i in zip(outs, [0, 2], strict=True):
        torch.testing.assert_close(out.double(), expected[i], rtol=1e-5, atol=1e-5)


def shifted(site: SiteGeometry, **by: int) -> SiteGeometry:
    return SiteGeometry(
        **{name: value + by.get(name, 0) if name in by else value for name, value in vars(site).items()}
    )


def test_parents_part_groups():
    case = make_case((8, 3, 5), poison="free_a")
    storage, sites = stored(case, adjacent=True)
    sites[2] = replace(sites[2], parent="other")
    gm = graph_of([0, 1, 2], 3)
    record = run_passes(gm, PassContext("aten", BANK, sites))
    assert [(group.parent, len(group.branches)) for group in record.groups] == [("attn", 2), ("other", 1)]
    assert_delta(case, run(gm, case, storage))


def test_markers_of_another_bank_stay():
    _, sites = stored(make_case((8, 3, 5)), adjacent=True)
    gm = graph_of([0, 1, 2], 3, bank=BANK + 1)
    record = run_passes(gm, PassContext("aten", BANK, sites))
    assert record.after["lorafx.site"] == 3
    assert not record.groups
    assert not routed_inputs(gm)


def test_inputs_stand_behind_the_graphs_own_and_are_made_once():
    _, sites = stored(make_case((8, 3, 5)), adjacent=True)
    gm = graph_of([0, 1], 3)
    run_passes(gm, PassContext("aten", BANK, sites))
    wanted = routed_inputs(gm)
    assert [one.name for one in wanted[: len(ROUTING)]] == list(ROUTING)
    assert sorted(one.name for one in wanted[len(ROUTING) :]) == ["owner", "scale", "storage", "windows"]
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    assert [node.target for node in placeholders[:4]] == ["x", "y0", "y1", "y2"]
    assert len(placeholders) == 4 + len(wanted)
    for one in wanted:
        assert attach_input(gm, one) in placeholders
    assert routed_inputs(gm) == wanted
    assert RoutedInput("scale", 0, 2) in wanted  # this group's part of the table


def test_shape_of_x_is_recorded():
    case = make_case((8, 3, 5))
    _, sites = stored(case, adjacent=True)
    gm = graph_of([0, 1, 2], 3)
    next(iter(gm.graph.nodes)).meta["example_value"] = case.x
    record = run_passes(gm, PassContext("aten", BANK, sites))
    assert record.shapes == {f"attn.{name}": tuple(case.x.shape) for name in "qkv"}
