"""PEFT's verbs on a compiled PeftModel: they act at once, as on a plain one, and trace nothing."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

import lorafx

from .in_threads import repeating
from .lockstep import (
    INPUTS,
    assert_equal_now,
    assert_mixed_batches_equal,
    assert_one_copy,
    assert_right,
    assert_uncompiled_right,
    in_step,
    lora_layers,
    nothing_traced,
)
from .models import (
    EAGER_GRAPH,
    LLAMA,
    assert_close,
    config,
    run,
    save_adapter,
    save_adapters,
    three_adapters,
    with_peft,
)

QKV = list(LLAMA.qkv)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    more = {
        "d": {"r": 16, "target_modules": ["q_proj", "k_proj"]},
        "e": {"r": 2, "lora_alpha": 3, "target_modules": QKV},
        "f": {"r": 3, "target_modules": ["v_proj"], "use_rslora": True},
    }
    return {**three_adapters(LLAMA, folder), **save_adapters(LLAMA, folder / "more", **more)}


def make_pair(folders, names="ab", **room):
    few = {name: folders[name] for name in names}
    model = lorafx.compile(with_peft(LLAMA.build(), few), options=EAGER_GRAPH, **room)
    run(model, INPUTS)
    return model, with_peft(LLAMA.build(), few)


@pytest.fixture
def pair(folders):
    """(compiled PeftModel, plain one), each with a and b; the compiled one was called."""
    return make_pair(folders, max_adapters=6, max_rank=32, target_modules="all-linear")


# ------------------------------------------------------------------------------------------------ nothing is traced


def noise(*shape):
    return torch.randn(*shape) * 0.2


def set_adapter(model, folders):
    for name in "bab":
        model.set_adapter(name)
        yield


def several_active(model, folders):
    model.base_model.set_adapter(["a", "b"])
    yield
    names = ["b", "a"]
    model.base_model.set_adapter(names)
    yield
    del names[0]  # which PEFT keeps
    yield


def disable_adapter(model, folders):
    model.set_adapter("b")
    with model.disable_adapter():
        yield
        model.set_adapter("a")
    yield
    model.base_model.disable_adapter_layers()
    yield
    model.base_model.enable_adapter_layers()
    yield


def load_adapter(model, folders):
    for name in "de":
        model.load_adapter(folders[name], adapter_name=name)
        yield
        model.set_adapter(name)
        yield


def add_adapter(model, folders):
    model.add_adapter("fresh", LoraConfig(r=5, target_modules=QKV))  # B is zero
    model.eval()
    yield
    model.set_adapter("fresh")
    yield
    model.add_adapter("random", config(r=3, target_modules=["k_proj"]))
    model.eval()
    yield


def delete_adapter(model, folders):
    model.delete_adapter("b")  # not active
    yield
    model.load_adapter(folders["e"], adapter_name="b")
    yield
    model.set_adapter("b")
    yield
    model.delete_adapter("b")  # active: PEFT makes another one active
    yield


def same_name_again(model, folders):
    """Deleted and loaded between two calls: neither names nor ranks tell."""
    model.delete_adapter("b")
    model.load_adapter(folders["e"], adapter_name="b")
    model.set_adapter("b")
    yield


def add_weighted_adapter(model, folders):
    model.add_adapter("same", config(r=4, target_modules=["q_proj"]))
    model.add_weighted_adapter(["a", "same"], [0.6, -0.5], "linear", combination_type="linear")
    model.add_weighted_adapter(["a", "b"], [0.6, 0.5], "cat", combination_type="cat")
    model.eval()
    for name in ("linear", "cat"):
        model.set_adapter(name)
        yield
    model.delete_adapter("cat")
    model.add_weighted_adapter(["a", "b"], [0.6, 0.5], "svd", combination_type="svd")
    model.set_adapter("svd")
    model.eval()
    yield


def scale_layers(model, folders):
    model.base_model.set_adapter(["a", "b"])
    for scale in (0.5, 3):
        for layer in lora_layers(model):
            layer.scale_layer(scale)
        yield
    for layer in lora_layers(model):
        layer.unscale_layer(3)
    yield
    for layer in lora_layers(model):
        layer.unscale_layer()
    yield
    for layer in lora_layers(model)[:2]:
        layer.set_scale("b", -0.3)
    yield
    for layer in lora_layers(model)[2:]:
        layer.scaling["b"] = 0.7
    yield


def rescale(model, folders):
    model.set_adapter("b")
    with rescale_adapter_scale(model, 0.3):
        yield
    yield


def edit_in_place(model, folders):
    model.set_adapter("b")
    for layer in lora_layers(model):
        for part in (layer.lora_A, layer.lora_B):
            part["b"].weight.data.copy_(noise(*part["b"].weight.shape))
    yield
    with torch.no_grad():
        lora_layers(model)[0].lora_B["b"].weight.mul_(-2)
    yield


def replace_data(model, folders):
    model.set_adapter("b")
    for layer in lora_layers(model):
        layer.lora_A["b"].weight.data = noise(*layer.lora_A["b"].weight.shape)
        layer.lora_B["b"].weight.data = noise(*layer.lora_B["b"].weight.shape)
    yield
    layer = lora_layers(model)[1]
    layer.lora_B["b"].weight = nn.Parameter(noise(*layer.lora_B["b"].weight.shape), requires_grad=False)
    yield


def replace_data_of_inactive_adapters(model, folders):
    """Seen when they are used."""
    for layer in lora_layers(model):
        if "a" in layer.lora_A:
            layer.lora_A["a"].weight.data = noise(*layer.lora_A["a"].weight.shape)
    model.set_adapter("b")
    yield


def other_state(model):
    return {key: noise(*value.shape) for key, value in model.state_dict().items()}


def load_state_dict(model, folders):
    model.load_state_dict(other_state(model))
    yield


def load_state_dict_assign(model, folders):
    model.load_state_dict(other_state(model), assign=True)
    model.requires_grad_(False)
    yield


def set_state_dict(model, folders):
    state = {key: noise(*value.shape) for key, value in get_peft_model_state_dict(model, adapter_name="b").items()}
    set_peft_model_state_dict(model, state, adapter_name="b")
    model.set_adapter("b")
    yield
    set_peft_model_state_dict(model, {k: v * 2 for k, v in state.items()}, adapter_name="b", low_cpu_mem_usage=True)
    yield


def train(optimizer):
    def verb(model, folders):
        model.set_adapter("b")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        steps = optimizer([p for p in model.parameters() if p.requires_grad])
        for _ in range(2):
            model(**INPUTS).logits.float().square().mean().backward()
            steps.step()
            steps.zero_grad()
            yield
            model.train()
            model.eval()

    return verb


TRACE_NOTHING = [
    set_adapter,
    several_active,
    disable_adapter,
    load_adapter,
    add_adapter,
    delete_adapter,
    same_name_again,
    add_weighted_adapter,
    scale_layers,
    rescale,
    edit_in_place,
    replace_data,
    replace_data_of_inactive_adapters,
    load_state_dict,
    load_state_dict_assign,
    set_state_dict,
]


@pytest.mark.parametrize("verb", TRACE_NOTHING)
def test_acts_at_once_and_traces_nothing(verb, pair, folders):
    with nothing_traced(pair[0]):
        in_step(pair, verb, folders, assert_right)
    assert_uncompiled_right(pair)


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.AdamW(p, lr=0.01)],
    ids=["SGD", "AdamW"],
)
def test_optimizer_steps(optimizer, pair, folders):
    """Gradients have a graph of their own, once; what the steps write, calls without gradients see at once."""
    in_step(pair, train(optimizer), folders, assert_right)
    with nothing_traced(pair[0]):
        in_step(pair, train(optimizer), folders, assert_right)
    assert_uncompiled_right(pair, 1e-4)


def test_who_spoke_last_decides(pair, folders):
    model, reference = pair
    model.lora.use("b")
    reference.set_adapter("b")
    assert_equal_now(pair)
    for each in pair:
        each.load_adapter(folders["e"], adapter_name="e")  # chooses nothing
    assert_equal_now(pair)
    for each in pair:
        each.set_adapter("a")  # which PEFT had active all along
    assert_equal_now(pair)
    model.set_adapter("b")
    model.lora.use("a")
    assert_equal_now(pair)
    with model.disable_adapter(), reference.disable_adapter():
        assert_equal_now(pair)
    assert_equal_now(pair)
    for names in (["a", "b"], ["a", "b"]):
        model.lora.use("e")
        for each in pair:
            each.base_model.set_adapter(names)
        assert_equal_now(pair)


# ------------------------------------------------------------------------------------------------ hotswap


def swapped(pair, name, folder):
    """hotswap_adapter on both; what loading it afresh gives is the measure, for PEFT is wrong with patterns."""
    for each in pair:
        each.set_adapter(name)
        hotswap_adapter(each, folder, adapter_name=name, torch_device="cpu")


SWAPS = {
    "same rank": {"r": 7, "lora_alpha": 10},
    "smaller rank, another alpha": {"r": 3, "lora_alpha": 20},
    "larger rank": {"r": 16},
    "subset of layers": {"r": 5, "target_modules": ["v_proj"]},
    "one layer": {"r": 9, "target_modules": ["v_proj"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("swap", SWAPS)
def test_hotswap(swap, folders, tmp_path):
    """Names that are no part of others: PEFT also zeroes adapters whose keys contain the name, as "b" is in "base"."""
    new = save_adapter(LLAMA, tmp_path, seed=4, **{"target_modules": QKV, **SWAPS[swap]})
    few = {"first": folders["a"], "second": folders["b"]}
    pair = make_pair(few, few, max_adapters=3, max_rank=32)
    fresh = with_peft(LLAMA.build(), {**few, "second": new})
    fresh.set_adapter("second")
    with nothing_traced(pair[0]):
        swapped(pair, "second", new)
        assert_right(pair)
        assert_equal_now((pair[0], fresh))
        assert_mixed_batches_equal((pair[0], fresh))
    assert_uncompiled_right(pair)


PATTERNS = {"q_proj": 20, "layers.1.self_attn.v_proj": 3}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("ranks", [{}, {"k_proj": 2, "layers.1.self_attn.v_proj": 6}])
@pytest.mark.parametrize("alphas", [{}, PATTERNS])
@pytest.mark.parametrize("prepared", [False, True])
def test_hotswap_with_patterns(rslora, ranks, alphas, prepared, tmp_path):
    """peft 0.21.2 finds no pattern here, and scales wrongly."""
    common = {"target_modules": QKV, "use_rslora": rslora, "alpha_pattern": alphas}
    old = save_adapter(LLAMA, tmp_path / "old", r=5, **common)
    new = save_adapter(LLAMA, tmp_path / "new", seed=4, r=7, lora_alpha=12, rank_pattern=ranks, **common)
    model, fresh = (with_peft(LLAMA.build(), {"b": folder}) for folder in (old, new))
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=16)
    lorafx.compile(model, options=EAGER_GRAPH, max_adapters=2, max_rank=16)
    run(model, INPUTS)
    with nothing_traced(model):
        hotswap_adapter(model, new, adapter_name="b", torch_device="cpu")
        assert_equal_now((model, fresh))
        assert_one_copy(model)
        assert_equal_now((model, fresh), ["b", "__base__"] * 2)
        hotswap_adapter(model, new, adapter_name="b", torch_device="cpu")
        assert_equal_now((model, fresh))
    lorafx.uncompile(model)
    assert_equal_now((model, fresh))


def test_hotswap_on_other_models_is_left_alone(folders, tmp_path):
    """What PEFT does where lorafx has compiled nothing is PEFT's business, wrong or not."""
    new = save_adapter(LLAMA, tmp_path, seed=4, r=7, target_modules=QKV, rank_pattern={"q_proj": 2})
    model, fresh = (with_peft(LLAMA.build(), {"b": folder}) for folder in (folders["b"], new))
    hotswap_adapter(model, new, adapter_name="b", torch_device="cpu")
    assert lora_layers(model)[0].scaling["b"] == 8 / 7 != lora_layers(fresh)[0].scaling["b"]


@pytest.mark.parametrize("rank", [7, 16])
def test_prepared_for_hotswap_after_compiling(rank, pair, folders):
    """Padded weights in new modules, and scales that are tensors, filled in place."""

    def verb(model, folders):
        model.set_adapter("b")
        prepare_model_for_compiled_hotswap(model, target_rank=16, check_compiled="ignore")
        yield
        for layer in lora_layers(model):
            layer.scale_layer(0.5)
        yield
        hotswap_adapter(model, folders["e"], adapter_name="b", torch_device="cpu")
        yield

    with nothing_traced(pair[0]):
        in_step(pair, verb, folders, assert_right)
    assert_uncompiled_right(pair)


# ------------------------------------------------------------------------------------------------ at a price, reported


def merged(safe, names=None):
    def verb(model, folders):
        model.set_adapter("b")
        model.merge_adapter(names, safe_merge=safe)
        yield

    return verb


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("names", [None, ["a"], ["a", "b"]])
def test_merge_and_unmerge(safe, names, pair, folders):
    model = pair[0]
    in_step(pair, merged(safe, names), folders, assert_equal_now)
    assert "unmerge_adapter() ends that" in lorafx.explain(model).uncompiled
    assert "uncompiled now" in str(lorafx.explain(model))
    with model.lora.using("a"), pytest.raises(lorafx.UnsupportedModelError, match="unmerge_adapter"):
        run(model, INPUTS)
    with pytest.raises(lorafx.UnsupportedModelError, match="unmerge_adapter"):
        run(model, INPUTS, ["a", "b"] * 2)
    assert_equal_now(pair)
    assert_one_copy(model)
    for each in pair:
        each.unmerge_adapter()
    with nothing_traced(model):
        assert_right(pair)
    assert lorafx.explain(model).uncompiled == ""
    assert_uncompiled_right(pair)


def test_merged_adapters_and_disable_adapter(pair, folders):
    """PEFT unmerges where adapters are disabled."""
    in_step(pair, merged(False), folders, assert_equal_now)
    with pair[0].disable_adapter(), pair[1].disable_adapter():
        assert_equal_now(pair)
    assert_right(pair)


def test_more_adapters_active_than_fit_a_row(pair, folders):
    model = pair[0]
    more = ["d", "e", "more"]
    for each in pair:
        each.load_adapter(folders["d"], adapter_name="d")
        each.load_adapter(folders["e"], adapter_name="e")
        each.load_adapter(folders["b"], adapter_name="more")
    with nothing_traced(model):
        for each in pair:
            each.base_model.set_adapter(["a", "b", *more])
        with pytest.warns(UserWarning, match=r"5 adapters active, at most 4.*add_weighted_adapter"):
            assert_equal_now(pair)
        assert_right(pair)
        for each in pair:
            each.base_model.set_adapter(["a", "b", *more[:2]])
        assert_right(pair)
    assert_uncompiled_right(pair)


def test_layers_that_differ(pair, folders):
    """Set on one layer alone: as PEFT computes it."""
    for each in pair:
        lora_layers(each)[1].set_adapter("b")
    assert_equal_now(pair)
    assert_mixed_batches_equal(pair)
    for each in pair:
        each.set_adapter("b")
        lora_layers(each)[2].enable_adapters(False)
    assert_equal_now(pair)
    for each in pair:
        lora_layers(each)[2].enable_adapters(True)
    with nothing_traced(pair[0]):
        assert_right(pair)
    assert_uncompiled_right(pair)


def test_an_adapter_that_cannot_be_fused_comes_and_goes(pair, folders):
    """VeLoRA on layers that are fused already: everything runs as PEFT has it, until it is deleted."""
    for each in pair:
        torch.manual_seed(5)
        each.add_adapter("other", config(r=3, target_modules=QKV, velora_config={"num_groups": 4}))
        each.eval()
    assert_equal_now(pair)
    for each in pair:
        each.set_adapter("other")
    assert_equal_now(pair)
    with pytest.raises(lorafx.UnsupportedModelError, match=r"(?i)velora"):
        pair[0].lora.use("other")
    for each in pair:
        each.delete_adapter("other")
        each.set_adapter("b")
    assert_right(pair)
    assert_uncompiled_right(pair)


@pytest.mark.parametrize("room", [{}, {"max_adapters": 2, "max_rank": 16, "target_modules": "all-linear"}])
def test_load_adapter_on_further_layers_traces_once(room, folders):
    """Room or not: PEFT puts another module in the place of each layer that no adapter had before."""
    pair = make_pair(folders, "a", **room)
    for each in pair:
        each.load_adapter(folders["c"], adapter_name="c")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_right(pair)
        assert_equal_now(pair, ["a", "a", "__base__", "c"])
    report = lorafx.explain(pair[0])
    assert (len(report.retraces), len(report.graphs)) == (1, 2)
    assert_uncompiled_right(pair)


@pytest.mark.parametrize("verb", ["unload", "merge_and_unload"])
def test_layers_taken_off(verb, pair):
    """What is left is a plain model, and says so when an adapter is asked for."""
    model, left = pair[0], [getattr(each, verb)() for each in pair]
    assert_equal_now(left)
    for refused in (lambda: run(left[0], INPUTS, ["a", "b"] * 2), lambda: left[0].lora.use("a")):
        with pytest.raises(lorafx.UnsupportedModelError, match="taken its layers off"):
            refused()
    lorafx.uncompile(model)
    assert_equal_now(left)


def test_weights_that_are_not_finite_are_refused(pair):
    """In a bank they would reach rows of other adapters."""
    model = pair[0]
    broken = lora_layers(model)[0].lora_A["b"]
    good, broken.weight.data = broken.weight.data, torch.full_like(broken.weight, float("nan"))
    with pytest.raises(lorafx.AdapterFormatError, match=r"'b'.*NaN"):
        run(model, INPUTS, ["a", "b"] * 2)
    broken.weight.data = good
    assert_right(pair)


def test_the_bank_tells_what_peft_did_before_any_call(pair, folders):
    model = pair[0]
    held = model.lora.nbytes - model.lora.reserved
    model.load_adapter(folders["d"], adapter_name="d")
    assert model.lora.names == ["a", "b", "d"]
    assert "d" in repr(model.lora)
    assert model.lora.nbytes - model.lora.reserved > held
    model.delete_adapter("d")
    assert model.lora.nbytes - model.lora.reserved == held
    model.load_adapter(folders["d"], adapter_name="d")
    model.lora.replace("d", folders["e"])
    model.lora.unload("d")
    assert_one_copy(model)


def test_changes_under_threads_of_forwards(pair, folders):
    """load, replace and unload of a PeftModel: each batch sees all of one, never half."""
    model, reference = pair
    names = ["a", "b", "__base__", "b"]
    want = run(reference, INPUTS, names)
    with repeating(lambda: assert_close(run(model, INPUTS, names), want), threads=3):
        for name in ("d", "e", "f") * 2:
            model.lora.load("other", folders[name])
            model.lora.replace("other", folders["d"])
            model.lora.unload("other")
    assert_right(pair)


@pytest.mark.parametrize("which", ["peft", "plain"])
def test_changes_inside_inference_mode(which, folders):
    """The bank's memory must not become inference tensors, which nothing may write outside."""
    reference = with_peft(LLAMA.build(), {"a": folders["a"], "c": folders["c"]})
    if which == "peft":
        model = lorafx.compile(with_peft(LLAMA.build(), {"a": folders["a"]}), options=EAGER_GRAPH)
    else:
        model = lorafx.compile(LLAMA.build(), {"a": folders["a"]}, options=EAGER_GRAPH)
    names = ["a", "c", "__base__", "c"]
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.lora.load("c", folders["c"])
        got = model(**INPUTS, adapter_names=names).logits
    assert_close(got.clone(), run(reference, INPUTS, names))
    assert not model.lora.store.storage.is_inference()
    model.lora.replace("c", folders["c"])
    model.lora.replace("a", folders["b"])
    reference = with_peft(LLAMA.build(), {"a": folders["b"], "c": folders["c"]})
    assert_equal_now((model, reference), names)
