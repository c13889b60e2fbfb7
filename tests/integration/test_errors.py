"""Bad input is refused by name, and the model works on as before. What can't be fused stays as PEFT has it."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import lorafx

from .models import (
    EAGER_GRAPH,
    FAMILIES,
    LLAMA,
    TOKENS,
    adapted_layers,
    assert_close,
    compiled_llama,
    config,
    difference,
    run,
    save_adapter,
    three_adapters,
    tokens,
    with_peft,
)
from .test_reading import snapshot

QKV = list(LLAMA.qkv)
INPUTS = LLAMA.inputs(4)
FORMAT, MISMATCH = lorafx.AdapterFormatError, lorafx.AdapterMismatchError


# ------------------------------------------------------------------------------------------------ no adapters


def no_folder(folder):
    return str(folder / "nowhere")


def empty_folder(folder):
    return str(folder)


def a_file(folder):
    (folder / "adapter.txt").write_text("no adapter")
    return str(folder / "adapter.txt")


def no_weights(folder):
    path = save_adapter(LLAMA, folder, target_modules=QKV)
    weights_of(path).unlink()
    return path


def weights_of(path):
    return Path(path) / "adapter_model.safetensors"


def truncated(folder):
    path = save_adapter(LLAMA, folder, target_modules=QKV)
    data = weights_of(path).read_bytes()
    weights_of(path).write_bytes(data[: len(data) // 2])
    return path


def truncated_header(folder):
    path = save_adapter(LLAMA, folder, target_modules=QKV)
    weights_of(path).write_bytes(weights_of(path).read_bytes()[:5])
    return path


def empty_file(folder):
    path = save_adapter(LLAMA, folder, target_modules=QKV)
    weights_of(path).write_bytes(b"")
    return path


def malicious_pickle(folder):
    path = save_adapter(LLAMA, folder, target_modules=QKV)
    torch.save({"a": print}, Path(path) / "adapter_model.bin")
    weights_of(path).unlink()
    return path


def broken_config(folder):
    path = save_adapter(LLAMA, folder, target_modules=QKV)
    (Path(path) / "adapter_config.json").write_text('{"peft_type": "LORA", ')
    return path


def config_without_type(folder):
    path = save_adapter(LLAMA, folder, target_modules=QKV)
    (Path(path) / "adapter_config.json").write_text("{}")
    return path


def edited(folder, change):
    path = save_adapter(LLAMA, folder, target_modules=QKV)
    tensors = load_file(weights_of(path))
    change(tensors)
    save_file(tensors, weights_of(path), metadata={"format": "pt"})
    return path


def wrong_shape(folder):
    def change(tensors):
        key = next(key for key in tensors if "lora_B" in key)
        tensors[key] = tensors[key][:-1].clone()

    return edited(folder, change)


def wrong_rank(folder):
    def change(tensors):
        for key in tensors:
            tensors[key] = (tensors[key][:-1] if "lora_A" in key else tensors[key][:, :-1]).clone()

    return edited(folder, change)


def missing_tensor(folder):
    return edited(folder, lambda tensors: tensors.pop(next(iter(tensors))))


def nan_inside(folder):
    return edited(folder, lambda tensors: next(iter(tensors.values())).view(-1)[3:4].fill_(float("nan")))


def other_config(folder):
    """A file whose config targets fewer layers than it has weights for."""
    path = Path(save_adapter(LLAMA, folder, target_modules=QKV))
    settings = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["q_proj"]}))
    return str(path)


def unknown_target(folder):
    path = Path(save_adapter(LLAMA, folder, target_modules=QKV))
    settings = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["qkv_fused"]}))
    return str(path)


def variant(**fields):
    def make(folder):
        return save_adapter(LLAMA, folder, **{"target_modules": QKV, **fields})

    return make


def prompt_tuning(folder):
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(LLAMA.build(), settings).save_pretrained(str(folder))
    return str(folder)


PARAMETER = {"target_parameters": ["embed_tokens.weight"], "lora_dropout": 0.0}  # of no linear layer

SOURCES = {
    "a path that is not there": (no_folder, FORMAT, r"nowhere.*no such folder.*Expected a folder"),
    "an empty folder": (empty_folder, FORMAT, r"no adapter_config.json.*Expected"),
    "a file": (a_file, FORMAT, r"not an adapter.*Expected"),
    "a folder without weights": (no_weights, FORMAT, r"has no weights; expected adapter_model.safetensors"),
    "a truncated file": (truncated, FORMAT, r"can't be read.*cut short or damaged: copy or download it again"),
    "a truncated header": (truncated_header, FORMAT, r"can't be read.*cut short or damaged"),
    "an empty file": (empty_file, FORMAT, r"can't be read.*cut short or damaged"),
    "a pickle that calls": (malicious_pickle, FORMAT, r"can't be read"),
    "a config that is no JSON": (broken_config, FORMAT, r"adapter_config.json can't be read"),
    "a config without a type": (config_without_type, FORMAT, r"adapter_config.json can't be read|type"),
    "a tensor of the wrong shape": (wrong_shape, MISMATCH, r"does not fit LlamaForCausalLM.*lora_B.*Expected"),
    "ranks that the config does not have": (wrong_rank, MISMATCH, r"does not fit LlamaForCausalLM.*Expected"),
    "a tensor that is missing": (missing_tensor, MISMATCH, r"missing in the file.*lora_A"),
    "weights without a target": (other_config, MISMATCH, r"no layer for.*config that does not belong"),
    "a target the model lacks": (unknown_target, MISMATCH, r"does not fit.*qkv_fused.*Expected: target_modules"),
    "NaN": (nan_inside, FORMAT, r"NaN or Inf"),
    "VeLoRA": (variant(velora_config={"num_groups": 4}), FORMAT, r"uses VeLoRA.*pass the PeftModel"),
    "an adapted parameter": (variant(**PARAMETER), FORMAT, r"target_parameters.*PeftModel"),
    "trained base biases": (variant(bias="all"), FORMAT, r"bias='all'.*PeftModel"),
    "prompt tuning": (prompt_tuning, FORMAT, r"PROMPT_TUNING.*LORA"),
    "a number": (lambda folder: 3, FORMAT, r"got int; expected the path of a PEFT folder"),
    "an empty state dict": (lambda folder: {}, FORMAT, r"expected the path of a PEFT folder"),
    "a state dict of something else": (
        lambda folder: {"weight": torch.zeros(2)},
        FORMAT,
        r"no '...lora_A...' among the 1 names.*Expected PEFT's names",
    ),
    "a pair without a config": (lambda folder: ({"x.lora_A.weight": torch.zeros(2, 2)}, 3), FORMAT, r"expected"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return three_adapters(LLAMA, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(params=SOURCES.values(), ids=SOURCES.keys())
def bad(request, tmp_path):
    make, error, text = request.param
    return make(tmp_path), error, f"(?s){text}"


def test_bad_adapter_given_to_compile(bad, folders):
    source, error, text = bad
    model = LLAMA.build()
    before, want = snapshot(model), run(model, INPUTS)
    with pytest.raises(error, match=text) as caught:
        lorafx.compile(model, {"good": folders["a"], "bad": source}, mode="eager")
    assert isinstance(caught.value, lorafx.LorafxError)
    assert "'bad'" in str(caught.value)
    assert snapshot(model) == before
    assert torch.equal(run(model, INPUTS), want)
    lorafx.compile(model, folders, mode="eager")  # and it can still be compiled


@pytest.fixture(scope="module")
def live(folders):
    """One compiled model, and one compiled PeftModel, that every refusal leaves as they were."""
    plain = compiled_llama(folders)
    peft = lorafx.compile(with_peft(LLAMA.build(), folders), options=EAGER_GRAPH)
    return {"plain": plain, "peft": peft}


def state_of(model):
    names = ["a", "c", "__base__", "b"]
    return run(model, INPUTS, names), run(model, INPUTS), model.lora.nbytes, model.lora.names, list(model.state_dict())


def assert_unchanged(model, before):
    outputs, rest = before[:2], before[2:]
    now = state_of(model)
    assert all(torch.equal(a, b) for a, b in zip(now[:2], outputs, strict=True))
    assert now[2:] == rest


@pytest.mark.parametrize("which", ["plain", "peft"])
def test_bad_adapter_given_to_load_and_replace(which, bad, live):
    source, error, text = bad
    model = live[which]
    before = state_of(model)
    with pytest.raises(error, match=text):
        model.lora.load("bad", source)
    with pytest.raises(error, match=text):
        model.lora.replace("b", source)
    assert_unchanged(model, before)
    if which == "peft":
        assert set(model.peft_config) == {"a", "b", "c"}


def test_bad_adapter_beside_those_of_a_peft_model(folders, tmp_path):
    model = with_peft(LLAMA.build(), folders)
    before, want = snapshot(model), run(model, INPUTS)
    with pytest.raises(MISMATCH):
        lorafx.compile(
            model, {"good": save_adapter(LLAMA, tmp_path / "g", target_modules=QKV), "bad": wrong_shape(tmp_path)}
        )
    assert snapshot(model) == before
    assert torch.equal(run(model, INPUTS), want)
    assert set(model.peft_config) == {"a", "b", "c"}


# ------------------------------------------------------------------------------------------------ names and rows

CALLS = {
    "an unknown name": (["a", "sql", "b", "c"], r"no adapter 'sql' is loaded; there are 'a', 'b', 'c'.*lora.load"),
    "too few names": (["a", "b"], r"got 2 adapter_names for a batch of 4 rows; expected one name for each row"),
    "too many names": (["a"] * 5, r"got 5 adapter_names for a batch of 4"),
    "an empty list": ([], r"got an empty list"),
    "a number in the list": (["a", 3, "b", "c"], r"got 3 for a row's adapter; expected a name"),
    "a number": (7, r"got int for an adapter; expected a name"),
}


@pytest.mark.parametrize("which", ["plain", "peft"])
@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS.keys())
def test_bad_adapter_names(case, which, live):
    names, text = case
    model = live[which]
    before = state_of(model)
    with pytest.raises(MISMATCH, match=f"(?s){text}"):
        model(**INPUTS, adapter_names=names)
    with pytest.raises(MISMATCH, match=f"(?s){text}"):
        model.generate(**INPUTS, adapter_names=names, max_new_tokens=2, pad_token_id=0)
    assert_unchanged(model, before)


@pytest.mark.parametrize("which", ["plain", "peft"])
def test_bad_choices(which, live):
    model = live[which]
    before = state_of(model)
    for choice, text in (("sql", "'sql'"), ({"a": 1, "sql": 2}, "'sql'"), ([], "empty list"), ({"a": "b"}, "weight")):
        with pytest.raises(MISMATCH, match=text):
            model.lora.use(choice)
        with pytest.raises(MISMATCH, match=text), model.lora.using(choice):
            pass
    for verb in (model.lora.unload, lambda name: model.lora.replace(name, "x")):
        with pytest.raises(MISMATCH, match="no adapter 'sql' is loaded"):
            verb("sql")
    with pytest.raises(MISMATCH, match="loaded already"):
        model.lora.load("a", "x")
    for name in ("", "__base__", None):
        with pytest.raises(MISMATCH, match="expected a text"):
            model.lora.load(name, "x")
    assert_unchanged(model, before)


def test_a_selection_that_does_not_divide_the_batch(live):
    model = live["plain"]
    with model.lora.using(["a", "b", "c"]), pytest.raises(MISMATCH, match="3 rows, the batch has 4"):
        run(model, INPUTS)


def test_too_many_rows_and_too_many_weights(live):
    model = live["plain"]
    before = state_of(model)
    many = {"input_ids": tokens(300, 2)}
    with pytest.raises(lorafx.CapacityError, match=r"300 rows.*at most"):
        run(model, many, ["a"] * 300)
    assert run(model, many, "a").shape[0] == 300  # one for all is another matter
    assert_unchanged(model, before)


# ------------------------------------------------------------------------------------------------ models and arguments


def test_a_model_wrapped_by_torch_compile(folders):
    model = LLAMA.build()
    wrapped = torch.compile(model)
    before = snapshot(model)
    with pytest.raises(lorafx.UnsupportedModelError, match=r"(?s)torch.compile has wrapped.*_orig_mod"):
        lorafx.compile(wrapped, folders)
    assert snapshot(model) == before
    model.compile()
    with pytest.raises(lorafx.UnsupportedModelError, match="compiled in place"):
        lorafx.compile(model, folders)


@pytest.mark.parametrize("which", ["plain", "peft"])
def test_a_model_compiled_by_lorafx_already(which, live, folders):
    model = live[which]
    before = state_of(model)
    for each in {model, getattr(model, "get_base_model", lambda: model)()}:
        with pytest.raises(lorafx.UnsupportedModelError, match=r"(?s)already.*lora.load.*uncompile"):
            lorafx.compile(each, folders)
    assert_unchanged(model, before)


ARGUMENTS = {
    "no module": (lambda f: (3, f), {}, lorafx.UnsupportedModelError, "got int; expected a torch.nn.Module"),
    "lowering": (None, {"options": {"lowering": "cuda"}}, lorafx.LorafxError, "got lowering 'cuda'; expected one of"),
    "option": (None, {"options": {"speed": 11}}, lorafx.LorafxError, "unknown option 'speed'"),
    "mode": (None, {"mode": "fastest"}, lorafx.LorafxError, "got mode 'fastest'; expected"),
    "max_adapters": (None, {"max_adapters": 2}, lorafx.CapacityError, "3 adapters for max_adapters=2"),
    "max_rank": (None, {"max_rank": 8}, lorafx.CapacityError, "rank 16, max_rank is 8"),
    "no number": (None, {"max_rank": "8"}, lorafx.LorafxError, "got max_rank='8'; expected a whole number"),
    "target_modules": (None, {"target_modules": ["qq"]}, MISMATCH, "names 'qq', which LlamaForCausalLM has no layer"),
    "no layer": (None, {"target_modules": ["norm"]}, lorafx.UnsupportedModelError, "no layer that lorafx adapts"),
}


@pytest.mark.parametrize("case", ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_bad_arguments(case, folders):
    make, arguments, error, text = case
    model = LLAMA.build()
    before = snapshot(model)
    given = make(folders) if make else (model, folders)
    with pytest.raises(error, match=text):
        lorafx.compile(*given, **arguments)
    assert snapshot(model) == before


def test_no_room_left(folders, tmp_path):
    model = compiled_llama({"a": folders["a"]}, mode="eager", max_adapters=2, max_rank=8)
    model.lora.load("b", folders["b"])
    before = run(model, INPUTS, ["a", "b", None, "a"])
    with pytest.raises(lorafx.CapacityError, match=r"max_adapters is\s+2. Unload one"):
        model.lora.load("c", folders["a"])
    with pytest.raises(lorafx.CapacityError, match="rank 16, max_rank is 8"):
        model.lora.replace("b", folders["c"])
    assert torch.equal(run(model, INPUTS, ["a", "b", None, "a"]), before)


def test_no_room_left_on_a_peft_model(folders):
    """PEFT has loaded it before lorafx hears of it; then it is taken off again."""
    model = lorafx.compile(
        with_peft(LLAMA.build(), {"a": folders["a"]}), mode="eager", max_adapters=2, max_rank=8, target_modules=QKV
    )
    model.lora.load("b", folders["b"])
    want = run(model, INPUTS, ["a", "b", "__base__", "a"])
    with pytest.raises(lorafx.CapacityError, match="max_adapters is 2"):
        model.lora.load("c", folders["a"])
    with pytest.raises(lorafx.CapacityError, match="rank 16, max_rank is 8"):
        model.lora.replace("b", folders["c"])
    assert set(model.peft_config) == {"a", "b"}
    assert torch.equal(run(model, INPUTS, ["a", "b", "__base__", "a"]), want)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_all_linear_reserves_what_peft_would_adapt(name, tmp_path):
    """On a plain model and on one that PEFT has adapted in part; GPT-2's layers are no nn.Linear."""
    family = FAMILIES[name]
    folder = save_adapter(family, tmp_path, target_modules=list(family.qkv))
    every = adapted_layers(get_peft_model(family.build(), config(target_modules="all-linear")))
    room = {"mode": "eager", "max_adapters": 2, "target_modules": "all-linear"}
    for model in (
        lorafx.compile(family.build(), {"a": folder}, **room),
        lorafx.compile(with_peft(family.build(), {"a": folder}), **room),
    ):
        assert {site.name for site in model.lora.store.sites} == every


def test_nothing_to_explain():
    with pytest.raises(lorafx.LorafxError, match="nothing to explain"):
        lorafx.explain(LLAMA.build())


# ------------------------------------------------------------------------------------------------ what stays with PEFT


def mixed_kinds(**fields):
    """A PeftModel with one more adapted layer, of a kind that is not fused; and a twin that stays as it is."""
    torch.manual_seed(3)
    model = get_peft_model(LLAMA.build(), config(target_modules=QKV))
    model.add_adapter("other", config(r=3, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "other" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1 + (1 if "magnitude" in name else 0))
    return model.eval(), copy.deepcopy(model).eval()


KINDS = {
    "target_parameters": ({"target_modules": [], **PARAMETER}, "embed_tokens", "ParamWrapper"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_other_kinds_stay_exactly_pefts(kind):
    fields, layer, reason = KINDS[kind]
    model, reference = mixed_kinds(**fields)
    seen = {}
    paths = [path for path, _ in model.get_base_model().named_modules() if path.endswith(layer)]
    types = {path: type(model.get_base_model().get_submodule(path)) for path in paths}
    lorafx.compile(model, options=EAGER_GRAPH)
    for each in (model, reference):
        each.set_adapter("other")
    assert_close(run(model, INPUTS), run(reference, INPUTS))
    for each in (model, reference):
        each.set_adapter("default")
    assert_close(run(model, INPUTS), run(reference, INPUTS))
    report = lorafx.explain(model)
    assert {item.name for item in report.skipped} == set(paths)
    assert all(reason in item.reason for item in report.skipped)
    assert {type(model.get_base_model().get_submodule(path)) for path in paths} == set(types.values())
    fused = sorted({b.name for group in report.groups for b in group.branches})
    assert fused == sorted(site.name for site in model.lora.store.sites)
    assert len(fused) == 6
    # bit for bit what PEFT computes there, from the same input
    for each in (model, reference):
        each.set_adapter("other")
        module = each.get_base_model().get_submodule(paths[0])
        x = tokens(2) if layer == "embed_tokens" else torch.linspace(-1, 1, 2 * 32).view(2, 32)
        seen[each] = module(x)
    assert torch.equal(seen[model], seen[reference])
    with pytest.raises(lorafx.UnsupportedModelError, match="set_adapter"):
        model.lora.use("default")


class TimeMajor(nn.Module):
    """A recurrent-style model: the input turned to ``[time, batch, ...]`` before its layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 8)
        self.outer = nn.Linear(8, 8)

    def forward(self, inputs):
        return self.outer(self.inner(inputs.transpose(0, 1)).tanh().transpose(0, 1))


@pytest.mark.parametrize("mode", ["eager", None])
def test_time_major_input_refuses_mixed_batches(mode):
    torch.manual_seed(1)
    reference = get_peft_model(TimeMajor(), LoraConfig(target_modules=["inner", "outer"], init_lora_weights=False))
    reference.add_adapter("second", LoraConfig(target_modules=["outer"], init_lora_weights=False))
    model = lorafx.compile(copy.deepcopy(reference), mode=mode, options=EAGER_GRAPH)
    inputs = torch.randn(3, 5, 8)
    with torch.no_grad():
        for name in ("second", "default"):
            for each in (model, reference):
                each.set_adapter(name)
            assert_close(model(inputs), reference(inputs))
        with pytest.raises(lorafx.UnsupportedModelError, match=r"(?s)inner.*different rows.*one adapter for the whole"):
            model(inputs, adapter_names=["default", "second", "default"])
        assert_close(model(inputs), reference(inputs))
    assert any(p.requires_grad for p in model.parameters())
    with pytest.raises(lorafx.UnsupportedModelError, match="inner can't take different adapters"):
        model(inputs, adapter_names=["default", "second", "default"])  # where gradients are needed, too


class TimeMajorTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(96, 8), nn.Linear(8, 8)

    def forward(self, input_ids):
        return self.inner(self.embed(input_ids).transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("how", [{"mode": "eager"}, {"options": EAGER_GRAPH}], ids=["eager", "graph"])
def test_time_major_input_refuses_alora(how):
    """Alone too: it begins at another place in each row."""
    fields = {"target_modules": ["inner"], "init_lora_weights": False}
    state = get_peft_model_state_dict(get_peft_model(TimeMajorTokens(), LoraConfig(**fields)))
    late, plain = LoraConfig(**fields, alora_invocation_tokens=[5, 6]), LoraConfig(**fields)
    model = lorafx.compile(TimeMajorTokens().eval(), {"late": (state, late), "plain": (state, plain)}, **how)
    ids = torch.arange(15).view(3, 5)
    with torch.no_grad():
        model.lora.use("plain")
        model(ids)
        model.lora.use("late")
        with pytest.raises(lorafx.UnsupportedModelError, match="inner can't take an aLoRA adapter") as said:
            model(ids)
        assert "one adapter for the whole batch" not in str(said.value)
        with pytest.raises(lorafx.UnsupportedModelError, match="inner can't take different adapters"):
            model(ids, adapter_names=["plain", None, "plain"])


# ------------------------------------------------------------------------------------------------ gradients


def trainable(dropout=0.0, **fields):
    torch.manual_seed(2)
    model = get_peft_model(LLAMA.build(), config(target_modules=["q_proj", "v_proj", "up_proj"], **fields))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model, copy.deepcopy(model)


def backward(model, **inputs):
    loss = model(**(inputs or INPUTS)).logits.float().square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model, reference):
    (loss, got), (expected, want) = backward(model), backward(reference)
    assert_close(loss, expected)
    assert got.keys() == want.keys()
    assert any("lora_A" in name for name in want)
    for name in want:
        assert_close(got[name], want[name], 1e-4)


@pytest.mark.parametrize("options", [{"options": EAGER_GRAPH}, {"mode": "eager"}], ids=["graph", "eager"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_of_trainable_adapters(training, options):
    model, reference = trainable(0.0 if training else 0.05)
    lorafx.compile(model, **options)
    for each in (model, reference):
        each.train(training)
    assert_same_gradients(model, reference)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (model, reference)]
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    assert_same_gradients(model, reference)
    for each in (model, reference):
        each.eval()
    assert_close(run(model, INPUTS), run(reference, INPUTS))  # the bank has seen the step


def test_training_with_dropout_is_not_fused():
    """A mask per branch: eager's result under the same seed, to the bit."""
    model, reference = trainable(0.3)
    lorafx.compile(model, options=EAGER_GRAPH)
    results = []
    for each in (model, reference):
        each.train()
        torch.manual_seed(9)
        results.append(backward(each))
    (loss, got), (expected, want) = results
    assert_close(loss, expected, 1e-6)
    for name in want:
        assert_close(got[name], want[name], 1e-5)
    report = lorafx.explain(model)
    assert report.groups == []
    assert len(report.skipped) == 6
    assert all("dropout is active" in item.reason for item in report.skipped)
    model.eval()
    reference.eval()
    assert_close(run(model, INPUTS), run(reference, INPUTS))
    assert len(lorafx.explain(model).groups) == 4


def test_gradients_of_rows_with_their_own_adapters(folders):
    """A mixed batch over trainable adapters: each gets the gradient of its own rows."""
    model, reference = (with_peft(LLAMA.build(), folders) for _ in range(2))
    for each in (model, reference):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_("lora_" in name)
    lorafx.compile(model, options=EAGER_GRAPH)
    names = ["a", "__base__", "b", "c"]
    (loss, got), (expected, want) = (backward(each, **INPUTS, adapter_names=names) for each in (model, reference))
    assert_close(loss, expected)
    for name in want:
        assert_close(got[name], want[name], 1e-4)


@pytest.mark.parametrize("options", [{"options": EAGER_GRAPH}, {"mode": "eager"}], ids=["graph", "eager"])
def test_gradients_of_inputs_and_base_weights(options, folders):
    """A plain model: adapters are constants, everything else keeps its gradient."""
    reference = with_peft(LLAMA.build(), folders)
    model = compiled_llama(folders, **options)
    names = ["a", "__base__", "b", "c"]
    grads = []
    for each in (model, reference):
        root = each.get_base_model() if each is reference else each
        root.requires_grad_(False)
        norm = root.model.layers[0].input_layernorm.weight.requires_grad_(True)
        x = torch.randn(4, TOKENS, 32, generator=torch.Generator().manual_seed(6)).requires_grad_(True)
        each(inputs_embeds=x, adapter_names=names).logits.square().mean().backward()
        grads.append((x.grad, norm.grad))
    for got, want in zip(*grads, strict=True):
        assert_close(got, want, 1e-4)
    assert difference(grads[0][0][0], grads[0][0][1]) > 0


def test_gradient_checkpointing(folders):
    model, reference = trainable()
    lorafx.compile(model, options=EAGER_GRAPH)
    for each in (model, reference):
        each.enable_input_require_grads()
        each.gradient_checkpointing_enable({"use_reentrant": False})
        each.train()
    assert_same_gradients(model, reference)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="there the kernels run on a CPU")
def test_triton_without_a_gpu_is_refused_before_anything_is_touched() -> None:
    model = LLAMA.build()
    with pytest.raises(lorafx.UnsupportedModelError, match=r"needs a GPU.*cpu.*TRITON_INTERPRET"):
        lorafx.compile(model, options={"lowering": "triton"})
    assert not hasattr(model, "lora")
    assert model._compiled_call_impl is None
