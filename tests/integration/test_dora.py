"""DoRA: PEFT's eager results, on plain models and on PeftModels, one graph, norms computed once for each change."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter

import lorafx
from lorafx import dora, passes
from tests.integration.fused_models import fused_llama
from tests.integration.models import (
    EAGER_GRAPH,
    FAMILIES,
    LLAMA,
    Family,
    config,
    difference,
    run,
    tokens,
    with_peft,
)

LAYERS = 1
ATEN = {**EAGER_GRAPH, "lowering": "aten"}
INPUTS = LLAMA.inputs(4)
NAMES = ["one", None, "plain", "two"]


def away_from_one(model, seed=3):
    """Magnitudes as training leaves them: not the norms that they begin as."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def saved(family: Family, folder, seed: int, **fields) -> str:
    torch.manual_seed(100 + seed)
    away_from_one(get_peft_model(family.build(LAYERS), config(**fields)), seed).save_pretrained(str(folder))
    return str(folder)


def three(family: Family, folder) -> dict[str, str]:
    """Two adapters with DoRA, of other ranks and layers, and a plain one."""
    qkv = list(family.qkv)
    return {
        "one": saved(family, folder / "one", 1, use_dora=True, target_modules="all-linear"),
        "two": saved(family, folder / "two", 2, use_dora=True, target_modules=qkv[:1], r=6, use_rslora=True),
        "plain": saved(family, folder / "plain", 3, target_modules=qkv),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return three(LLAMA, tmp_path_factory.mktemp("dora"))


def delta_error(got, want, base):
    """rel-L2 of the delta"""
    return difference(got - base, want - base)


def rows_of(model, reference, inputs, names):
    """Each row as PEFT gives it with that adapter alone; the base model's from the compiled model when idle."""
    alone = {None: run(model, inputs, None)}
    for name in filter(None, names):
        reference.set_adapter(name)
        alone[name] = run(reference, inputs)
    return torch.stack([alone[name][i] for i, name in enumerate(names)])


def check(model, reference, family=LLAMA, names=NAMES, tolerance=1e-5):
    """One adapter at a time and a mixed batch, through adapter_names."""
    inputs = family.inputs(len(names))
    model.lora.use(None)
    base = run(model, inputs)
    for name in dict.fromkeys(filter(None, names)):
        reference.set_adapter(name)
        assert delta_error(run(model, inputs, [name] * len(names)), run(reference, inputs), base) <= tolerance
    got = run(model, inputs, names)
    assert delta_error(got, rows_of(model, reference, inputs, names), base) <= tolerance
    for i, name in enumerate(names):
        assert name is not None or torch.equal(got[i], base[i])


@pytest.mark.parametrize("options", [EAGER_GRAPH, ATEN, None], ids=["cpp", "aten", "eager"])
@pytest.mark.parametrize("peft", [False, True], ids=["plain", "peft"])
def test_dora_gives_what_peft_gives(folders, options, peft):
    reference = with_peft(LLAMA.build(LAYERS), folders)
    how = {"mode": "eager"} if options is None else {"options": options}
    model = with_peft(LLAMA.build(LAYERS), folders) if peft else LLAMA.build(LAYERS)
    model = lorafx.compile(model, None if peft else folders, **how)
    check(model, reference)
    report = lorafx.explain(model)
    assert (len(report.graphs), report.recompiles, report.skipped) == (0 if options is None else 1, 0, [])


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_layers_with_biases_and_conv1d(name, tmp_path):
    family, folders = FAMILIES[name], three(FAMILIES[name], tmp_path)
    reference = with_peft(family.build(LAYERS), folders)
    with torch.no_grad():
        for each in reference.get_base_model().modules():
            if isinstance(getattr(each, "bias", None), torch.nn.Parameter):
                each.bias.copy_(torch.randn_like(each.bias) * 0.3)
    reference.double()  # what the adapters add is small here, beside the rounding of float32
    model = lorafx.compile(copy.deepcopy(reference).unload(), folders, options=EAGER_GRAPH)
    check(model, reference, family, tolerance=1e-6)  # a scale of rsLoRA is kept in float32


class Two(torch.nn.Module):
    """Few enough layers for Inductor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(16, 24), torch.nn.Linear(24, 8)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("lowering", ["cpp", "aten"])
def test_inductor_computes_the_same(tmp_path, lowering):
    torch.manual_seed(1)
    reference = get_peft_model(Two(), config(use_dora=True, target_modules=["first", "second"]))
    reference.add_adapter("plain", config(target_modules=["first"]))
    away_from_one(reference).eval().save_pretrained(str(tmp_path))
    folders = {"one": tmp_path, "plain": tmp_path / "plain"}
    model = lorafx.compile(Two(), folders, options={"lowering": lowering}, max_adapters=2)
    x, want = torch.randn(4, 16), {}
    with torch.no_grad():
        for name in ("default", "plain"):
            reference.set_adapter(name)
            want[name] = reference(x)
        base = model(x)
        got = model(x, adapter_names=["one", None, "plain", "one"])
    expected = torch.stack([want["default"][0], base[1], want["plain"][2], want["default"][3]])
    assert delta_error(got, expected, base) <= 1e-5
    assert torch.equal(got[1], base[1])
    assert len(lorafx.explain(model).graphs) == 1


class Deep(torch.nn.Module):
    """Layers that share one compiled part."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(Two() for _ in range(4))
        for layer in self.layers:
            layer.second = torch.nn.Linear(24, 16)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


def test_layers_that_share_a_part_keep_factors_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("lorafx.outlined.compile_whole", lambda gm, inputs, patches: gm.forward)
    torch.manual_seed(1)
    reference = get_peft_model(Deep(), config(use_dora=True, target_modules=["first", "second"]))
    away_from_one(reference).eval().save_pretrained(str(tmp_path))
    model, x = lorafx.compile(Deep(), {"one": tmp_path}), torch.randn(2, 16)
    with torch.no_grad():
        base = model(x, adapter_names=[None, None])
        assert delta_error(model(x), reference(x), base) <= 1e-5
    assert lorafx.explain(model).graphs[0].outlined == 3


# ------------------------------------------------------------------------------------------------ proved


def no_bias(gm, node):
    node.update_arg(1, None)


def rows_of_the_neighbour(gm, node):
    node.update_arg(3, gm.graph.call_function(torch.roll, (node.args[3], 1, 0)))


def other_way(gm, node):
    node.update_arg(2, gm.graph.call_function(torch.neg, (node.args[2],)))


def sizes_alone(gm, node):
    node.update_arg(2, gm.graph.call_function(torch.zeros_like, (node.args[2],)))


@pytest.mark.parametrize("bug", [no_bias, rows_of_the_neighbour, other_way, sizes_alone], ids=lambda bug: bug.__name__)
def test_a_wrong_rewrite_is_undone(tmp_path, monkeypatch, bug):
    def wrong(gm, context):
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.lorafx.scaled_rows.default):
            if node.meta["lorafx_stands_for"].name == "first":
                with gm.graph.inserting_before(node):
                    bug(gm, node)
        return 0

    torch.manual_seed(1)
    reference = get_peft_model(Two(), config(use_dora=True, target_modules=["first", "second"]))
    away_from_one(reference).eval().save_pretrained(str(tmp_path))
    monkeypatch.setattr(passes, "REWRITE", (*passes.REWRITE[:-1], wrong, passes.REWRITE[-1]))
    x, names = torch.randn(4, 16), ["one", None, None, "one"]
    with torch.no_grad():
        model = lorafx.compile(Two(), {"one": tmp_path}, options=EAGER_GRAPH)
        base, got = model(x, adapter_names=[None] * 4), model(x, adapter_names=names)
        assert delta_error(got[[0, 3]], reference(x)[[0, 3]], base[[0, 3]]) <= 1e-5
        assert torch.equal(got[1:3], base[1:3])
    report = lorafx.explain(model)
    assert [skipped.name for skipped in report.skipped] == ["first"]
    assert report.graphs[0].passes.after["lorafx.magnitude"] == 1
    assert report.graphs[0].passes.after["lorafx.scaled_rows"] == 1
    assert report.graphs[0].passes.after["lorafx.routed_lora"] == 2


def test_the_graph_has_no_marker_left_and_no_break(folders):
    model = lorafx.compile(LLAMA.build(LAYERS), folders, options=EAGER_GRAPH)
    run(model, INPUTS)
    (graph,) = model._lorafx_runtime.graphs
    sites = len(model.lora.store.sites)
    assert (graph.passes.before["lorafx.magnitude"], graph.passes.after["lorafx.magnitude"]) == (sites, 0)
    assert graph.passes.after["lorafx.scaled_rows"] == sites


def test_norms_are_computed_once_and_not_by_calls(folders):
    for model in (LLAMA.build(LAYERS), with_peft(LLAMA.build(LAYERS), folders)):
        model = lorafx.compile(model, None if isinstance(model, PeftModel) else folders, mode="eager")
        table = model.lora.store.dora
        assert table.computed == 7 + 1  # all seven layers, and q
        for names in (["one"] * 4, NAMES, None):
            run(model, INPUTS, names)
        assert table.computed == 8


def test_the_product_is_never_whole(monkeypatch):
    monkeypatch.setattr(dora, "BLOCK", 64)
    weight, a, b = torch.randn(37, 16), torch.randn(4, 16), torch.randn(37, 4)
    sizes = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **kw: sizes.append(args[0].shape[0]) or addmm(*args, **kw))
    got = dora.norms(weight, a, b, 0.7, torch.float32)
    assert max(sizes) == 4
    want = (weight.double() + 0.7 * b.double() @ a.double()).norm(dim=1)
    assert difference(got, want) <= 1e-7


# ------------------------------------------------------------------------------------------------ what changes


def optimizer_step(model):
    parameters = [p for n, p in model.named_parameters() if ".one." in n]
    for i, parameter in enumerate(parameters):
        parameter.requires_grad_(True)
        parameter.grad = torch.full_like(parameter, 0.1 * (i % 3))
    torch.optim.SGD(parameters, lr=0.2).step()
    for parameter in parameters:
        parameter.requires_grad_(False)


def state_dict_loaded(model):
    model.load_state_dict({k: v * 1.1 if ".one." in k else v for k, v in model.state_dict().items()})


def base_edited(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer.weight" in name:
                parameter.mul_(torch.linspace(0.5, 2, parameter.shape[1]))


def magnitude_edited(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(0.9)


def scaled(model):
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("one", 0.4)


def half_and_back(model):
    model.to(torch.bfloat16).to(torch.float32)


def merged_and_back(model):
    model.merge_adapter(["one"])
    model.unmerge_adapter()


def exchanged(model):
    torch.manual_seed(11)
    model.delete_adapter("one")
    model.add_adapter("one", config(r=3, use_dora=True, target_modules=["v_proj", "o_proj"]))
    model.eval()
    away_from_one(model, 8)
    model.set_adapter("one")


EDITS = [
    optimizer_step,
    state_dict_loaded,
    base_edited,
    magnitude_edited,
    scaled,
    half_and_back,
    merged_and_back,
    exchanged,
]
SLOW_EDITS = [state_dict_loaded, half_and_back]  # like others here


@pytest.mark.parametrize(
    "edit", [pytest.param(e, marks=[pytest.mark.slow] * (e in SLOW_EDITS)) for e in EDITS], ids=lambda e: e.__name__
)
def test_edits_of_pefts_weights_are_seen_without_a_new_trace(folders, edit):
    model, reference = (with_peft(LLAMA.build(LAYERS), folders) for _ in range(2))
    lorafx.compile(model, options=EAGER_GRAPH)
    before = run(model, INPUTS)
    for each in (model, reference):
        edit(each)
        each.set_adapter("one")
    after = run(model, INPUTS)
    with reference.disable_adapter():
        base = run(reference, INPUTS)
    assert delta_error(after, run(reference, INPUTS), base) <= 1e-5
    assert difference(after, before) > 1e-3 or edit is merged_and_back or edit is half_and_back
    check(model, reference)
    assert len(lorafx.explain(model).graphs) == 1


def test_hotswap_is_pefts_and_replace_does_what_it_can_not(folders, tmp_path):
    """peft 0.21.2 finds no magnitudes to swap: it raises before anything is changed."""
    new = saved(LLAMA, tmp_path, 7, use_dora=True, target_modules="all-linear", lora_alpha=3)
    model, reference = (with_peft(LLAMA.build(LAYERS), folders) for _ in range(2))
    lorafx.compile(model, options=EAGER_GRAPH)
    before = run(model, INPUTS)
    for each in (model, reference):
        with pytest.raises(KeyError, match="lora_magnitude_vector"):
            hotswap_adapter(each, new, adapter_name="one")
    assert torch.equal(run(model, INPUTS), before)
    model.lora.replace("one", new)
    check(model, with_peft(LLAMA.build(LAYERS), {**folders, "one": new}))
    assert len(lorafx.explain(model).graphs) == 1


def test_pefts_verbs_trace_nothing_anew(folders):
    model, reference = (with_peft(LLAMA.build(LAYERS), folders) for _ in range(2))
    lorafx.compile(model, options=EAGER_GRAPH)
    for each in (model, reference):
        each.set_adapter("two")
    assert difference(run(model, INPUTS), run(reference, INPUTS)) <= 1e-5
    with model.disable_adapter(), reference.disable_adapter():
        assert difference(run(model, INPUTS), run(reference, INPUTS)) <= 1e-5
    for each in (model, reference):
        each.delete_adapter("two")
        each.load_adapter(folders["two"], "again")
        each.set_adapter("again")
        each.eval()
    assert difference(run(model, INPUTS), run(reference, INPUTS)) <= 1e-5
    check(model, reference, names=["again", None, "one", "plain"])
    assert (len(lorafx.explain(model).graphs), lorafx.explain(model).recompiles) == (1, 0)


def test_a_base_weight_edited_under_a_plain_model(folders):
    model = lorafx.compile(LLAMA.build(LAYERS), folders, options=EAGER_GRAPH)
    reference = with_peft(LLAMA.build(LAYERS), folders)
    run(model, INPUTS, NAMES)
    base_edited(reference)
    with torch.no_grad():
        for path in model.lora.store.index:
            weight = model.get_submodule(path).weight
            weight.mul_(torch.linspace(0.5, 2, weight.shape[1]))
    check(model, reference)
    model.load_state_dict({key: value * 1.5 for key, value in model.state_dict().items()})
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "lora_" not in name:
                parameter.mul_(1.5)
    check(model, reference)


def test_load_replace_and_unload(folders, tmp_path):
    other = saved(LLAMA, tmp_path / "other", 9, use_dora=True, r=5, target_modules=["k_proj", "up_proj"])
    reference = with_peft(LLAMA.build(LAYERS), {**folders, "other": other})
    model = lorafx.compile(LLAMA.build(LAYERS), folders, max_adapters=4, max_rank=8, options=EAGER_GRAPH)
    run(model, INPUTS, NAMES)
    model.lora.load("other", other)
    check(model, reference, names=["other", "one", None, "two"])
    model.lora.replace("two", other)
    reference.delete_adapter("two")
    reference.load_adapter(other, "two")
    check(model, reference.eval(), names=["two", "one", None, "plain"])
    model.lora.replace("two", folders["plain"])  # one without DoRA in the place of one with
    reference.delete_adapter("two")
    reference.load_adapter(folders["plain"], "two")
    check(model, reference.eval(), names=["two", "one", None, "other"])
    model.lora.use(None)
    taken = model.lora.nbytes - model.lora.reserved
    model.lora.unload("other")
    assert model.lora.nbytes - model.lora.reserved < taken
    assert (len(lorafx.explain(model).graphs), lorafx.explain(model).recompiles) == (1, 0)


def test_dora_in_the_place_of_the_same_layers_without_it(tmp_path):
    """The rows are as long, so replace might take it for a copy of numbers alone, and leave the magnitudes out."""
    plain = saved(LLAMA, tmp_path / "plain", 9, r=4, target_modules=["q_proj", "v_proj"])
    dora = saved(LLAMA, tmp_path / "dora", 10, use_dora=True, r=4, target_modules=["q_proj", "v_proj"])
    model = lorafx.compile(LLAMA.build(LAYERS), {"one": plain}, mode="eager")
    for source in (dora, plain, dora):
        model.lora.replace("one", model.lora.read(source))
        check(model, with_peft(LLAMA.build(LAYERS), {"one": source}), names=["one", None])


def test_the_first_dora_adapter_costs_one_trace_and_says_so(folders):
    model = lorafx.compile(
        LLAMA.build(LAYERS), {"plain": folders["plain"]}, max_adapters=3, max_rank=8, options=EAGER_GRAPH
    )
    reference = with_peft(LLAMA.build(LAYERS), folders)
    run(model, INPUTS)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        model.lora.load("two", folders["two"])
    assert "'two' has DoRA on layers where none had it before" in lorafx.explain(model).retraces[0]
    check(model, reference, names=["two", None, "plain", "two"])
    assert len(lorafx.explain(model).graphs) == 2


def test_on_a_peft_model_load_replace_unload_and_a_first_one(folders):
    model = with_peft(LLAMA.build(LAYERS), {"plain": folders["plain"]})
    model = lorafx.compile(model, max_adapters=3, max_rank=8, target_modules="all-linear", options=EAGER_GRAPH)
    reference = with_peft(LLAMA.build(LAYERS), folders)
    run(model, INPUTS)
    model.lora.load("two", folders["two"])
    model.lora.load("one", folders["one"])
    check(model, reference)
    traced = len(lorafx.explain(model).graphs)
    model.lora.replace("one", folders["two"])
    check(model, reference, names=["two", None, "plain", "two"])
    reference.delete_adapter("one")
    reference.load_adapter(folders["two"], "one")
    check(model, reference.eval())
    model.lora.unload("two")
    reference.set_adapter("one")
    assert difference(run(model, INPUTS, ["one"] * 4), run(reference, INPUTS)) <= 1e-5
    assert len(lorafx.explain(model).graphs) == traced


def test_failed_changes_leave_everything(folders, tmp_path):
    tensors = get_peft_model_state_dict(with_peft(LLAMA.build(LAYERS), {"one": folders["one"]}), adapter_name="one")
    fields = LoraConfig.from_pretrained(folders["one"])
    key = next(key for key in tensors if "magnitude" in key)
    broken = {
        "holds NaN or Inf": {**tensors, key: torch.full_like(tensors[key], torch.nan)},
        "missing in the file": {k: v for k, v in tensors.items() if k != key},
        "size mismatch": {**tensors, key: torch.ones(3)},
    }
    model = lorafx.compile(LLAMA.build(LAYERS), folders, options=EAGER_GRAPH)
    before = run(model, INPUTS, NAMES)
    for message, state in broken.items():
        for change in (lambda s: model.lora.load("new", s), lambda s: model.lora.replace("one", s)):
            with pytest.raises(lorafx.LorafxError, match=message):
                change((state, fields))
    assert torch.equal(run(model, INPUTS, NAMES), before)
    assert len(lorafx.explain(model).graphs) == 1


def test_a_put_that_fails_half_way_puts_the_factors_back(folders, monkeypatch):
    model = lorafx.compile(LLAMA.build(LAYERS), folders, mode="eager")
    before = run(model, INPUTS, NAMES)
    store = model.lora.store
    factors = store.factors.clone()

    def fail(*args):
        raise MemoryError("injected")

    monkeypatch.setattr("lorafx.store.copy_all", fail)
    for source in (folders["two"], folders["plain"], folders["one"]):
        with pytest.raises(MemoryError):
            model.lora.replace("one", source)
    monkeypatch.undo()
    assert torch.equal(store.factors, factors)
    assert torch.equal(run(model, INPUTS, NAMES), before)


def test_what_dora_does_not_do_is_refused_by_name(folders):
    model = lorafx.compile(LLAMA.build(LAYERS), folders, options=EAGER_GRAPH)
    peft = lorafx.compile(with_peft(LLAMA.build(LAYERS), folders), options=EAGER_GRAPH)
    for each in (model, peft):
        with pytest.raises(lorafx.UnsupportedModelError, match="one has DoRA, whose norms are those of weight 1"):
            each.lora.use({"one": 0.5})
        with pytest.raises(lorafx.UnsupportedModelError, match="DoRA, which scales what the adapters beside it"):
            each.lora.use({"plain": 1.0, "one": 1.0})
        with pytest.raises(lorafx.UnsupportedModelError, match="alone on its row, and with weight 1"):
            run(each, INPUTS, ["plain", None, {"one": 2.0}, "two"])
        each.lora.use({"plain": 0.5})
        run(each, INPUTS)


def test_several_active_adapters_run_as_peft_computes_them(folders):
    model, reference = (with_peft(LLAMA.build(LAYERS), folders) for _ in range(2))
    lorafx.compile(model, options=EAGER_GRAPH)
    for each in (model, reference):
        each.base_model.set_adapter(["plain", "one"])
    with pytest.warns(UserWarning, match="one has DoRA"):
        assert torch.equal(run(model, INPUTS), run(reference, INPUTS))
    assert "DoRA" in lorafx.explain(model).uncompiled
    for each in (model, reference):
        each.set_adapter("one")
    check(model, reference)


def test_gradients_and_dropout_are_pefts(folders):
    model, reference = (with_peft(LLAMA.build(LAYERS), folders) for _ in range(2))
    lorafx.compile(model, mode="eager")
    for each in (model, reference):
        each.set_adapter("one")  # which makes it trainable
        each(**INPUTS, labels=tokens(4)).loss.backward()
    want = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    assert any("magnitude" in name for name in got)
    assert all(difference(got[name], want[name]) <= 1e-4 for name in want)


def test_gradients_through_a_frozen_adapter(folders):
    model = lorafx.compile(LLAMA.build(LAYERS), {"one": folders["one"]}, options=EAGER_GRAPH)
    reference = with_peft(LLAMA.build(LAYERS), {"one": folders["one"]}).requires_grad_(False)
    grads = []
    for each in (model.requires_grad_(False), reference):
        embeds = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4)).requires_grad_(True)
        each(inputs_embeds=embeds).logits.square().sum().backward()
        grads.append(embeds.grad)
    assert difference(*grads) <= 1e-5


def test_gradients_of_rows_with_adapters_of_their_own(folders):
    """Under gradient checkpointing: the backward computes layers again when the call, and what it chose, is over."""
    model = lorafx.compile(LLAMA.build(LAYERS), folders, options=EAGER_GRAPH).requires_grad_(False)
    reference = with_peft(LLAMA.build(LAYERS), folders).requires_grad_(False)
    grads = []
    for each in (model, reference):
        embeds = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(4)).requires_grad_(True)
        if each is model:
            each.train().gradient_checkpointing_enable({"use_reentrant": False})
            each(inputs_embeds=embeds, adapter_names=NAMES).logits.square().sum().backward()
        else:  # PEFT does not mix DoRA: one row after the other
            for i, name in enumerate(NAMES):
                with each.disable_adapter() if name is None else contextlib.nullcontext():
                    each.set_adapter(name or "one")
                    each.requires_grad_(False)
                    each(inputs_embeds=embeds[i : i + 1]).logits.square().sum().backward()
        grads.append(embeds.grad)
    assert difference(*grads) <= 1e-5
    (done,) = [g.passes for g in lorafx.explain(model).graphs if g.passes.after["tag_activation_checkpoint"]]
    assert (done.after["lorafx.magnitude"], done.after["lorafx.scaled_rows"]) == (0, len(model.lora.store.sites))
    assert done.skipped == []


def test_a_part_of_a_fused_layer_is_refused_by_name(folders, tmp_path):
    torch.manual_seed(5)
    away_from_one(get_peft_model(LLAMA.build(), config(use_dora=True, target_modules=["q_proj"]))).save_pretrained(
        str(tmp_path / "parts")
    )
    get_peft_model(LLAMA.build(), config(target_modules=["q_proj", "o_proj"])).save_pretrained(str(tmp_path / "plain"))
    away_from_one(get_peft_model(LLAMA.build(), config(use_dora=True, target_modules=["o_proj"]))).save_pretrained(
        str(tmp_path / "whole")
    )
    said = r"DoRA on model.layers.0.self_attn.q_proj needs the norms .* is a part of a fused layer"
    with pytest.raises(lorafx.UnsupportedModelError, match=said):
        lorafx.compile(fused_llama(), {"parts": tmp_path / "parts"}, mode="eager")
    model = lorafx.compile(fused_llama(), {"plain": tmp_path / "plain"}, max_adapters=2, mode="eager")
    with pytest.raises(lorafx.UnsupportedModelError, match=said):
        model.lora.load("parts", tmp_path / "parts")
    model.lora.load("whole", tmp_path / "whole")  # another layer, whose weight is its own
    reference = with_peft(LLAMA.build(), {"whole": tmp_path / "whole", "plain": tmp_path / "plain"})
    check(model, reference, names=["whole", None, "plain", "whole"])


def test_bfloat16_is_no_further_from_float64_than_peft(folders):
    exact = with_peft(LLAMA.build(LAYERS, dtype=torch.float64), folders)
    peft = with_peft(LLAMA.build(LAYERS, dtype=torch.bfloat16), folders)
    model = lorafx.compile(LLAMA.build(LAYERS, dtype=torch.bfloat16), folders, options=EAGER_GRAPH)
    for name in ("one", "two"):
        for each in (exact, peft):
            each.set_adapter(name)
        want = run(exact, INPUTS)
        ours, theirs = difference(run(model, INPUTS, [name] * 4), want), difference(run(peft, INPUTS), want)
        assert ours <= 1.1 * theirs


def test_a_copy_has_factors_of_its_own(folders):
    model = lorafx.compile(LLAMA.build(LAYERS), folders, mode="eager")
    reference = with_peft(LLAMA.build(LAYERS), folders)
    other = copy.deepcopy(model)
    model.lora.replace("one", folders["two"])
    check(other, reference)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(2)
    check(model, with_peft(LLAMA.build(LAYERS), {**folders, "one": folders["two"]}))


def test_an_adapter_store_serves_them(folders):
    model = lorafx.compile(LLAMA.build(LAYERS), lorafx.AdapterStore(folders), max_adapters=2, options=EAGER_GRAPH)
    reference = with_peft(LLAMA.build(LAYERS), folders)
    for names in (["one", None, "two", "one"], ["plain", "one", None, None], ["two", "plain", "plain", None]):
        base = run(model, INPUTS, [None] * 4)
        assert delta_error(run(model, INPUTS, names), rows_of(model, reference, INPUTS, names), base) <= 1e-5
    with pytest.raises(lorafx.UnsupportedModelError, match="DoRA"):
        model.lora.use({"one": 0.5})
    assert len(lorafx.explain(model).graphs) == 1
