"""Changes of a PeftModel through ``model.lora``: whatever stops one, all is as before, or the change is whole."""

from __future__ import annotations

import itertools
import warnings
from functools import partial

import pytest
import torch
from peft.tuners.lora import LoraLayer

import lorafx
from lorafx.module_snapshot import refill
from tests.interrupting import interrupt_at

from .lockstep import INPUTS, assert_one_copy
from .models import EAGER_GRAPH, LLAMA, run, save_adapters, three_adapters, with_peft

QKV = list(LLAMA.qkv)
NAMES = ["a", "b", "__base__", "b"]
# stopped on the way out of a "with", these would keep their locks, as no Ctrl-C makes them; they change nothing
SPARE = ("locking.py", "reading.py")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    more = {
        "d": {"r": 16, "target_modules": ["q_proj", "k_proj"]},
        "biased": {"r": 3, "target_modules": ["v_proj"], "lora_bias": True},
    }
    return {**three_adapters(LLAMA, folder, layers=1), **save_adapters(LLAMA, folder / "more", 1, **more)}


def make(folders, reserved=False, mode="eager"):
    room = {"max_adapters": 4, "max_rank": 16, "target_modules": "all-linear"} if reserved else {}
    few = {name: folders[name] for name in "ab"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lorafx.compile(with_peft(LLAMA.build(1), few), mode=mode, options=EAGER_GRAPH, **room)
    model.set_adapter("b")
    run(model, INPUTS, NAMES)
    return model


def state_of(model) -> dict:
    """Everything that a change may touch; the outputs come last, since a call brings the bank up to the model."""
    bank, root = model.lora, model.get_base_model()
    names = [name if name in model.peft_config else "__base__" for name in NAMES]
    layers = {path: layer for path, layer in root.named_modules() if isinstance(layer, LoraLayer)}
    return {
        "modules": [(path, type(module).__name__, module.training) for path, module in model.named_modules()],
        "wants gradients": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "config": {name: settings.to_dict() for name, settings in model.peft_config.items()},
        "layers": [
            (path, dict(x.scaling), dict(x.r), dict(x.lora_alpha), list(x.active_adapters), x.disable_adapters)
            for path, x in layers.items()
        ],
        "targets": list(model.base_model.targeted_module_names),
        "active": (model.active_adapter, list(model.active_adapters)),
        "hooks": sum(len(module._forward_hooks) for module in model.modules()),
        "bank": (list(bank.names), bank.nbytes, bank.reserved, bank.in_use, bank._chosen, bank.table()),
        "sites": [site.name for site in bank.store.sites],
        "retraces": list(lorafx.explain(model).retraces),
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "outputs": [run(model, INPUTS), run(model, INPUTS, names)],
    }


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def differing(one, other) -> list[str]:
    return [key for key in one if not same(one[key], other[key])]


CHANGES = {
    "load": lambda model, folders: model.lora.load("new", folders["d"]),
    "load on further layers": lambda model, folders: model.lora.load("new", folders["c"]),
    "load with biases": lambda model, folders: model.lora.load("new", folders["biased"]),
    "replace": lambda model, folders: model.lora.replace("b", folders["a"]),
    "replace, on further layers": lambda model, folders: model.lora.replace("b", folders["c"]),
    "unload": lambda model, folders: model.lora.unload("a"),
}


def stopped_at_lines(change, reserved, folders, stride, first=1):
    """Returns (how many lines there are, at how many the change was whole)."""
    model, goal = make(folders, reserved), make(folders, reserved)
    CHANGES[change](goal, folders)
    before, after, whole = state_of(model), state_of(goal), 0
    for line in itertools.count(first, stride):
        if not interrupt_at(line, "lorafx", partial(CHANGES[change], model, folders), SPARE):
            break
        now = state_of(model)
        if not same(now, before):
            assert not differing(now, after), f"neither the old state nor the new one after line {line}"
            whole += 1
            model = make(folders, reserved)
        assert_one_copy(model)
    assert not differing(state_of(model), after)  # a clean one works
    return line, whole * stride


@pytest.mark.parametrize("reserved", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_some_lines(change, reserved, folders):
    lines, _ = stopped_at_lines(change, reserved, folders, 211)
    assert lines > 200


@pytest.mark.slow
@pytest.mark.parametrize("reserved", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_every_third_line(change, reserved, folders):
    """Of some 11,000, another third for each kind of room."""
    stopped_at_lines(change, reserved, folders, 3, first=1 + reserved)


@pytest.mark.parametrize("step", range(1, 9, 2))
@pytest.mark.parametrize("change", [name for name in CHANGES if name != "unload"])
def test_an_error_inside_peft(change, step, folders, monkeypatch):
    model = make(folders)
    before, called = state_of(model), itertools.count(1)
    update_layer = LoraLayer.update_layer

    def broken(*args, **kwargs):
        update_layer(*args, **kwargs)
        if args[0].weight.device.type != "meta" and next(called) == step:  # not in the skeleton that reading uses
            raise MemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(LoraLayer, "update_layer", broken)
        try:
            CHANGES[change](model, folders)
        except MemoryError:
            assert not differing(state_of(model), before)
        else:
            assert next(called) <= step  # so many layers there are not
            return
    CHANGES[change](model, folders)
    goal = make(folders)
    CHANGES[change](goal, folders)
    assert not differing(state_of(model), state_of(goal))


@pytest.mark.parametrize("place", ["lorafx.store.PackedStore.put", "lorafx.following.Follower._bring_up_switches"])
@pytest.mark.parametrize("change", [name for name in CHANGES if name != "unload"])
def test_an_error_when_the_bank_is_brought_up(change, place, folders, monkeypatch):
    """PEFT is done, and the bank can't follow, however often it is tried, before it is written or after."""
    model = make(folders, reserved=True)
    before = state_of(model)

    def broken(*args):
        raise MemoryError("no more")

    with monkeypatch.context() as patch:
        if place.endswith("put"):  # not the one that puts things back
            patch.setattr("lorafx.peft_change.Before.put_back_rows", lambda self: None)
        patch.setattr(place, broken)
        with pytest.raises(MemoryError):
            CHANGES[change](model, folders)
    assert not differing(state_of(model), before)
    assert_one_copy(model)


def test_what_is_put_back_is_never_empty_meanwhile():
    """Other threads look modules up there, before they come to a lock."""

    class Watched(dict):
        def clear(self):
            raise AssertionError("emptied")

    container = Watched(kept=1, changed=2, extra=3)
    refill(container, {"kept": 1, "changed": 5})
    assert list(container.items()) == [("kept", 1), ("changed", 5)]


def test_the_compiled_graph_survives(folders):
    """Its key and its layers are those from before: nothing is traced again."""
    model = make(folders, mode=None)
    graphs, want = len(lorafx.explain(model).graphs), state_of(model)
    for line in (400, 900, 1300):
        assert interrupt_at(line, "lorafx", lambda: CHANGES["load on further layers"](model, folders))
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert not differing(state_of(model), want)
    assert len(lorafx.explain(model).graphs) == graphs


@pytest.mark.parametrize("line", [5, 200, 600])
def test_interrupted_compile(line, folders):
    """With adapters to load onto a PeftModel; the lines after are those of its first look at the model."""
    model, reference = (with_peft(LLAMA.build(1), {"a": folders["a"]}) for _ in range(2))
    more = {"c": folders["c"]}
    assert interrupt_at(line, "lorafx", lambda: lorafx.compile(model, more, options=EAGER_GRAPH))
    assert model.get_base_model()._compiled_call_impl is None
    assert not hasattr(model, "lora")
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in reference.named_modules()]
    assert torch.equal(run(model, INPUTS), run(reference, INPUTS))
    assert list(model.peft_config) == ["a"]
    lorafx.compile(model, more, options=EAGER_GRAPH)
    assert model.lora.names == ["a", "c"]
