"""Adapters from folders, from memory and off a PeftModel: every field that PEFT knows, bytes, and the way back."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear as PeftLinear
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lorafx

from .models import (
    EAGER_GRAPH,
    LLAMA,
    assert_close,
    compiled_llama,
    config,
    difference,
    run,
    save_adapter,
    save_adapters,
    three_adapters,
    with_peft,
)

QKV = list(LLAMA.qkv)
INPUTS = LLAMA.inputs(3)
EAGER = {"mode": "eager"}  # reading is what is tested here: nothing need be traced


def assert_reads_as_peft(folders, rows=None):
    """Each adapter alone, and the mixed batch, as PEFT reads them from the same folders."""
    reference = with_peft(LLAMA.build(), folders)
    model = compiled_llama(folders, **EAGER)
    for name in folders:
        reference.set_adapter(name)
        model.lora.use(name)
        assert_close(run(model, INPUTS), run(reference, INPUTS))
    names = rows or ([*folders, "__base__", *folders])[: len(INPUTS["input_ids"])]
    assert_close(run(model, INPUTS, names), run(reference, INPUTS, names))
    return model


FIELDS = {
    "rank_pattern": {"target_modules": QKV, "rank_pattern": {"q_proj": 9, "layers.1.self_attn.v_proj": 3}},
    "alpha_pattern": {"target_modules": QKV, "alpha_pattern": {"k_proj": 40, "layers.0.self_attn.q_proj": 1}},
    "both patterns": {"target_modules": QKV, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 6}},
    "rslora": {"target_modules": QKV, "r": 9, "use_rslora": True},
    "rslora with patterns": {"target_modules": QKV, "use_rslora": True, "rank_pattern": {"v_proj": 16}},
    "lora_bias": {"target_modules": QKV, "lora_bias": True},
    "layers_to_transform": {"target_modules": QKV, "layers_to_transform": [1], "layers_pattern": "layers"},
    "regular expression": {"target_modules": r".*\.1\.(mlp\.up_proj|self_attn\.q_proj)"},
    "exclude_modules": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "lm_head": {"target_modules": ["lm_head", "o_proj"]},
    "rank 1": {"target_modules": "all-linear", "r": 1},
    "alpha 0.5": {"target_modules": QKV, "lora_alpha": 0.5},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_config_fields(fields, tmp_path):
    model = assert_reads_as_peft({"a": save_adapter(LLAMA, tmp_path, **fields)})
    assert lorafx.explain(model).skipped == []


def test_different_subsets_of_layers_and_modules(tmp_path):
    """The union of the adapters' layers is what is fused; each row gets its own adapter's."""
    folders = save_adapters(
        LLAMA,
        tmp_path,
        first={"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        second={"r": 9, "target_modules": ["v_proj", "up_proj"], "lora_bias": True},
        third={"r": 3, "target_modules": ["down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    )
    model = assert_reads_as_peft(folders, ["third", "first", "second"])
    paths = {site.name for site in model.lora.store.sites}
    assert "model.layers.0.self_attn.q_proj" in paths
    assert "model.layers.1.self_attn.q_proj" not in paths
    assert sum("down_proj" in path for path in paths) == 1


def test_bin_file_is_read_with_weights_only(tmp_path, monkeypatch):
    folder = Path(save_adapter(LLAMA, tmp_path, target_modules=QKV))
    want = compiled_llama({"a": folder}, **EAGER)
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()
    seen = []
    load = torch.load

    def watched(*args, **kwargs):
        seen.append(kwargs.get("weights_only"))
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    got = compiled_llama({"a": folder}, **EAGER)
    assert seen == [True]
    assert torch.equal(run(got, INPUTS), run(want, INPUTS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_other_dtypes(dtype, tmp_path):
    folder = Path(save_adapter(LLAMA, tmp_path, target_modules=QKV))
    file = folder / "adapter_model.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    assert_reads_as_peft({"a": str(folder)})


def in_memory(**fields):
    torch.manual_seed(5)
    peft_model = get_peft_model(LLAMA.build(), config(**fields)).eval()
    return peft_model, get_peft_model_state_dict(peft_model)


@pytest.mark.parametrize("form", ["config", "dict", "swapped"])
def test_state_dict_with_its_config(form):
    peft_model, tensors = in_memory(target_modules=QKV, rank_pattern={"q_proj": 9}, use_rslora=True)
    settings = peft_model.peft_config["default"]
    source = {
        "config": (tensors, settings),
        "dict": (tensors, settings.to_dict()),
        "swapped": (settings, tensors),
    }[form]
    model = compiled_llama({"a": source}, **EAGER)
    assert_close(run(model, INPUTS), run(peft_model, INPUTS))


@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_alone_warns_that_alpha_is_assumed(bias):
    peft_model, tensors = in_memory(
        target_modules=QKV, r=6, lora_alpha=6, rank_pattern={"k_proj": 3}, alpha_pattern={"k_proj": 3}, lora_bias=bias
    )
    with pytest.warns(UserWarning, match="alpha = rank"):
        model = lorafx.compile(LLAMA.build(), tensors, mode="eager")
    assert model.lora.names == ["default"]
    assert_close(run(model, INPUTS), run(peft_model, INPUTS))


def test_a_path_and_a_list_are_named_after_their_folders(tmp_path):
    folders = save_adapters(LLAMA, tmp_path, a={"target_modules": QKV}, b={"target_modules": QKV})
    one = lorafx.compile(LLAMA.build(), folders["a"], mode="eager")
    assert one.lora.names == ["a"]
    assert "yes" in repr(one.lora)  # a single adapter is in use at once
    several = lorafx.compile(LLAMA.build(), [Path(folders["a"]), Path(folders["b"])], mode="eager")
    assert several.lora.names == ["a", "b"]
    assert torch.equal(run(several, INPUTS), run(LLAMA.build(), INPUTS))  # of several, none is


def test_source_stays_as_it_was(tmp_path):
    """Nothing of a given state dict or config is changed, nor shared."""
    peft_model, tensors = in_memory(target_modules=QKV)
    settings = peft_model.peft_config["default"]
    before, described = copy.deepcopy(tensors), settings.to_dict()
    model = compiled_llama({"a": (tensors, settings)}, **EAGER)
    want = run(model, INPUTS)
    assert settings.to_dict() == described
    assert all(torch.equal(tensors[key], before[key]) for key in before)
    for tensor in tensors.values():
        tensor.zero_()
    assert torch.equal(run(model, INPUTS), want)


def test_files_with_lorafx_or_older_names(tmp_path):
    """Config fields of another PEFT version are no reason to refuse."""
    folder = Path(save_adapter(LLAMA, tmp_path, target_modules=QKV))
    want = run(compiled_llama({"a": folder}, **EAGER), INPUTS)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["field_of_another_version"] = 3
    del settings["use_dora"], settings["lora_bias"]
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(run(compiled_llama({"a": folder}, **EAGER), INPUTS), want)


# ------------------------------------------------------------------------------------------------ bytes


def wide_model():
    """Widths of a real small model; two layers."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_attention_heads=9,
            num_key_value_heads=3,
            num_hidden_layers=2,
            vocab_size=64,
        )
    ).eval()


def test_an_adapter_costs_its_true_bytes():
    """No zero is stored, whatever the mix of ranks and targets: at most 1 % more than the elements."""
    sources, elements = {}, 0
    for name, fields in {
        "a": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "b": {"r": 8, "target_modules": QKV, "lora_bias": True},
        "c": {"r": 16, "target_modules": "all-linear"},
        "d": {"r": 32, "target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 5}},
        "e": {"r": 1, "target_modules": ["down_proj"]},
    }.items():
        peft_model = get_peft_model(wide_model(), config(**fields))
        tensors = get_peft_model_state_dict(peft_model)
        sources[name] = tensors, peft_model.peft_config["default"]
        elements += sum(tensor.numel() for tensor in tensors.values())
    model = lorafx.compile(wide_model(), sources, mode="eager")
    assert elements * 4 <= model.lora.nbytes <= elements * 4 * 1.01
    assert model.lora.reserved == 0
    storage = model.lora.store.storage
    assert int((storage == 0).sum()) <= 16 * 4 * len(model.lora.store.sites)  # what alignment leaves
    rows = [
        (view != 0).any(-1)
        for slot, windows in enumerate(model.lora.store.taken)
        for path in windows
        for view in model.lora.store.views(slot, path)[:2]
    ]
    assert all(row.all() for row in rows)


def test_reserved_room_is_counted_and_shown():
    peft_model = get_peft_model(wide_model(), config(r=8, target_modules=QKV))
    tensors = get_peft_model_state_dict(peft_model)
    source = tensors, peft_model.peft_config["default"]
    plain = lorafx.compile(wide_model(), {"a": source}, mode="eager")
    roomy = lorafx.compile(wide_model(), {"a": source}, mode="eager", max_adapters=3, max_rank=16)
    true = sum(t.numel() for t in tensors.values()) * 4
    assert roomy.lora.nbytes - roomy.lora.reserved <= true * 1.01
    assert 5 * true <= roomy.lora.reserved <= 5 * true * 1.01  # for three adapters of twice the rank, less this one
    assert roomy.lora.nbytes > plain.lora.nbytes
    roomy.lora.load("b", source)
    assert 4 * true <= roomy.lora.reserved <= 4 * true * 1.01


def test_reserved_room_takes_the_largest_in_every_place():
    """Those that are there when compiling may be replaced by larger ones, with biases too where one has them."""
    sources = {}
    for name, rank in (("small", 2), ("large", 16)):
        peft_model = get_peft_model(wide_model(), config(r=rank, target_modules=["q_proj", "v_proj"], lora_bias=True))
        sources[name] = get_peft_model_state_dict(peft_model), peft_model.peft_config["default"]
    small = {"a": sources["small"], "b": sources["small"]}
    model = lorafx.compile(wide_model(), small, mode="eager", max_adapters=3, max_rank=16)
    store = model.lora.store
    for name in small:
        model.lora.replace(name, sources["large"])
    model.lora.load("c", sources["large"])
    assert model.lora.store is store
    assert model.lora.reserved == 0


# ------------------------------------------------------------------------------------------------ on a PeftModel


@pytest.fixture
def on_peft(tmp_path):
    """(compiled PeftModel, an equal one that is left alone, folders)"""
    folders = three_adapters(LLAMA, tmp_path / "source")
    return with_peft(LLAMA.build(), folders), with_peft(LLAMA.build(), folders), folders


def test_parameters_become_views_of_the_bank(on_peft):
    model, reference, _ = on_peft
    names = [name for name, _ in model.named_parameters()]
    ids = {name: id(parameter) for name, parameter in model.named_parameters()}
    lorafx.compile(model, mode="eager")
    memory = model.lora.store.storage.untyped_storage().data_ptr()
    lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert lora
    assert all(parameter.untyped_storage().data_ptr() == memory for parameter in lora.values())
    assert [name for name, _ in model.named_parameters()] == names
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == ids
    for name, parameter in reference.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    with torch.no_grad():  # an edit in place is seen
        for each in (model, reference):
            each.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_B.a.weight").mul_(2)
    assert_close(run(model, INPUTS), run(reference, INPUTS))


def test_state_dict_and_save_pretrained_round_trip(on_peft, tmp_path):
    model, reference, _ = on_peft
    lorafx.compile(model, mode="eager")
    mine, theirs = model.state_dict(), reference.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[key], theirs[key]) and mine[key].is_contiguous() for key in theirs)
    model.save_pretrained(str(tmp_path / "again"))
    for name in "abc":
        saved = load_file(tmp_path / "again" / name / "adapter_model.safetensors")
        original = load_file(tmp_path / "source" / name / "adapter_model.safetensors")
        assert saved.keys() == original.keys()
        assert all(torch.equal(saved[key], original[key]) for key in saved)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    model.load_state_dict(theirs)
    for name in "abc":
        for each in (model, reference):
            each.set_adapter(name)
        assert_close(run(model, INPUTS), run(reference, INPUTS))


def test_load_state_dict_with_assign_is_noticed(on_peft):
    model, reference, _ = on_peft
    lorafx.compile(model, mode="eager")
    run(model, INPUTS)
    changed = {key: value * (3 if "lora_B" in key else 1) for key, value in reference.state_dict().items()}
    for each in (model, reference):
        each.load_state_dict(changed, assign=True)
    names = ["c", "a", "b"]
    assert_close(run(model, INPUTS, names), run(reference, INPUTS, names))


def snapshot(model):
    """Everything that ``uncompile`` has to give back."""
    modules = {
        path: (type(module), sorted(vars(module)), len(module._forward_hooks), len(module._state_dict_hooks))
        for path, module in model.named_modules()
    }
    tensors = {name: (t.stride(), t.is_contiguous(), t.dtype, t.requires_grad) for name, t in named_tensors(model)}
    return modules, tensors, list(model.state_dict())


def named_tensors(model):
    return [*model.named_parameters(), *model.named_buffers()]


@pytest.mark.parametrize("kind", ["peft", "plain"])
def test_uncompile_gives_the_model_back(kind, on_peft):
    model, _, folders = on_peft
    if kind == "plain":
        model = LLAMA.build()
    adapters = folders if kind == "plain" else None
    before, want = snapshot(model), run(model, INPUTS)
    lorafx.compile(model, adapters, options=EAGER_GRAPH)
    assert snapshot(model) != before
    model.lora.use("c")
    assert difference(run(model, INPUTS), want) > 1e-2
    assert lorafx.uncompile(model) is model
    assert snapshot(model) == before
    assert torch.equal(run(model, INPUTS), want)
    assert not any(isinstance(module, PeftLinear) and type(module) is not PeftLinear for module in model.modules())
    storages = {t.untyped_storage().data_ptr() for name, t in model.named_parameters() if "lora_" in name}
    assert len(storages) == sum("lora_" in name for name, _ in model.named_parameters())
    with pytest.raises(lorafx.LorafxError, match="not compiled"):
        lorafx.uncompile(model)
    lorafx.compile(model, adapters, mode="eager")  # and it can be compiled again
    assert model.lora.names == ["a", "b", "c"]


def test_adapters_given_beside_those_on_a_peft_model(on_peft, tmp_path):
    model, reference, _ = on_peft
    extra = save_adapter(LLAMA, tmp_path / "extra", seed=9, r=5, target_modules=["up_proj"])
    lorafx.compile(model, {"extra": extra}, mode="eager")
    reference.load_adapter(extra, adapter_name="extra")
    assert isinstance(model, PeftModel)
    assert model.lora.names == ["a", "b", "c", "extra"]
    names = ["extra", "a", "c"]
    assert_close(run(model, INPUTS, names), run(reference, INPUTS, names))
