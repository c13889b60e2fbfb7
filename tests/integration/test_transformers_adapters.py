"""transformers' own adapter methods on a model that lorafx has compiled, before PEFT came to it or after."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model

import lorafx

from .lockstep import INPUTS, adapters_of, assert_equal_now, assert_one_copy, in_step, lora_layers, nothing_traced
from .models import EAGER_GRAPH, LLAMA, assert_close, config, run, save_adapter, three_adapters, with_peft

pytestmark = pytest.mark.filterwarnings("ignore:lorafx. PEFT has wrapped", "ignore:lorafx. adapter")
QKV = list(LLAMA.qkv)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    more = {"same": {"r": 7, "lora_alpha": 10, "target_modules": QKV}, "e": {"r": 2, "target_modules": ["v_proj"]}}
    saved = {name: save_adapter(LLAMA, folder / name, seed=9, **values) for name, values in more.items()}
    return {**three_adapters(LLAMA, folder), **saved}


def warm(model, **room):
    lorafx.compile(model, options=EAGER_GRAPH, **room)
    run(model, INPUTS)
    return model


def assert_right(pair):
    """transformers has no batches of mixed adapters: each adapter alone, row by row, is their measure."""
    assert_equal_now(pair)
    if (names := adapters_of(pair[0])) and pair[0].active_adapters():
        assert_one_copy(pair[0])
        active = pair[1].active_adapters()
        mixed = [*names[:3], None, names[-1]][-4:]
        alone = []
        for name in mixed:
            if name is None:
                alone.append(run(LLAMA.build(), INPUTS))
            else:
                for layer in lora_layers(pair[1]):
                    layer._active_adapter = [name]
                alone.append(run(pair[1], INPUTS))
        for layer in lora_layers(pair[1]):
            layer._active_adapter = active
        if len(mixed) == 4 and not lora_layers(pair[1])[0].disable_adapters:
            got = run(pair[0], INPUTS, mixed)
            for row in range(4):
                assert_close(got[row], alone[row][row])
    assert_equal_now(pair)


def loads(model, folders):
    for name in "abc":
        model.load_adapter(folders[name], adapter_name=name)
        yield
    for name in "abc":
        model.set_adapter(name)
        yield


def switches(model, folders):
    for choice in ("b", "a", ["a", "b"], ["b", "c"], "c"):
        model.set_adapter(choice)
        yield
    model.disable_adapters()
    yield
    model.set_adapter("b")
    yield
    model.enable_adapters()
    yield
    assert model.active_adapters() == ["b"]


def changes(model, folders):
    torch.manual_seed(4)
    model.add_adapter(config(r=3, target_modules=["q_proj"]), adapter_name="added")
    model.eval()
    yield
    model.load_adapter(folders["e"], adapter_name="e")
    model.set_adapter("e")
    yield
    model.load_adapter(folders["same"], adapter_name="b", hotswap=True)
    model.set_adapter("b")
    yield
    model.delete_adapter("e")
    yield
    model.delete_adapter(["b", "added"])
    model.set_adapter("a")
    yield


def deletes(model, folders):
    model.delete_adapter(["a", "c"])
    yield


ROOM = {"max_adapters": 8, "max_rank": 16, "target_modules": "all-linear"}


@pytest.mark.parametrize("first", ["PEFT", "lorafx"])
def test_every_method_in_lockstep(first, folders):
    """Compiled without adapters, the model is traced once when PEFT's layers come; then nothing is."""
    pair = LLAMA.build(), LLAMA.build()
    if first == "lorafx":
        warm(pair[0], **ROOM)
        in_step(pair, loads, folders, assert_right)
        # a wraps q, b further layers, c all
        assert [reason.partition(", such")[0] for reason in lorafx.explain(pair[0]).retraces] == [
            "PEFT has wrapped 2 layer(s) that it had not",
            "PEFT has wrapped 4 layer(s) that it had not",
            "PEFT has wrapped 8 layer(s) that it had not",
        ]
    else:
        for each in pair:
            for _ in loads(each, folders):
                pass
        warm(pair[0], **ROOM)
        assert_right(pair)
    with nothing_traced(pair[0]):
        in_step(pair, switches, folders, assert_right)
        in_step(pair, changes, folders, assert_right)
        in_step(pair, deletes, folders, assert_equal_now)
        assert pair[0].lora.names == []
    lorafx.uncompile(pair[0])
    assert_equal_now(pair)


def test_without_room(folders):
    pair = LLAMA.build(), LLAMA.build()
    warm(pair[0])
    in_step(pair, loads, folders, assert_right)
    in_step(pair, switches, folders, assert_right)
    lorafx.uncompile(pair[0])
    in_step(pair, switches, folders, assert_equal_now)


def test_beside_adapters_of_ours_it_is_refused_before_anything_changes(folders):
    model = LLAMA.build()
    lorafx.compile(model, {"a": folders["a"]}, options=EAGER_GRAPH)
    want = run(model, INPUTS)
    for method, arguments in (("load_adapter", (folders["b"],)), ("add_adapter", (config(target_modules=QKV),))):
        with pytest.raises(lorafx.UnsupportedModelError, match=r"(?s)'a'.*model\.lora\.load.*unload"):
            getattr(model, method)(*arguments)
        assert lora_layers(model) == []
        assert torch.equal(run(model, INPUTS), want)
    model.lora.use(None)
    model.lora.unload("a")
    reference = LLAMA.build()
    for each in (model, reference):
        each.load_adapter(folders["b"], adapter_name="b")
    assert_right((model, reference))
    lorafx.uncompile(model)
    assert "load_adapter" not in vars(model)


@pytest.mark.parametrize("way", ["inject", "wrap"])
def test_put_on_past_these_methods(way, folders):
    """Beside adapters of ours: refused at the next call, until one of the two goes."""
    model, reference = LLAMA.build(), LLAMA.build()
    lorafx.compile(model, {"a": folders["a"]}, options=EAGER_GRAPH)
    settings = config(target_modules=QKV)
    whole = [model, reference]
    for i, each in enumerate((model, reference)):
        torch.manual_seed(3)
        if way == "inject":
            inject_adapter_in_model(settings, each, adapter_name="new")
        else:
            whole[i] = get_peft_model(each, settings, adapter_name="new")
        whole[i].eval()
    refused = r"new.*given others \(a\).*delete_adapter.*uncompile"
    with pytest.raises(lorafx.UnsupportedModelError, match=refused):
        run(whole[0], INPUTS)
    if way == "inject":
        model._hf_peft_config_loaded = True
        model.delete_adapter("new")
        assert_close(run(model, INPUTS), run(with_peft(LLAMA.build(), {"a": folders["a"]}), INPUTS))
    else:
        lorafx.uncompile(model)
        assert_equal_now(whole)


def test_wrapped_by_peft_after_compiling():
    """adapter_names go PEFT's way there: through hooks on its layers, which nothing compiled would see."""
    pair, settings = [], config(target_modules=QKV)
    for compiled in (True, False):
        torch.manual_seed(3)
        root = warm(LLAMA.build()) if compiled else LLAMA.build()
        pair.append(get_peft_model(root, settings, adapter_name="new").eval())
    for names in (None, ["new", "__base__"] * 2, None):
        assert_equal_now(pair, names)


def test_load_replace_unload_of_ours_on_it(folders):
    model, reference = LLAMA.build(), with_peft(LLAMA.build(), {"a": folders["a"], "b": folders["b"]})
    model.load_adapter(folders["a"], adapter_name="a")
    warm(model)
    with pytest.raises(lorafx.UnsupportedModelError, match="load_adapter"):
        model.lora.load("b", folders["b"])
    model.load_adapter(folders["b"], adapter_name="b")
    assert_close(run(model, INPUTS, ["a", "b", None, "b"]), run(reference, INPUTS, ["a", "b", "__base__", "b"]))
