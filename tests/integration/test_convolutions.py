"""LoRA on Conv2d and an embedding beside linear layers, on both roads, held to PEFT's eager result."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lorafx

from .models import EAGER_GRAPH
from .other_layers import (
    ADAPTERS,
    MIXED,
    TARGETS,
    assert_same_delta,
    build,
    filled,
    inputs,
    pefts_names,
    run,
    state_of,
    with_adapters,
)


@pytest.fixture(scope="module")
def base():
    return run(build())


@pytest.fixture(scope="module")
def plain():
    """Never compiled: what the others are held to."""
    return with_adapters(build(), ADAPTERS)


@pytest.fixture
def pair():
    reference = with_adapters(build(), ADAPTERS)
    room = {"max_adapters": 5, "max_rank": 8, "target_modules": TARGETS}
    return lorafx.compile(copy.deepcopy(reference), options=EAGER_GRAPH, **room), reference


def test_peft_model_and_its_verbs_in_one_graph(pair, base):
    def same(names=None):
        got = run(model, names)
        assert_same_delta(got, run(reference, names and pefts_names(names)), base)
        return got

    model, reference = pair
    for name in ADAPTERS:
        for each in pair:
            each.set_adapter(name)
        same()
    got = same(MIXED)
    assert torch.equal(got[1], run(model, [None] * 5)[1])
    for each in pair:
        each.base_model.set_adapter(["a", "b"])
    same()
    for each in pair:
        with each.disable_adapter():
            assert torch.allclose(run(each), base, atol=1e-5)
        each.add_weighted_adapter(["a", "c"], [0.3, -0.8], "d", combination_type="cat")
        each.set_adapter("d")
    same()
    for each in pair:
        each.set_adapter("a")
        each.delete_adapter("d")
        each.delete_adapter("b")
        each.add_adapter("e", LoraConfig(r=3, target_modules=TARGETS))
        filled(each, seed=4)
        each.set_adapter("e")
    same()
    same(["e", None, "a", "c", "e"])
    model.lora.use({"a": 0.5, "e": -0.25})
    for each in (reference.base_model,):
        each.set_adapter(["a", "e"])
        for layer in each.modules():
            if hasattr(layer, "scaling"):
                layer.scaling = {k: v * {"a": 0.5, "e": -0.25}.get(k, 1) for k, v in layer.scaling.items()}
    assert_same_delta(run(model), run(reference), base)
    report = lorafx.explain(model)
    assert not report.skipped
    assert len(report.graphs) == 1
    assert {group.op for group in report.groups} == {"routed_lora", "routed_conv2d", "routed_embedding"}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert all(value.is_contiguous() for value in model.state_dict().values())
    lorafx.uncompile(model)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("lowering", ["auto", "reference"])
def test_plain_model(plain, base, lowering):
    states = {name: state_of(plain, name) for name in ADAPTERS}
    model = lorafx.compile(build(), states, max_adapters=4, options={**EAGER_GRAPH, "lowering": lowering})
    want = run(plain, pefts_names(MIXED))
    assert_same_delta(run(model, MIXED), want, base)
    model.lora.load("twin", states["c"])
    assert_same_delta(run(model, ["b", None, "a", "twin", "a"]), want, base)
    model.lora.unload("c")
    model.lora.replace("twin", states["a"])
    assert_same_delta(run(model, ["b", None, "twin", None, "a"])[[0, 2, 4]], want[[0, 2, 4]], base[[0, 2, 4]])
    assert torch.equal(run(model, [None] * 5), base)
    assert len(lorafx.explain(model).graphs) == 1


@pytest.mark.parametrize("names", [None, MIXED])
def test_bfloat16_base_with_float32_adapters(names):
    reference = with_adapters(build(torch.bfloat16), ADAPTERS)
    assert {p.dtype for n, p in reference.named_parameters() if "lora_" in n} == {torch.float32}
    given, base = inputs(dtype=torch.bfloat16), run(build(torch.bfloat16), None, inputs(dtype=torch.bfloat16))
    model = lorafx.compile(copy.deepcopy(reference), options=EAGER_GRAPH)
    got, want = run(model, names, given), run(reference, names and pefts_names(names), given)
    assert got.dtype == torch.bfloat16
    # PEFT rounds a mixed batch's delta before it adds it; neither may be further from double precision than that
    assert_same_delta(got, want, base, 2e-2)


def test_an_adapter_costs_its_true_bytes():
    def large():
        torch.manual_seed(0)
        return nn.ModuleDict({"conv": nn.Conv2d(32, 64, 3), "words": nn.Embedding(500, 32)})

    made = filled(get_peft_model(large(), LoraConfig(r=16, target_modules=["conv", "words"])))
    state = state_of(made, "default")
    model = lorafx.compile(large(), {"a": state}, mode="eager")
    true = 4 * sum(tensor.numel() for tensor in state[0].values())
    assert true <= model.lora.nbytes <= 1.01 * true


def test_no_batch_dimension_and_gradients(pair, base):
    """One picture by itself; and PEFT's own modules where weights are trained, with the same gradients."""
    x, labels = inputs()
    with torch.no_grad():
        single = [each.get_base_model().strided(x[0]) for each in pair]
    assert torch.allclose(*single, atol=1e-5)
    grads = []
    for each in pair:
        each.set_adapter("b")
        each(x, labels).square().sum().backward()
        grads.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert any("strided.lora_A" in name for name in grads[0])
    for name, grad in grads[1].items():
        assert torch.allclose(grads[0][name], grad, rtol=1e-4, atol=1e-5 * float(grad.norm())), name


def test_a_selection_with_gradients(pair):
    """model.lora.use over weights that are being trained: row by row, through PEFT's modules."""
    model, reference = pair
    model.lora.use(MIXED)
    got = model(*inputs())
    assert got.requires_grad
    want = run(reference, pefts_names(MIXED))
    assert torch.allclose(got, want, atol=1e-4)


def grouped():
    return nn.Conv2d(8, 8, 3, groups=2)


class Standardized(nn.Conv2d):
    """As timm's: its weight is not what it multiplies by."""

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=self.padding)


LEFT = {
    "groups": (grouped, "2 groups"),
    "a class of its own": (lambda: Standardized(8, 8, 3, padding=1), "Standardized"),
    "uneven padding": (lambda: nn.Conv2d(8, 8, 2, padding="same"), "padding"),
    "max_norm": (lambda: nn.Embedding(9, 4, max_norm=1.0), "max_norm"),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_left_to_peft_is_its_result(kind):
    make, reason = LEFT[kind]

    def build_one():
        torch.manual_seed(0)
        return nn.ModuleDict({"layer": make(), "head": nn.Linear(4, 4)}).eval()

    x = torch.tensor([[1, 5], [8, 2]]) if kind == "max_norm" else torch.randn(2, 8, 6, 6)
    reference = filled(get_peft_model(build_one(), LoraConfig(r=4, target_modules=["layer", "head"])))
    model = lorafx.compile(copy.deepcopy(reference), mode="eager")
    skipped = lorafx.explain(model).skipped
    assert [item.name for item in skipped] == ["layer"]
    assert reason in skipped[0].reason
    with torch.no_grad():
        got, want = (each.get_base_model()["layer"](x) for each in (model, reference))
    assert torch.equal(got, want)
    with pytest.raises(lorafx.AdapterFormatError, match=f"adapts layer, .*{reason}.*pass the PeftModel"):
        lorafx.compile(build_one(), {"a": state_of(reference, "default")}, mode="eager")


HOSTILE = {
    "A of another kernel": ("strided.lora_A.weight", lambda t: t[..., :2]),
    "A as a matrix": ("strided.lora_A.weight", lambda t: t.flatten(1)),
    "B with a kernel": ("strided.lora_B.weight", lambda t: t.expand(-1, -1, 3, 3)),
    "another rank in B": ("strided.lora_B.weight", lambda t: t[:, :1]),
    "fewer entries": ("labels.lora_embedding_A", lambda t: t[:, :5]),
    "more entries": ("labels.lora_embedding_A", lambda t: torch.cat([t, t], 1)),
    "another width": ("labels.lora_embedding_B", lambda t: t[:3]),
    "four dimensions": ("labels.lora_embedding_B", lambda t: t[..., None, None]),
    "three dimensions": ("labels.lora_embedding_B", lambda t: t[..., None]),
    "a NaN": ("strided.lora_A.weight", lambda t: torch.full_like(t, float("nan"))),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_wrong_tensors_change_nothing(kind, plain, base):
    states = {name: state_of(plain, name) for name in "ac"}
    model = lorafx.compile(build(), {"a": states["a"]}, max_adapters=2, mode="eager")
    want, names = run(model), model.lora.names
    key, change = HOSTILE[kind]
    tensors = {k: change(v).clone() if k.endswith(key) else v for k, v in states["c"][0].items()}
    assert any(tensors[k] is not v for k, v in states["c"][0].items())
    for verb, name in ((model.lora.load, "c"), (model.lora.replace, "a")):
        with pytest.raises((lorafx.AdapterFormatError, lorafx.AdapterMismatchError)):
            verb(name, (tensors, states["c"][1]))
    assert model.lora.names == names
    assert torch.equal(run(model), want)


def test_room_without_rank_and_batches_of_any_size(plain, base):
    model = lorafx.compile(build(), max_adapters=2, target_modules=TARGETS, options=EAGER_GRAPH)
    kinds = ["routed_lora", "routed_embedding", "routed_conv2d", "routed_conv2d", "routed_conv2d"]
    assert [group.op for group in lorafx.explain(model).groups] == kinds  # before the first call, from the modules
    assert torch.allclose(run(model), base, atol=1e-5)
    model.lora.load("a", state_of(plain, "a"))
    model.lora.use("a")
    assert_same_delta(run(model), run(plain), base)
    assert len(lorafx.explain(model).retraces) == 1
    for rows in (2, 7, 3):
        given = inputs(rows)
        assert_same_delta(run(model, None, given), run(plain, None, given), run(build(), None, given))
    assert len(lorafx.explain(model).graphs) == 3  # the first, the one with room, and one for any number of rows


def _row_too_far(node: torch.fx.Node) -> None:
    window = node.args[5]
    storage, size, stride, offset = window.args
    window.args = (storage, size, stride, offset + size[1])


def _of_another_size(node: torch.fx.Node) -> None:
    node.args = (*node.args[:4], [*node.args[4][:2], 1, 1, *node.args[4][4:]], *node.args[5:])


def _not_scaled(node: torch.fx.Node) -> None:
    with node.graph.inserting_before(node):
        ones = node.graph.call_function(torch.ones_like, (node.args[11],))
    node.args = (*node.args[:11], ones, *node.args[12:])


@pytest.mark.parametrize("bug", [_row_too_far, _of_another_size, _not_scaled])
def test_a_wrong_rewrite_is_undone(bug, monkeypatch):
    """The op of one convolution is wrong: its marker stays, the others are fused, and the result is PEFT's."""
    module = importlib.import_module("lorafx.passes.fuse_layers")  # the package has a function of this name
    right = module._routed

    def wrong(gm, marker, site, lowering):
        node = right(gm, marker, site, lowering)
        if site.name == "strided":
            bug(node)
        return node

    monkeypatch.setattr(module, "_routed", wrong)
    reference = with_adapters(build(), ADAPTERS)
    model = lorafx.compile(build(), {name: state_of(reference, name) for name in ADAPTERS}, options=EAGER_GRAPH)
    assert_same_delta(run(model, MIXED), run(reference, pefts_names(MIXED)), run(build()))
    report = lorafx.explain(model)
    assert [item.name for item in report.skipped] == ["strided"]
    assert {branch.name for group in report.groups for branch in group.branches} == {*TARGETS} - {"strided"}
