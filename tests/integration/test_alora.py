"""aLoRA: adapters that begin at their invocation tokens, a place of its own in each row. PEFT is the reference."""

from __future__ import annotations

import copy
import re
import warnings

import numpy
import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

import lorafx
from lorafx import passes
from lorafx.passes.share_routing import ROUTED
from lorafx.runtime import runtime_of

from .models import EAGER_GRAPH, LLAMA, VOCABULARY, assert_close, config, difference, run, tokens, with_peft

FIRST, SECOND = [5, 6], [9]
LATE = {"target_modules": ["q_proj", "v_proj", "o_proj"], "task_type": "CAUSAL_LM", "alora_invocation_tokens": FIRST}
ADAPTERS = {
    "late": LATE,
    "other": {**LATE, "r": 3, "target_modules": ["q_proj", "up_proj"], "alora_invocation_tokens": SECOND},
    "plain": {"r": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"},
}
LOWERINGS = {
    "aten": {"options": {**EAGER_GRAPH, "lowering": "aten"}},
    "cpp": {"options": {**EAGER_GRAPH, "lowering": "cpp"}},
    "eager": {"mode": "eager"},
}
GRAPH = LOWERINGS["cpp"]
MIXED = [["late"] * 5, ["late", "plain", "__base__", "other", "late"], ["plain", "late", "other", "late", "late"]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        made[name] = str(tmp_path_factory.mktemp("alora") / name)
        get_peft_model(LLAMA.build(1), config(**fields)).save_pretrained(made[name])
    return made


def ids(shift=0):
    """Invocations at another place in each row: once, twice, first of all, last of all, nowhere (a part of one)."""
    found = tokens(5)
    for token in (*FIRST, *SECOND):
        found[found == token] = 7
    length = found.shape[1]
    for row, starts in enumerate(((2,), (0, 3), (0,), (length - 2,), ())):
        for start in starts:
            start = min(start + shift, length - 2)
            found[row, start : start + 2] = torch.tensor(FIRST)
    found[4, 1] = FIRST[0]
    found[3, 1 + shift] = SECOND[0]
    found[2, 4] = SECOND[0]
    return found


def reference(folders):
    return with_peft(LLAMA.build(1), folders)


def plain_model(folders, **how):
    return lorafx.compile(LLAMA.build(1), dict(folders), **how)


ROADS = {"files": plain_model, "PeftModel": lambda folders, **how: lorafx.compile(reference(folders), **how)}


def assert_rows(got, want, base):
    """Each row's delta; where there is none, the base model's numbers."""
    for mine, theirs, plain in zip(got, want, base, strict=True):
        if (theirs - plain).norm() < 1e-6:
            assert (mine - plain).abs().max() <= 1e-6
        else:
            assert difference(mine - plain, theirs - plain) <= 1e-5


@pytest.mark.parametrize("how", LOWERINGS)
@pytest.mark.parametrize("road", ROADS)
def test_each_row_begins_where_peft_begins(road, how, folders):
    model, peft, base = ROADS[road](folders, **LOWERINGS[how]), reference(folders), LLAMA.build(1)
    for shift in (0, 1):
        inputs = {"input_ids": ids(shift)}
        without = run(base, inputs)
        for names in MIXED:
            want = run(peft, inputs, names)
            assert (want - without).norm() > 1e-3
            assert_rows(run(model, inputs, names), want, without)
        for name in ADAPTERS:
            peft.set_adapter(name)
            want = run(peft, inputs)
            if road == "PeftModel":
                model.set_adapter(name)
                assert_rows(run(model, inputs), want, without)
            model.lora.use(name)
            assert_rows(run(model, inputs), want, without)
    report = lorafx.explain(model)
    assert (report.skipped, report.recompiles, report.retraces) == ([], 0, [])
    assert len(report.graphs) == (0 if how == "eager" else 1)
    assert all(graph.proved == len(runtime_of(model).bank.store.sites) for graph in proofs(model))


def proofs(model):
    return [graph.passes for graph in runtime_of(model).graphs]


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("way", [{}, {"use_cache": False}, {"prefill_chunk_size": 3}], ids=str)
def test_generate(road, way, folders):
    """Without a cache and in chunks an adapter begins at another place, in PEFT too."""
    model, peft = ROADS[road](folders, **GRAPH), reference(folders)
    prompt = ids()
    arguments = {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 4,
        "do_sample": False,
        **way,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    base = LLAMA.build(1).generate(**arguments)
    for names in (["late"] * 5, MIXED[1]):
        want, got = (each.generate(**arguments, adapter_names=names) for each in (peft, model))
        assert torch.equal(got.sequences, want.sequences)
        for mine, theirs in zip(got.logits, want.logits, strict=True):
            assert_close(mine, theirs)
    assert not torch.equal(want.sequences, base.sequences)
    peft.set_adapter("late")
    model.lora.use("late")
    want = peft.generate(**arguments)
    assert torch.equal(model.generate(**arguments).sequences, want.sequences)
    if road == "PeftModel":
        model.set_adapter("late")
        assert torch.equal(model.generate(**arguments).sequences, want.sequences)
        with model.disable_adapter():
            assert torch.equal(model.generate(**arguments).sequences, base.sequences)
    else:  # ids as PEFT's generate does not take them
        ids_ = arguments.pop("input_ids")
        assert torch.equal(model.generate(inputs=ids_, **arguments).sequences, want.sequences)


@pytest.mark.parametrize("offsets", [None, [3, None, 1, 7, 2]], ids=["found", "given"])
@pytest.mark.parametrize("road", ROADS)
def test_rows_repeated_for_beams(road, offsets, folders):
    """PEFT refuses beams with aLoRA: each row is what it is alone."""
    model, prompt = ROADS[road](folders, **LOWERINGS["eager"]), ids()
    beams = {
        "num_beams": 2,
        "max_new_tokens": 3,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
    }

    def generated(rows):
        given = {} if offsets is None else {"alora_offsets": offsets[rows]}
        return model.generate(input_ids=prompt[rows], adapter_names=["late"] * len(prompt[rows]), **given, **beams)

    got, alone = generated(slice(None)), [generated(slice(row, row + 1)) for row in range(len(prompt))]
    assert torch.equal(got.sequences, torch.cat([each.sequences for each in alone]))
    for step, logits in enumerate(got.logits):
        assert_close(logits, torch.cat([each.logits[step] for each in alone]))
    base = LLAMA.build(1).generate(input_ids=prompt, **beams)
    assert difference(got.logits[0], base.logits[0]) > 1e-3


def routed_calls(model):
    code = runtime_of(model).graphs[-1].after
    return re.findall(r"torch\.ops\.lorafx\.routed_lora\.default\(.*", code), code


def test_explain_counts_such_layers_as_not_folded(folders):
    """q and v, and o, whose layers stay apart; down, which is computed inside its op."""
    model = plain_model({name: folders[name] for name in ("late", "plain")}, **GRAPH)
    run(model, {"input_ids": ids()})
    report = lorafx.explain(model)
    assert report.folded == 1
    assert report.work.fused.launches == (2 + 1) + (1 + 1) + 1


def test_the_graph_has_it_where_an_adapter_needs_it(folders):
    with_late = plain_model({name: folders[name] for name in ("late", "plain")}, **GRAPH)
    without = plain_model({"plain": folders["plain"]}, **GRAPH)
    same = plain_model({"plain": folders["plain"], "late": (plain_state(folders), LATE_AS_LORA)}, **GRAPH)
    inputs = {"input_ids": ids()}
    for model in (with_late, without):
        model.lora.use("plain")
        run(model, inputs)
    calls, code = routed_calls(with_late)
    assert len(calls) == 3  # q and v, o, down
    assert sum("last = lorafx_last" in call for call in calls) == 2
    assert "lorafx_last" in code.partition("\n")[2].partition("):")[0]  # one more input
    calls, code = routed_calls(without)
    assert len(calls) == 2
    assert "last" not in code
    assert runtime_of(without).graphs[-1].passes.folded == 2
    assert runtime_of(with_late).graphs[-1].passes.folded == 1  # down, which no aLoRA adapter has
    assert without.lora.routing().last is None
    run(same, inputs, ["late"] * 5)
    assert "lorafx_last" not in routed_calls(same)[1]


LATE_AS_LORA = config(**{**LATE, "alora_invocation_tokens": None})


def plain_state(folders):
    return get_peft_model_state_dict(with_peft(LLAMA.build(1), {"late": folders["late"]}), adapter_name="late")


def test_the_first_one_costs_one_trace_and_the_next_none(folders):
    model = plain_model({"plain": folders["plain"]}, max_adapters=3, max_rank=8, target_modules="all-linear", **GRAPH)
    inputs, base, peft = {"input_ids": ids()}, run(LLAMA.build(1), {"input_ids": ids()}), reference(folders)
    run(model, inputs, ["plain"] * 5)
    with pytest.warns(UserWarning, match="is aLoRA on layers where none was before"):
        model.lora.load("late", folders["late"])
    for names in (["late", "plain", None, "late", "late"], ["plain"] * 5):
        want = run(peft, inputs, [name or "__base__" for name in names])
        assert_rows(run(model, inputs, names), want, base)
    report = lorafx.explain(model)
    assert (len(report.retraces), len(report.graphs)) == (1, 2)
    model.lora.replace("plain", folders["other"])  # layers that it has not been on
    assert len(lorafx.explain(model).retraces) == 2
    names = ["plain", "late", "plain", "plain", "plain"]
    want = run(peft, inputs, ["other" if name == "plain" else name for name in names])
    assert_rows(run(model, inputs, names), want, base)
    model.lora.replace("late", (plain_state(folders), LATE_AS_LORA))  # the same weights, always on
    peft_plain = get_peft_model(LLAMA.build(1), LATE_AS_LORA).eval()
    peft_plain.load_state_dict(reference({"late": folders["late"]}).state_dict(), strict=False)
    always = with_peft(LLAMA.build(1), {"late": folders["late"]})
    for layer in always.modules():
        getattr(layer, "lora_variant", {}).clear()
    assert_rows(run(model, inputs, ["late"] * 5), run(always, inputs), base)
    model.lora.replace("late", folders["late"])
    assert_rows(run(model, inputs, ["late"] * 5), run(peft, inputs, ["late"] * 5), base)
    model.lora.unload("late")
    assert "late" not in model.lora
    assert len(lorafx.explain(model).retraces) == 2


def test_the_same_layers_with_other_tokens(folders, tmp_path):
    """A replacement of which the numbers fit where they stand, but which begins elsewhere."""
    torch.manual_seed(5)
    made = get_peft_model(LLAMA.build(1), config(**{**LATE, "alora_invocation_tokens": SECOND}))
    made.save_pretrained(tmp_path)
    inputs, base = {"input_ids": ids()}, run(LLAMA.build(1), {"input_ids": ids()})
    model = plain_model({"late": folders["late"]}, **LOWERINGS["eager"])
    weights = model.lora.read(str(tmp_path))
    assert model.lora.store.holds(0, weights.layout)
    for source, want in ((weights, made), (folders["late"], with_peft(LLAMA.build(1), {"late": folders["late"]}))):
        model.lora.replace("late", source)
        assert_rows(run(model, inputs, ["late"] * 5), run(want.eval(), inputs), base)


def test_room_for_one_is_room_for_others(folders):
    room = {"max_adapters": 2, "max_rank": 8, "target_modules": "all-linear"}
    model = plain_model({"late": folders["late"]}, **room, **GRAPH)
    inputs, base, peft = {"input_ids": ids()}, run(LLAMA.build(1), {"input_ids": ids()}), reference(folders)
    run(model, inputs)
    model.lora.load("other", folders["other"])
    names = ["late", "other", None, "other", "late"]
    want = run(peft, inputs, [name or "__base__" for name in names])
    assert_rows(run(model, inputs, names), want, base)
    report = lorafx.explain(model)
    assert (report.retraces, report.recompiles, len(report.graphs)) == ([], 0, 1)
    with pytest.raises(lorafx.CapacityError):
        model.lora.load("plain", folders["plain"])


def test_peft_model_takes_them_later(folders):
    model = lorafx.compile(with_peft(LLAMA.build(1), {"plain": folders["plain"]}), **GRAPH)
    inputs, base, peft = {"input_ids": ids()}, run(LLAMA.build(1), {"input_ids": ids()}), reference(folders)
    run(model, inputs)
    model.load_adapter(folders["late"], adapter_name="late")
    weights = lorafx.compile(LLAMA.build(1), {}, mode="eager").lora.read(folders["other"])
    for again in (True, False):  # the second time they have been looked at before
        model.lora.load("other", weights)
        assert model.peft_config["other"].alora_invocation_tokens == SECOND
        if again:
            model.lora.unload("other")
    for names in MIXED:
        assert_rows(run(model, inputs, names), run(peft, inputs, names), base)
    twin = copy.deepcopy(model)
    assert_rows(run(twin, inputs, MIXED[1]), run(peft, inputs, MIXED[1]), base)


def test_a_store_of_them(folders):
    store = lorafx.AdapterStore(dict(folders))
    model = lorafx.compile(LLAMA.build(1), store, max_adapters=2, **GRAPH)
    inputs, base, peft = {"input_ids": ids()}, run(LLAMA.build(1), {"input_ids": ids()}), reference(folders)
    for names in (["late"] * 5, ["plain", "late", "late", "late", "plain"], ["other", "late", None, "other", "other"]):
        want = run(peft, inputs, [name or "__base__" for name in names])
        assert_rows(run(model, inputs, names), want, base)
    assert lorafx.explain(model).retraces == []


def test_offsets_that_are_given_and_calls_without_ids(folders):
    model, peft, base = plain_model(folders, **GRAPH), reference(folders), LLAMA.build(1)
    inputs = {"input_ids": ids()}
    without, offsets = run(base, inputs), [1, None, 3, 10**6, 0]
    peft.set_adapter("late")
    model.lora.use("late")
    with torch.no_grad():
        want = peft(**inputs, alora_offsets=offsets).logits
        assert_rows(model(**inputs, alora_offsets=offsets).logits, want, without)
        assert_rows(model(**inputs, alora_offsets=offsets, adapter_names=["late"] * 5).logits, want, without)
        for wrong in ([1, 2], ["1"] * 5, 3):
            with pytest.raises(lorafx.AdapterMismatchError, match="alora_offsets"):
                model(**inputs, alora_offsets=wrong)
        embeds = base.get_input_embeddings()(inputs["input_ids"])
        with pytest.warns(UserWarning, match="input_ids"):
            assert_close(model(inputs_embeds=embeds).logits, without)
        assert_rows(model(inputs_embeds=embeds, alora_offsets=offsets).logits, want, without)
    with pytest.raises(lorafx.CapacityError, match="Split the batch"):
        run(model, {"input_ids": ids().repeat(60, 1)})


OFFSETS = [1, None, 3, 7, 0]


@pytest.mark.parametrize("active", ["late", "plain"])
def test_a_peft_model_takes_offsets_that_are_given(active, folders):
    """After ``model.lora.use`` too, where PEFT's own offsets, of the adapter that is active there, don't count."""
    model, peft = lorafx.compile(reference(folders), **GRAPH), reference(folders)
    inputs, base = {"input_ids": ids()}, run(LLAMA.build(1), {"input_ids": ids()})
    generated = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    peft.set_adapter("late")
    model.set_adapter(active)
    model.lora.use("late")
    with torch.no_grad():
        want = peft(**inputs, alora_offsets=OFFSETS).logits
        assert difference(want, run(peft, inputs)) > 1e-3
        assert_rows(model(**inputs, alora_offsets=OFFSETS).logits, want, base)
        assert_rows(model(**inputs, alora_offsets=OFFSETS, adapter_names="late").logits, want, base)
        assert_rows(run(model, inputs), run(peft, inputs), base)
        model.lora.use("plain")
        model.set_adapter("other")
        model.set_adapter("late")
        assert_rows(model(**inputs, alora_offsets=OFFSETS).logits, want, base)
    model.set_adapter(active)
    model.lora.use("late")
    got, want = (each.generate(**inputs, alora_offsets=OFFSETS, **generated) for each in (model, peft))
    for mine, theirs in zip(got.logits, want.logits, strict=True):
        assert_close(mine, theirs)
    lorafx.uncompile(model)
    model.set_adapter("late")
    assert "generate" not in vars(model)
    assert not model._forward_pre_hooks
    assert_close(model.generate(**inputs, alora_offsets=OFFSETS, **generated).logits[0], want.logits[0])


@pytest.mark.parametrize("road", ROADS)
def test_offsets_are_one_whole_number_for_each_row(road, folders):
    model, peft, inputs = ROADS[road](folders, **LOWERINGS["eager"]), reference(folders), {"input_ids": ids()}
    model.lora.use("late")
    peft.set_adapter("late")
    numbers = numpy.array([1, 0, 3, 7, 2])
    with torch.no_grad():
        want = peft(**inputs, alora_offsets=numbers.tolist()).logits
        for right in (numbers, torch.from_numpy(numbers), list(numbers)):
            assert_close(model(**inputs, alora_offsets=right).logits, want)
        for wrong in ([1, 2], [], 3, ["1"] * 5, [1.7, 0, 3, 7, 2], [True] * 5, torch.ones(5), "12345"):
            for call in (model, model.generate):
                with pytest.raises(lorafx.AdapterMismatchError, match="for a batch of 5 rows"):
                    call(**inputs, alora_offsets=wrong)
                with pytest.raises(lorafx.AdapterMismatchError, match="for a batch of 5 rows"):
                    call(**inputs, alora_offsets=wrong, adapter_names=["late"] * 5)


@pytest.mark.parametrize("active", ["late", "plain"])
def test_names_that_peft_cannot_read(active, folders):
    """One for the whole batch, whose letters PEFT takes for names, and None."""
    model, peft = lorafx.compile(reference(folders), **GRAPH), reference(folders)
    model.set_adapter(active)
    inputs, base = {"input_ids": ids()}, run(LLAMA.build(1), {"input_ids": ids()})
    steps = {"max_new_tokens": 3, "do_sample": False}
    some = ["late", None, "plain", "late", None]
    want = {names: run(peft, inputs, [names] * 5) for names in ADAPTERS}
    want_of_some = run(peft, inputs, [name or "__base__" for name in some])
    tokens_of_late = peft.generate(**inputs, adapter_names=["late"] * 5, **steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Adapter .* not found in peft_config")
        for name in ADAPTERS:
            assert_rows(run(model, inputs, name), want[name], base)
        assert_rows(run(model, inputs, "__base__"), base, base)
        assert_rows(run(model, inputs, some), want_of_some, base)
        assert torch.equal(model.generate(**inputs, adapter_names="late", **steps), tokens_of_late)
    with pytest.raises(lorafx.AdapterMismatchError, match="no adapter 'nope' is loaded"):
        run(model, inputs, "nope")


@pytest.mark.parametrize("how", ["cpp", "eager"])
def test_weights_on_rows_of_a_causal_peft_model(how, folders):
    """PEFT's class for causal models looks at the names before we do, for aLoRA, and knows no weights."""
    inputs, base = {"input_ids": ids()}, run(LLAMA.build(1), {"input_ids": ids()})
    names = [{"late": 1.0}, {"plain": 0.5, "twice": -0.25}, None, "other", {"plain": 0.3}]
    extra = {**folders, "twice": folders["plain"]}
    model = lorafx.compile(reference(extra), **LOWERINGS[how])
    alone = {name: run(model, inputs, [name] * 5) for name in folders}
    want = torch.stack([alone["late"][0], base[1], base[2], alone["other"][3], base[4]])
    got = run(model, inputs, names)
    plain = lorafx.compile(LLAMA.build(1), extra, **LOWERINGS[how])
    of_plain = run(plain, inputs, names)
    assert_rows(got, of_plain, base)
    assert_rows(got[[0, 2, 3]], want[[0, 2, 3]], base[[0, 2, 3]])
    assert (got[4] - base[4]).norm() > 1e-3
    for whole in ({"plain": 0.3}, {"late": 1.0}):
        assert_rows(run(model, inputs, whole), run(plain, inputs, whole), base)
    steps = {"max_new_tokens": 2, "do_sample": False}
    assert torch.equal(
        model.generate(**inputs, adapter_names=names, **steps), plain.generate(**inputs, adapter_names=names, **steps)
    )


def test_rows_of_a_peft_model_are_those_of_its_main_input(folders):
    few = {"plain": folders["plain"]}
    model, peft = lorafx.compile(with_peft(LLAMA.build(1), few), **GRAPH), with_peft(LLAMA.build(1), few)
    inputs, names = {"input_ids": ids(), "position_ids": torch.arange(7)[None]}, ["plain"] * 4 + ["__base__"]
    assert_close(run(model, inputs, names), run(peft, inputs, names))
    for wrong in (names[:3], names[:1], names * 2):
        with pytest.raises(lorafx.AdapterMismatchError, match=f"got {len(wrong)} adapter_names for a batch of 5 rows"):
            run(model, inputs, wrong)


def test_beside_other_adapters_it_is_pefts(folders):
    model, peft = lorafx.compile(reference(folders), **GRAPH), reference(folders)
    inputs = {"input_ids": ids()}
    for pair in ({"late": 1.0, "plain": 0.5}, {"late": 1.0, "other": 1.0}):
        with pytest.raises(lorafx.UnsupportedModelError, match="late is aLoRA"):
            model.lora.use(pair)
    assert_close(run(plain_weighted(folders, 0.5), inputs), run(scaled(folders, 0.5), inputs))
    peft.set_adapter("late")
    model.set_adapter("late")
    for each in (model, peft):
        each.base_model.set_adapter(["late", "plain"])
    want = run(peft, inputs)
    assert_close(run(model, inputs), want)
    assert "late is aLoRA" in lorafx.explain(model).uncompiled


def plain_weighted(folders, weight):
    model = plain_model(folders, **GRAPH)
    model.lora.use({"late": weight})
    return model


def scaled(folders, weight):
    model = reference({"late": folders["late"]})
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["late"] *= weight
    return model


def test_training_is_pefts(folders):
    def gradients(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name and ".late." in name)
        found = ids()
        model(input_ids=found, labels=found).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want, model = gradients(reference(folders)), lorafx.compile(reference(folders), **GRAPH)
    got = gradients(model)
    assert want.keys() == got.keys()
    assert any(grad.norm() > 0 for grad in want.values())
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-7)
    model.lora.use("late")
    with pytest.raises(lorafx.UnsupportedModelError, match="is aLoRA, and its weights need gradients"):
        model(input_ids=ids())
    with torch.no_grad():
        assert_close(model(input_ids=ids()).logits, run(reference(folders), {"input_ids": ids()}))


def test_without_pefts_class_for_it_peft_leaves_it_off(tmp_path):
    """PEFT looks for invocations in PeftModelForCausalLM alone. What is chosen through lorafx is on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(LLAMA.build(1), config(**{**LATE, "task_type": None})).eval()
    base = run(LLAMA.build(1), {"input_ids": ids()})
    assert torch.equal(run(model, {"input_ids": ids()}), base)
    for how in (GRAPH, LOWERINGS["eager"]):
        compiled = lorafx.compile(copy.deepcopy(model), **how)
        assert_close(run(compiled, {"input_ids": ids()}), base, 1e-6)
        assert_close(run(compiled, {"input_ids": ids()}, ["default"] * 5), base, 1e-6)
        assert_close(run(compiled, {"input_ids": ids()}, "default"), base, 1e-6)
    compiled.lora.use("default")
    model.save_pretrained(tmp_path)
    plain = lorafx.compile(LLAMA.build(1), str(tmp_path), **GRAPH)
    want = run(plain, {"input_ids": ids()})
    assert difference(want, base) > 1e-3
    assert_close(run(compiled, {"input_ids": ids()}), want)


class Flattening(nn.Module):
    """As routers of experts do: the second layer's input is ``[rows * tokens, in]``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, input_ids):
        x = self.up(self.embed(input_ids))
        return self.down(x.tanh().reshape(-1, 6)).view(*input_ids.shape, 8)


@pytest.mark.parametrize("how", LOWERINGS)
def test_flattened_tokens(how):
    """What PEFT can't do: its mask takes each token for a row."""
    torch.manual_seed(1)
    fields = {"target_modules": ["up", "down"], "lora_bias": True, "lora_dropout": 0.0}
    always = get_peft_model(Flattening(), config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in always.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.normal_()
    state = get_peft_model_state_dict(always)
    late = config(**fields, alora_invocation_tokens=FIRST)
    adapters = {"late": (state, late), "always": (state, config(**fields))}
    model = lorafx.compile(Flattening().eval(), adapters, **LOWERINGS[how])
    found = ids()
    base, on = Flattening().eval()(found), always(found)
    starts = [2, 3, 0, found.shape[1] - 2, None]
    starts = [found.shape[1] if start is None else start for start in starts]
    want = torch.stack([torch.cat([b[:s], o[s:]]) for s, b, o in zip(starts, base, on, strict=True)])
    with torch.no_grad():
        assert_close(model(found, adapter_names=["late"] * 5) - base, want - base)
        got = model(found, adapter_names=["always", "late", None, "late", "late"])
        assert_close(got - base, torch.cat([on[:1], want[1:2], base[2:3], want[3:]]) - base)
        one = model(found[:1], adapter_names=["late"])
        assert_close(one - base[:1], want[:1] - base[:1])


def everywhere(gm, context):
    """A wrong rewrite: the adapter is on from the first position on."""
    for node in gm.graph.find_nodes(op="call_function", target=ROUTED):
        if node.kwargs:
            node.kwargs = {}
            return 1
    return 0


@pytest.mark.parametrize("length", [7, 1])
def test_a_rewrite_that_forgets_it_is_found(length, folders, monkeypatch):
    monkeypatch.setattr(passes, "REWRITE", (*passes.REWRITE, everywhere))
    model = plain_model({"late": folders["late"]}, **GRAPH)
    inputs = {"input_ids": ids()[:, -length:]}
    got, want = run(model, inputs), run(reference(folders), inputs)
    assert lorafx.explain(model).skipped
    assert_rows(got, want, run(LLAMA.build(1), inputs))
