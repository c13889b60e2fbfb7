"""generate, pipelines, threads, copies, and everything that changes between calls: an adapter in use is never lost."""

from __future__ import annotations

import copy
import pickle
import random
import threading
import warnings
from contextlib import contextmanager

import pytest
import torch
from transformers import CompileConfig, PreTrainedTokenizerFast, pipeline

import lorafx
from lorafx.sites import SiteHook

from .in_threads import repeating
from .models import (
    EAGER_GRAPH,
    FAMILIES,
    LLAMA,
    VOCABULARY,
    assert_close,
    compiled_llama,
    difference,
    run,
    save_adapter,
    save_adapters,
    three_adapters,
    tokens,
    with_peft,
)

QKV = list(LLAMA.qkv)
INPUTS = LLAMA.inputs(4)
NAMES = ["a", "b", "__base__", "c"]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return three_adapters(LLAMA, tmp_path_factory.mktemp("adapters"), task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def reference(folders):
    return with_peft(LLAMA.build(), folders)


@pytest.fixture(scope="module")
def model(folders):
    """One compiled model for all tests that only call it."""
    return compiled_llama(folders)


@pytest.fixture(scope="module")
def compiled_peft(folders):
    return lorafx.compile(with_peft(LLAMA.build(), folders), options=EAGER_GRAPH)


def fused_graphs(model):
    return sum(bool(graph.passes.after["lorafx.routed_lora"]) for graph in lorafx.explain(model).graphs)


def assert_still_right(model, reference, names=NAMES):
    assert_close(run(model, INPUTS, names), run(reference, INPUTS, [name or "__base__" for name in names]))


@contextmanager
def nothing_traced(model):
    before = len(lorafx.explain(model).graphs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert len(lorafx.explain(model).graphs) == before


# ------------------------------------------------------------------------------------------------ generate

WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3},
    "return sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams and return sequences": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "beams, static cache": {"num_beams": 2, "cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


def generated(model, rows=INPUTS["input_ids"], **settings):
    torch.manual_seed(7)
    return model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **{**GREEDY, **settings})


@pytest.mark.parametrize("way", WAYS)
def test_generate_gives_pefts_tokens(way, model, reference):
    settings = WAYS[way]
    rows, names, theirs = INPUTS["input_ids"], NAMES, {}
    if way == "prompt lookup":  # one row only, says transformers
        rows, names = rows[:1], ["b"]
    if way == "return sequences":  # PEFT repeats names for beams only
        theirs = {"rows": rows.repeat_interleave(2, 0), "adapter_names": [n for n in names for _ in range(2)]}
        theirs["num_return_sequences"] = 1
    settings = {"rows": rows, "adapter_names": names, **settings}
    assert torch.equal(generated(model, **settings), generated(reference, **{**settings, **theirs}))
    assert fused_graphs(model)


@pytest.mark.parametrize("name", ["a", None])
def test_generate_with_what_is_in_use(name, model, reference):
    with model.lora.using(name):
        got = generated(model, num_beams=2)
    if name is None:
        want = generated(LLAMA.build(), num_beams=2)
    else:
        reference.set_adapter(name)
        want = generated(reference, num_beams=2)
    assert torch.equal(got, want)


def test_generate_runs_the_fused_ops(model):
    """Not PEFT's way, and not the eager one."""
    seen = []
    call = torch.ops.lorafx.routed_lora.default

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    graphs = fused_graphs(model)
    generated(model, adapter_names=NAMES)
    assert fused_graphs(model) >= graphs > 0
    assert call is not None
    with Watch():
        model(**INPUTS, adapter_names=NAMES)
    assert "lorafx.site.default" not in seen


def test_left_padding(model, reference):
    ids = INPUTS["input_ids"].clone()
    mask = torch.ones_like(ids)
    for row in range(len(ids)):
        ids[row, :row], mask[row, :row] = 0, 0
    settings = {**GREEDY, "input_ids": ids, "attention_mask": mask, "adapter_names": NAMES}
    assert torch.equal(model.generate(**settings), reference.generate(**settings))


def test_peft_model_generates(compiled_peft, reference):
    for settings in ({"adapter_names": NAMES}, {"adapter_names": NAMES, "num_beams": 2}):
        assert torch.equal(generated(compiled_peft, **settings), generated(reference, **settings))
    for name in ("b", "c"):
        for each in (compiled_peft, reference):
            each.set_adapter(name)
        assert torch.equal(generated(compiled_peft), generated(reference))
    assert fused_graphs(compiled_peft)


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocabulary.update({f"w{i}": i for i in range(4, VOCABULARY)})
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def test_pipeline(model, reference):
    text = "w5 w9 w17 w40"
    reference.set_adapter("b")
    tokenizer = tiny_tokenizer()
    want = pipeline("text-generation", model=reference.get_base_model(), tokenizer=tokenizer)(text, **GREEDY)
    made = pipeline("text-generation", model=model, tokenizer=tokenizer)
    with model.lora.using("b"):
        assert made(text, **GREEDY) == want
    assert made(text, **GREEDY, adapter_names=["b"]) == want
    assert made(text, **GREEDY) != want


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_encoder_decoder_generate(name, tmp_path):
    """generate calls the encoder by itself: its adapters are there too."""
    family = FAMILIES[name]
    folders = save_adapters(
        family,
        tmp_path,
        layers=1,
        a={"target_modules": list(family.qkv), "task_type": "SEQ_2_SEQ_LM"},
        b={"r": 7, "target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"},
    )
    reference = with_peft(family.build(1), folders)
    model = lorafx.compile(family.build(1), folders, options=EAGER_GRAPH)
    inputs = {key: value for key, value in family.inputs(3).items() if not key.startswith("decoder")}
    settings = {**GREEDY, **inputs, "output_hidden_states": True, "return_dict_in_generate": True}
    plain = family.build(1).generate(**settings).encoder_hidden_states[-1]
    for beams in (1, 2):
        chosen = {"adapter_names": ["b", "__base__", "a"], "num_beams": beams}
        got, want = (each.generate(**settings, **chosen) for each in (model, reference))
        assert torch.equal(got.sequences, want.sequences)
        for mine, theirs in zip(got.encoder_hidden_states, want.encoder_hidden_states, strict=True):
            assert_close(mine, theirs)
        assert difference(got.encoder_hidden_states[-1], plain) > 1e-2
        with model.lora.using(["b", None, "a"]):
            assert torch.equal(model.generate(**settings, num_beams=beams).sequences, want.sequences)


# ------------------------------------------------------------------------------------------------ never lost


@pytest.mark.parametrize("which", ["plain", "peft"])
def test_submodule_called_alone(which, model, compiled_peft, reference):
    """``model.model(...)`` goes past the compiled call."""
    reference.set_adapter("c")
    want = reference.get_base_model().model(**INPUTS).last_hidden_state
    if which == "plain":
        with model.lora.using("c"):
            got = model.model(**INPUTS).last_hidden_state
    else:
        compiled_peft.set_adapter("c")
        got = compiled_peft.get_base_model().model(**INPUTS).last_hidden_state
    assert_close(got, want)


@pytest.mark.parametrize("which", ["plain", "peft"])
def test_selection_holds_in_a_submodule(which, model, compiled_peft, reference):
    each = {"plain": model, "peft": compiled_peft}[which]
    reference.set_adapter("b")
    want = reference.get_base_model().model(**INPUTS).last_hidden_state
    root = each if which == "plain" else each.get_base_model()
    with each.lora.using(["b", None, "b", "b"]):
        got = root.model(**INPUTS).last_hidden_state
    assert_close(got[[0, 2, 3]], want[[0, 2, 3]])
    assert_close(got[1], LLAMA.build().model(**INPUTS).last_hidden_state[1], 1e-6)


def test_past_dynamos_recompile_limit(folders, reference, monkeypatch):
    """Eager from there on, and every row still its adapter's."""
    monkeypatch.setattr("lorafx.runtime.RECOMPILE_LIMIT", 2)
    model = compiled_llama(folders, dynamic=False, layers=None)
    with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=2), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for length in range(3, 10):
            ids = {"input_ids": tokens(4, length)}
            assert_close(run(model, ids, NAMES), run(reference, ids, NAMES))
            with model.lora.using("b"):
                reference.set_adapter("b")
                assert_close(run(model, ids), run(reference, ids))
    assert len(lorafx.explain(model).graphs) <= 3


def test_the_limit_is_each_models_own(folders, monkeypatch):
    """Models of one class share their code, but not their graphs."""
    monkeypatch.setattr("lorafx.runtime.RECOMPILE_LIMIT", 2)
    models = [compiled_llama(folders) for _ in range(4)]
    for model in models:
        run(model, INPUTS, NAMES)
        assert len(lorafx.explain(model).graphs) == 1


def test_hooks_that_dynamo_compiles_by_themselves(folders, reference, monkeypatch):
    """Where it gives up on the model's own frame it goes on with the frames inside: one graph for many layers."""
    torch._dynamo.reset()  # an earlier test may have brought these frames to their limit, which all models share
    model = compiled_llama(folders)
    monkeypatch.setattr(model._lorafx_runtime, "entry", lambda: model._call_impl)
    alone = torch.compile(SiteHook.__call__, backend=model._lorafx_runtime._backend)
    monkeypatch.setattr(SiteHook, "__call__", lambda *args, **kwargs: alone(*args, **kwargs))
    assert_still_right(model, reference)
    assert_still_right(model, reference, ["c", "c", None, "b"])
    graphs = lorafx.explain(model).graphs
    assert any("Sym(" in graph.after and "lorafx.site" in graph.passes.after for graph in graphs)


def test_many_shapes_with_the_limit_of_the_entry(tmp_path):
    """Ours is above Dynamo's 8, of which one generate of each kind takes 7."""
    folders = save_adapters(LLAMA, tmp_path, 1, a={"target_modules": QKV})
    reference, names = with_peft(LLAMA.build(1), folders), ["a", "__base__", "a", "a"]
    model = compiled_llama(folders, 1, dynamic=False)
    for length in range(2, 12):
        ids = {"input_ids": tokens(4, length)}
        assert_close(run(model, ids, names), run(reference, ids, names))
    assert len(lorafx.explain(model).graphs) == 10


@pytest.mark.parametrize("how", ["force_eager", "compiler.disable", "mode", "dynamo.config.disable"])
def test_where_dynamo_does_not_run(how, folders, reference, model):
    if how == "mode":
        model = compiled_llama(folders, mode="eager")
        assert_still_right(model, reference)
        assert lorafx.explain(model).graphs == []
        assert torch.equal(generated(model, adapter_names=NAMES), generated(reference, adapter_names=NAMES))
    elif how == "force_eager":
        with torch.compiler.set_stance("force_eager"):
            assert_still_right(model, reference)
    elif how == "compiler.disable":
        wrapped = torch.compiler.disable(lambda: run(model, INPUTS, NAMES))
        assert_close(wrapped(), run(reference, INPUTS, NAMES))
    else:
        with torch._dynamo.config.patch(disable=True):
            assert_still_right(model, reference)


def test_a_hundred_lists_of_names_trace_nothing(model, reference):
    run(model, INPUTS, NAMES)
    choose = random.Random(3)
    with nothing_traced(model):
        for i in range(100):
            names = [choose.choice(["a", "b", "c", "__base__", None]) for _ in range(4)]
            got = run(model, INPUTS, names)
            if i % 10 == 0:
                assert_close(got, run(reference, INPUTS, [name or "__base__" for name in names]))
    assert lorafx.explain(model).recompiles < 20


def test_threads_each_with_their_own_names(model, reference):
    """Four at once, through one compiled model: each gets its own rows."""
    lists = [["a", "b", "c", None], ["c", "c", "a", "b"], [None, None, "b", "b"], ["b", "a", None, "c"]]
    want = [run(reference, INPUTS, [name or "__base__" for name in names]) for names in lists]
    sequences = [generated(reference, adapter_names=[name or "__base__" for name in names]) for names in lists]
    run(model, INPUTS, lists[0])
    failures = []

    def work(i):
        try:
            for _ in range(4):
                assert_close(run(model, INPUTS, lists[i]), want[i])
            assert torch.equal(model.generate(**INPUTS, **GREEDY, adapter_names=lists[i]), sequences[i])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    assert model.lora.in_use == ((),)


@pytest.mark.parametrize("other", [-1, 10**6])
def test_what_other_threads_compile_makes_no_graph_here(other, folders, monkeypatch):
    """torch 2.13 holds in one variable of the process whose isolated compile is called; any thread may set it just
    before another one looks for its graph, as its calls do when they begin and when they end."""
    eval_frame = torch._dynamo.eval_frame
    if not hasattr(eval_frame, "set_eval_frame_isolate_recompiles_id"):
        pytest.skip("this torch has no isolated compiles")
    model = compiled_llama(folders)
    run(model, INPUTS, NAMES)
    enter, entered = eval_frame._maybe_set_eval_frame, []

    def enter_late(callback):
        entered.append(callback)
        eval_frame.set_eval_frame_isolate_recompiles_id(other)
        return enter(callback)

    monkeypatch.setattr(eval_frame, "_maybe_set_eval_frame", enter_late)
    run(model, INPUTS, NAMES)
    eval_frame.set_eval_frame_isolate_recompiles_id(-1)
    assert entered
    assert len(lorafx.explain(model).graphs) == 1


def test_a_table_is_of_one_moment(folders, monkeypatch):
    """An adapter that another thread unloads meanwhile goes afterwards."""
    bank = compiled_llama(folders, mode="eager").lora
    read, threads = bank.weights_of, []

    def while_another_unloads(name):
        if not threads:
            threads.append(threading.Thread(target=bank.unload, args=("b",)))
            threads[0].start()
            threads[0].join(0.2)
        return read(name)

    monkeypatch.setattr(bank, "weights_of", while_another_unloads)
    assert [row["name"] for row in bank.table()] == ["a", "b", "c"]
    threads[0].join(60)
    assert bank.names == ["a", "c"]


def test_changes_while_threads_call(folders, reference):
    """load, replace and unload wait for the forwards under way; no forward sees half of one."""
    model = compiled_llama(folders, max_adapters=5)
    want = run(reference, INPUTS, NAMES)
    run(model, INPUTS, NAMES)
    with repeating(lambda: assert_close(run(model, INPUTS, NAMES), want), threads=2):
        for i in range(6):
            model.lora.load("extra", folders["abc"[i % 3]])
            model.lora.replace("extra", folders["a"])
            model.lora.unload("extra")


# ------------------------------------------------------------------------------------------------ copies


@pytest.mark.parametrize("which", ["plain", "peft"])
def test_same_object_type_config_and_state_dict(which, folders):
    model = LLAMA.build() if which == "plain" else with_peft(LLAMA.build(), folders)
    kind, keys, settings = type(model), list(model.state_dict()), model.config
    assert lorafx.compile(model, folders if which == "plain" else None, mode="eager") is model
    assert type(model) is kind
    assert list(model.state_dict()) == keys
    assert model.config is settings
    assert [name for name, _ in model.named_modules()] == [
        name for name, _ in (LLAMA.build() if which == "plain" else with_peft(LLAMA.build(), folders)).named_modules()
    ]


def test_save_pretrained_of_a_plain_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(run(again, INPUTS), run(LLAMA.build(), INPUTS))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("which", ["plain", "peft"])
def test_copies(way, which, model, compiled_peft, reference, tmp_path):
    """A copy has adapters and switches of its own."""
    original = {"plain": model, "peft": compiled_peft}[which]
    assert_still_right(original, reference)
    made = copy.deepcopy(original) if way == "deepcopy" else pickle.loads(pickle.dumps(original))
    assert made.lora is not original.lora
    assert made.lora.names == ["a", "b", "c"]
    assert_still_right(made, reference)
    assert fused_graphs(made) == 1
    made.lora.use("b")
    reference.set_adapter("b")
    assert_close(run(made, INPUTS), run(reference, INPUTS))
    made.lora.replace("b", save_adapter(LLAMA, tmp_path, seed=8, r=5, target_modules=["q_proj"]))
    assert difference(run(made, INPUTS), run(reference, INPUTS)) > 1e-2
    assert_still_right(original, reference)


# ------------------------------------------------------------------------------------------------ choosing


def delta(model, name, rows=slice(None)):
    """What one adapter alone adds to the first layer's v: the effect of weights is exactly linear there."""
    seen = {}
    layer = model.model.layers[0].self_attn.v_proj
    hook = layer.register_forward_hook(lambda module, args, output: seen.update(v=output.detach().clone()))
    with model.lora.using(name):
        run(model, INPUTS)
    hook.remove()
    return seen["v"][rows]


def test_weights_add_up(folders):
    model = compiled_llama(folders, mode="eager")
    base, b, c = (delta(model, name) for name in (None, "b", "c"))
    got = delta(model, {"b": 0.7, "c": -0.3})
    assert_close(got, base + 0.7 * (b - base) - 0.3 * (c - base))
    mixed = delta(model, [{"b": 0.5}, None, {"b": 0.25, "c": 2.0}, "c"])
    want = torch.stack(
        [
            base[0] + 0.5 * (b - base)[0],
            base[1],
            base[2] + 0.25 * (b - base)[2] + 2.0 * (c - base)[2],
            c[3],
        ]
    )
    assert_close(mixed, want)


def test_weights_equal_pefts_weighted_adapter(model, folders):
    """PEFT makes one adapter of several by concatenation: the same sums, in one forward."""
    made = with_peft(LLAMA.build(), folders)
    made.add_weighted_adapter(["b", "c"], [0.7, 0.3], "both", combination_type="cat")
    made.set_adapter("both")
    made.eval()  # PEFT makes its dropout in training mode
    run(model, INPUTS)
    with model.lora.using({"b": 0.7, "c": 0.3}), nothing_traced(model):
        got = run(model, INPUTS)
    assert_close(got, run(made, INPUTS))


def test_using_restores_what_was_in_use(model):
    assert model.lora.in_use == ((),)
    with model.lora.using("a"):
        with model.lora.using(["b", None]):
            assert len(model.lora.in_use) == 2
        assert model.lora.in_use == ((("a", 1.0),),)
        with pytest.raises(KeyError), model.lora.using("c"):
            raise KeyError
        assert model.lora.in_use == ((("a", 1.0),),)
    assert model.lora.in_use == ((),)


def test_a_shorter_list_is_repeated_over_the_rows(model, reference):
    """As generate repeats rows: each name stands for as many rows in turn."""
    with model.lora.using(["a", None]):
        got = run(model, INPUTS)
    assert_close(got, run(reference, INPUTS, ["a", "a", "__base__", "__base__"]))


def test_names_of_one_call_win_over_what_is_in_use(model, reference):
    with model.lora.using("a"):
        assert_still_right(model, reference)
        assert model.lora.in_use == ((("a", 1.0),),)
        assert_close(run(model, INPUTS, [None] * 4), run(LLAMA.build(), INPUTS), 1e-6)


# ------------------------------------------------------------------------------------------------ loading while it runs

NEW = {"seed": 11, "r": 6, "lora_alpha": 20, "target_modules": ["k_proj", "v_proj"]}


@pytest.mark.parametrize("which", ["plain", "peft"])
@pytest.mark.parametrize("reserved", [True, False])
def test_load_replace_unload(which, reserved, folders, tmp_path):
    room = {"max_adapters": 5, "max_rank": 16, "target_modules": ["up_proj", *QKV]} if reserved else {}
    few = {name: folders[name] for name in "ab"}
    new, other = (
        save_adapter(LLAMA, tmp_path / "n", **NEW),
        save_adapter(LLAMA, tmp_path / "o", seed=12, r=16, target_modules=["up_proj"]),
    )
    reference = with_peft(LLAMA.build(), {**few, "new": new})
    later = with_peft(LLAMA.build(), {**few, "new": other})
    if which == "plain":
        model = compiled_llama(few, **room)
    else:
        model = lorafx.compile(with_peft(LLAMA.build(), few), options=EAGER_GRAPH, **room)
    run(model, INPUTS)

    # room on a plain model serves all; on a PeftModel, PEFT wraps up_proj only when an adapter targets it
    expected = {("plain", True): (0, 0), ("peft", True): (0, 1)}.get((which, reserved), (1, 2))

    def retraces(step):
        report = lorafx.explain(model)
        assert len(report.retraces) == expected[step - 1]
        assert len(report.graphs) == 1 + expected[step - 1]

    names = ["new", "a", "__base__", "b"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.lora.load("new", new)
        assert model.lora.names == ["a", "b", "new"]
        assert_close(run(model, INPUTS, names), run(reference, INPUTS, names))
        retraces(1)
        model.lora.replace("new", other)
        assert_close(run(model, INPUTS, names), run(later, INPUTS, names))
        retraces(2)
        model.lora.unload("new")
        assert model.lora.names == ["a", "b"]
        names = ["a", "b", "a", "__base__"]
        assert_close(run(model, INPUTS, names), run(reference, INPUTS, names))
        retraces(2)
        model.lora.load("new", new)
        names = ["new", "new", "__base__", "b"]
        assert_close(run(model, INPUTS, names), run(reference, INPUTS, names))
        retraces(2)
    if which == "peft":
        assert set(model.peft_config) == {"a", "b", "new"}


def test_a_retrace_says_why(folders):
    model = compiled_llama({"a": folders["a"]})
    run(model, INPUTS)
    with pytest.warns(UserWarning, match="adapter 'c' adapts .* layer.* none did before"):
        model.lora.load("c", folders["c"])
    assert "'c'" in lorafx.explain(model).retraces[0]


def test_replace_what_is_in_use(folders, tmp_path):
    model = compiled_llama({"a": folders["b"]})
    model.lora.use("a")
    reference = with_peft(LLAMA.build(), {"a": save_adapter(LLAMA, tmp_path, **{**NEW, "r": 7})})
    assert difference(run(model, INPUTS), run(reference, INPUTS)) > 1e-2
    with nothing_traced(model):
        model.lora.replace("a", str(tmp_path))
        assert_close(run(model, INPUTS), run(reference, INPUTS))
    with pytest.raises(lorafx.AdapterMismatchError, match="in use"):
        model.lora.unload("a")


@pytest.mark.parametrize("alpha", [8, 3])
def test_replace_by_the_same_layers(alpha, tmp_path):
    """Other numbers, and another scale or not."""
    one = save_adapter(LLAMA, tmp_path / "one", 1, r=4, lora_alpha=8, target_modules=QKV)
    other = save_adapter(LLAMA, tmp_path / "other", 2, r=4, lora_alpha=alpha, target_modules=QKV)
    model = compiled_llama({"a": one})
    run(model, INPUTS)
    weights = model.lora.read(other)
    assert model.lora.store.holds(0, weights.layout)
    model.lora.replace("a", weights)
    assert_close(run(model, INPUTS), run(with_peft(LLAMA.build(), {"a": other}), INPUTS))
    assert difference(run(model, INPUTS), run(with_peft(LLAMA.build(), {"a": one}), INPUTS)) > 1e-2


# ------------------------------------------------------------------------------------------------ as a backend


def test_backend_of_torch_compile(folders):
    peft_model = with_peft(LLAMA.build(), folders)
    want = run(peft_model, INPUTS)
    compiled = torch.compile(peft_model.get_base_model(), backend="lorafx", options=EAGER_GRAPH)
    assert_close(run(compiled, INPUTS), want)
    report = lorafx.explain(peft_model.get_base_model())
    assert {group.op for group in report.groups} == {"fused_lora"}
    assert report.skipped == []


def test_backend_in_compile_config(folders, monkeypatch):
    """generate compiles its decode step with it; on a CPU only where it is asked to."""
    peft_model = with_peft(LLAMA.build(), {"b": folders["b"]})
    want = generated(peft_model, cache_implementation="static", disable_compile=True)
    settings = CompileConfig(backend="lorafx", fullgraph=False, mode=None, dynamic=False)
    settings._compile_all_devices = True
    lorafx.backend.recent.clear()
    with torch._inductor.config.patch(compile_threads=1):
        got = generated(peft_model, max_new_tokens=3, cache_implementation="static", compile_config=settings)
    assert torch.equal(got, want[:, : got.shape[1]])
    assert lorafx.backend.recent
    assert {group.op for group in lorafx.explain(peft_model.get_base_model()).groups} == {"fused_lora"}
