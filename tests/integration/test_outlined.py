"""Models whose layers share one compiled part compute what they did, with adapters, caches, swaps and threads.

Most tests run the parts as they are, without Inductor; the last ones compile them.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from transformers import StaticCache

import lorafx
from lorafx import outlined
from lorafx.kernels.ops import resolve_lowering

from .in_threads import repeating
from .models import (
    EAGER_GRAPH,
    FAMILIES,
    LLAMA,
    VOCABULARY,
    Family,
    assert_close,
    difference,
    main_output,
    run,
    save_adapter,
    three_adapters,
    tokens,
    with_peft,
)

LAYERS = 6
NAMES = ["a", "__base__", "b", "c"]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def decoder(kind, **extra):
    """A causal model whose config has Llama's names."""

    def make(layers):
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=layers,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
            **extra,
        )
        return getattr(transformers, f"{kind}ForCausalLM")(config)

    return Family(make, LLAMA.inputs, LLAMA.qkv)


MODELS = {name: FAMILIES[name] for name in ("llama", "qwen2", "gpt2", "bert", "vit")}
MODELS["mistral"] = decoder("Mistral", sliding_window=4)
MODELS["gemma2"] = decoder("Gemma2", head_dim=8, sliding_window=4)
SHARED = dict.fromkeys(MODELS, LAYERS - 1)
SHARED["gemma2"] = 0  # two kinds of layers in turn: three repeats, which are too few


@pytest.fixture
def parts(monkeypatch):
    """Parts are run as they are. Returns how many nodes each had that was made, graph by graph."""
    sizes = []

    def as_it_is(gm, inputs, patches):
        sizes.append(len(gm.graph.nodes))
        return gm.forward

    monkeypatch.setattr(outlined, "compile_whole", as_it_is)
    return sizes


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return three_adapters(LLAMA, tmp_path_factory.mktemp("adapters"), LAYERS, task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def reference(folders):
    return with_peft(LLAMA.build(LAYERS), folders)


def graphs(model):
    return lorafx.explain(model).to_dict()["graphs"]


def shared(model):
    return [graph["outlined"] for graph in graphs(model)]


@pytest.mark.parametrize("name", MODELS)
def test_families(name, tmp_path, parts):
    family = MODELS[name]
    folders = three_adapters(family, tmp_path, LAYERS)
    inputs = family.inputs(len(NAMES))
    model = lorafx.compile(family.build(LAYERS), folders)
    got = run(model, inputs, NAMES)
    assert_close(got, run(with_peft(family.build(LAYERS), folders), inputs, NAMES))
    assert difference(got, run(family.build(LAYERS), inputs)) > 1e-3, "the adapters add next to nothing"
    assert shared(model) == [SHARED[name]]
    assert len(parts) == (3 if SHARED[name] else 1)
    if SHARED[name]:
        assert f"{SHARED[name]} layer(s) run" in str(lorafx.explain(model))


def test_layers_of_two_kinds_in_turn(tmp_path, parts):
    family, layers = MODELS["gemma2"], 10
    folders = three_adapters(family, tmp_path, layers)
    inputs = family.inputs(len(NAMES))
    model = lorafx.compile(family.build(layers), folders)
    assert_close(run(model, inputs, NAMES), run(with_peft(family.build(layers), folders), inputs, NAMES))
    assert shared(model)[0] == layers // 2 - 1


def test_encoder_and_decoder(tmp_path, parts):
    family = FAMILIES["t5"]
    folders = three_adapters(family, tmp_path, LAYERS)
    inputs = family.inputs(len(NAMES))
    model = lorafx.compile(family.build(LAYERS), folders)
    assert_close(run(model, inputs, NAMES), run(with_peft(family.build(LAYERS), folders), inputs, NAMES))
    assert shared(model)[0] >= 6, "both stacks"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache, folders, reference, parts):
    ways = {"static": {"cache_implementation": "static", "disable_compile": True}, "dynamic": {}}[cache]
    model = lorafx.compile(LLAMA.build(LAYERS), folders)
    ids = tokens(4)
    got = model.generate(ids, adapter_names=NAMES, **GREEDY, **ways)
    assert torch.equal(got, reference.generate(input_ids=ids, adapter_names=NAMES, **GREEDY, **ways))
    assert len(shared(model)) >= 2, "a prompt and a token"
    assert all(shared(model)), shared(model)


def test_static_cache_step_by_step(folders, parts):
    """What is in the cache after each step, too."""
    model = lorafx.compile(LLAMA.build(LAYERS), folders)
    plain = lorafx.compile(LLAMA.build(LAYERS), folders, options=EAGER_GRAPH)
    caches = [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
    with torch.no_grad():
        for step, ids in enumerate([tokens(2), *(tokens(2, 1, seed=s) for s in range(4))]):
            names = ["a", "b"] if step % 2 else ["c", None]
            left, right = (
                m(ids, past_key_values=cache, adapter_names=names).logits
                for m, cache in zip((model, plain), caches, strict=True)
            )
            torch.testing.assert_close(left, right, rtol=0, atol=0)
            for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
                torch.testing.assert_close(one.keys, other.keys, rtol=0, atol=0)
                torch.testing.assert_close(one.values, other.values, rtol=0, atol=0)
                assert torch.equal(one.cumulative_length, other.cumulative_length)
    assert all(shared(model))


@pytest.mark.parametrize("dynamic", [True, False])
def test_shapes(dynamic, folders, reference, parts):
    model = lorafx.compile(LLAMA.build(LAYERS), folders, dynamic=dynamic)
    for columns in (5, 9, 12):
        inputs = {"input_ids": tokens(4, columns)}
        assert_close(run(model, inputs, NAMES), run(reference, inputs, NAMES))
    assert len(shared(model)) == (1 if dynamic else 3)
    assert all(shared(model))


def test_hidden_states_of_all_layers(folders, reference, parts):
    model = lorafx.compile(LLAMA.build(LAYERS), folders)
    inputs = LLAMA.inputs(4)
    with torch.no_grad():
        got = model(**inputs, output_hidden_states=True, adapter_names=NAMES).hidden_states
        want = reference(**inputs, output_hidden_states=True, adapter_names=NAMES).hidden_states
    assert len(got) == len(want) == LAYERS + 1
    for left, right in zip(got, want, strict=True):
        assert_close(left, right)
    assert shared(model)[0] >= 3


def test_swaps(folders, reference, tmp_path, parts):
    """Other adapters in the same room: nothing is traced anew, and nothing of the old one is left in a view."""
    model = lorafx.compile(LLAMA.build(LAYERS), folders, max_adapters=4, max_rank=16)
    inputs = LLAMA.inputs(4)
    assert_close(run(model, inputs, NAMES), run(reference, inputs, NAMES))
    before = len(graphs(model))
    other = save_adapter(LLAMA, tmp_path / "d", seed=7, layers=LAYERS, r=8, target_modules=list(LLAMA.qkv))
    with torch._dynamo.config.patch(error_on_recompile=True):
        model.lora.load("d", other)
        mixed = run(model, inputs, ["d", "a", None, "d"])
        model.lora.replace("a", other)
        assert_close(run(model, inputs, ["a"] * 4), run(model, inputs, ["d"] * 4))
        model.lora.unload("d")
        assert_close(run(model, inputs, ["b"] * 4), run(reference, inputs, ["b"] * 4))
    assert len(graphs(model)) == before
    theirs = with_peft(LLAMA.build(LAYERS), {"a": folders["a"], "d": other})
    assert_close(mixed, run(theirs, inputs, ["d", "a", "__base__", "d"]))


def test_a_bank_that_grows(folders, tmp_path, parts):
    """Its tensors are others then: no view of the old ones may be used."""
    model = lorafx.compile(LLAMA.build(LAYERS), {"a": folders["a"]})
    inputs = LLAMA.inputs(2)
    run(model, inputs, ["a", "a"])
    other = save_adapter(LLAMA, tmp_path / "d", seed=7, layers=LAYERS, r=32, target_modules=list(LLAMA.qkv))
    model.lora.load("d", other)
    theirs = with_peft(LLAMA.build(LAYERS), {"a": folders["a"], "d": other})
    assert_close(run(model, inputs, ["d", "a"]), run(theirs, inputs, ["d", "a"]))
    assert all(shared(model))


def test_threads(folders, reference, parts):
    model = lorafx.compile(LLAMA.build(LAYERS), folders)
    inputs = LLAMA.inputs(4)
    wanted = {name: run(reference, inputs, [name] * 4) for name in ("a", "b", "c")}
    run(model, inputs, NAMES)

    turn = itertools.cycle(wanted)

    def call():
        name = next(turn)
        assert_close(run(model, inputs, [name] * 4), wanted[name])

    with repeating(call, threads=3):
        for _ in range(10):
            assert_close(run(model, inputs, NAMES), run(reference, inputs, NAMES))


# ------------------------------------------------------------------------------------------------ left whole


def test_off(folders, reference, parts):
    model = lorafx.compile(LLAMA.build(LAYERS), folders, options={"outline": False})
    inputs = LLAMA.inputs(4)
    assert_close(run(model, inputs, NAMES), run(reference, inputs, NAMES))
    assert shared(model) == [0]
    assert len(parts) == 1


@pytest.mark.parametrize("options", [{"triton.cudagraphs": True}, {"freezing": True}, {"cpp_wrapper": True}])
def test_settings_of_inductor(options, folders, parts):
    model = lorafx.compile(LLAMA.build(LAYERS), folders, options=options)
    run(model, LLAMA.inputs(1), ["a"])
    assert shared(model) == [0]
    ours = "aten" if "cpp_wrapper" in options else resolve_lowering("auto", torch.zeros(1))
    assert {group.lowering for group in lorafx.explain(model).groups} == {ours}


def test_our_kernel_is_not_called_from_inductors_c(folders):
    with pytest.raises(lorafx.LorafxError, match="leave out the lowering"):
        lorafx.compile(LLAMA.build(LAYERS), folders, options={"cpp_wrapper": True, "lowering": "cpp"})


@pytest.mark.slow
def test_cpp_wrapper(folders, reference):
    """Our C++ op crashed the process when it was called from there."""
    model = lorafx.compile(LLAMA.build(LAYERS), folders, options={"cpp_wrapper": True})
    inputs = LLAMA.inputs(4)
    assert_close(run(model, inputs, NAMES), run(reference, inputs, NAMES))


def test_gradients(folders, parts):
    model = lorafx.compile(LLAMA.build(LAYERS), folders)
    with torch.enable_grad():
        main_output(model(**LLAMA.inputs(1), adapter_names=["a"])).sum().backward()
    assert shared(model) == [0]


# ------------------------------------------------------------------------------------------------ through Inductor


def test_compiled(folders, reference):
    model = lorafx.compile(LLAMA.build(LAYERS), folders)
    inputs = LLAMA.inputs(4)
    assert_close(run(model, inputs, NAMES), run(reference, inputs, NAMES))
    assert_close(run(model, inputs, ["b"] * 4), run(reference, inputs, ["b"] * 4))
    assert shared(model) == [LAYERS - 1]


def test_compiled_static_cache(folders, reference):
    ways = {"cache_implementation": "static", "disable_compile": True, **GREEDY}
    model = lorafx.compile(LLAMA.build(LAYERS), folders)
    ids = tokens(4)
    got = model.generate(ids, adapter_names=NAMES, **ways)
    assert torch.equal(got, reference.generate(input_ids=ids, adapter_names=NAMES, **ways))
    assert all(shared(model))


SECOND_START = """
    import sys, torch
    from torch._dynamo.utils import counters
    from tests.integration.models import LLAMA, run
    import lorafx
    model = lorafx.compile(LLAMA.build(6), {"a": sys.argv[1]})
    run(model, LLAMA.inputs(2), ["a", "a"])
    print(dict(counters["aot_autograd"]), [g.outlined for g in lorafx.explain(model).graphs])
"""


def test_caches_on_disk(folders, tmp_path, monkeypatch):
    """A second process compiles nothing."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SECOND_START), folders["b"]]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert "'autograd_cache_miss': 3" in first
    assert "'autograd_cache_hit': 3" in second
    assert "[5]" in second
