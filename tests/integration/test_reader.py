"""AdapterReader: PEFT is asked once for each structure of files, and what comes out is what PEFT makes, to the bit."""

from __future__ import annotations

import copy
import json
import pickle
import struct
import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

import lorafx
from lorafx import plans, reading, skeletons
from lorafx.reading import AdapterReader

from .models import FAMILIES, LLAMA, save_adapter, save_adapters, with_peft

KINDS = {
    "qkv": {"target_modules": list(LLAMA.qkv)},
    "all": {"target_modules": "all-linear", "r": 7},
    "bias": {"target_modules": ["q_proj", "o_proj"], "lora_bias": True},
    "ranks": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r".*\.1\..*up_proj": 9},
        "use_rslora": True,
    },
    "some layers": {"target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
}


@pytest.fixture
def reader():
    return AdapterReader(LLAMA.build(), torch.float32)


@pytest.fixture
def injections(monkeypatch):
    """Grows by one each time that PEFT is asked."""
    calls = []
    inject = skeletons.inject_adapter_in_model

    def counted(*args, **kwargs):
        calls.append(1)
        return inject(*args, **kwargs)

    monkeypatch.setattr(skeletons, "inject_adapter_in_model", counted)
    return calls


def assert_as_peft(weights, folder, family=LLAMA):
    """Every number and scale is the one that PEFT's own load gives its layer."""
    root = with_peft(family.build(), {"a": str(folder)}).get_base_model()
    layers = {path: module for path, module in root.named_modules() if isinstance(module, LoraLayer)}
    assert weights.sites.keys() == layers.keys()
    for path, site in weights.sites.items():
        bias = layers[path].lora_B["a"].bias
        assert torch.equal(site.a, layers[path].lora_A["a"].weight)
        assert torch.equal(site.b, layers[path].lora_B["a"].weight)
        assert site.bias is bias is None or torch.equal(site.bias, bias)
        assert site.scale == layers[path].scaling["a"]


def weights_file(folder):
    return Path(folder) / "adapter_model.safetensors"


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS.keys())
def test_peft_is_asked_once_for_a_structure(fields, reader, injections, tmp_path):
    for seed in range(3):
        folder = save_adapter(LLAMA, tmp_path / str(seed), seed, **fields)
        outline = reader.open(str(seed), folder)
        weights = outline.read()
        assert_as_peft(weights, folder)
        assert outline.sites == weights.shapes
        assert (outline.name, weights.name) == (str(seed), str(seed))
        assert len(injections) == 1
    assert (
        weights.flat.numel() == weights.elements() == sum(t.numel() for t in load_file(weights_file(folder)).values())
    )


@pytest.mark.parametrize("family", ["gpt2", "t5", "mixtral", "whisper", "bert"])
def test_models_of_other_kinds(family, injections, tmp_path):
    family = FAMILIES[family]
    reader = AdapterReader(family.build(), torch.float32)
    for seed in range(2):
        folder = save_adapter(family, tmp_path / str(seed), seed, target_modules=list(family.qkv))
        assert_as_peft(reader.open("a", folder).read(), folder, family)
    assert len(injections) == 1


def test_another_alpha_rank_or_target_is_another_structure(reader, injections, tmp_path):
    for i, fields in enumerate(
        ({}, {"lora_alpha": 9}, {"r": 5}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}})
    ):
        folder = save_adapter(LLAMA, tmp_path / str(i), target_modules=["q_proj", "k_proj"], **fields)
        assert_as_peft(reader.open("a", folder).read(), folder)
        assert len(injections) == i + 1


def shuffle(folder):
    tensors = load_file(weights_file(folder))
    write(folder, {key: tensors[key] for key in sorted(tensors, key=lambda key: key[::-1])})


def write(folder, tensors, spaces=0):
    """By hand: ``save_file`` has its own order and fills the header up to a multiple of 8."""
    header, data = {}, b""
    for key, tensor in tensors.items():
        content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        dtype = {torch.float32: "F32", torch.float16: "F16", torch.float64: "F64"}[tensor.dtype]
        offsets = [len(data), len(data) + len(content)]
        header[key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode() + b" " * spaces
    weights_file(folder).write_bytes(struct.pack("<Q", len(text)) + text + data)


def unaligned(folder):
    tensors = load_file(weights_file(folder))
    for spaces in range(4):
        write(folder, tensors, spaces)
        if weights_file(folder).read_bytes()[0] % 4 == 1:
            return
    raise AssertionError("no such length")


def mixed_dtypes(folder):
    tensors = load_file(weights_file(folder))
    write(folder, {k: v.half() if "q_proj" in k else v.double() if "k_proj" in k else v for k, v in tensors.items()})


def as_bin(folder):
    torch.save(load_file(weights_file(folder)), Path(folder) / "adapter_model.bin")
    weights_file(folder).unlink()


@pytest.mark.parametrize("change", [shuffle, unaligned, mixed_dtypes, as_bin])
def test_files_of_another_form(change, reader, tmp_path):
    """Read after one of the usual form and before another: no plan is taken for a file that it does not fit."""
    folders = [save_adapter(LLAMA, tmp_path / str(seed), seed, **KINDS["qkv"]) for seed in range(3)]
    change(Path(folders[1]))
    for folder in folders:
        assert_as_peft(reader.open("a", folder).read(), folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float64])
def test_dtypes(dtype, wanted, tmp_path):
    folder = save_adapter(LLAMA, tmp_path, **KINDS["bias"])
    tensors = {key: value.to(dtype) for key, value in load_file(weights_file(folder)).items()}
    save_file(tensors, weights_file(folder))
    weights = AdapterReader(LLAMA.build(), wanted).open("a", folder).read()
    assert weights.flat.dtype == wanted
    site = weights.sites["model.layers.1.self_attn.q_proj"]
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    for got, key in ((site.a, "lora_A.weight"), (site.b, "lora_B.weight"), (site.bias, "lora_B.bias")):
        assert torch.equal(got, tensors[f"{prefix}.{key}"].to(wanted))


def test_what_peft_transforms_takes_its_road_each_time(reader, injections, monkeypatch, tmp_path):
    """As where the layers of the model were merged since the file was made: then new tensors stand in PEFT's layers."""
    load = skeletons.set_peft_model_state_dict

    def transforming(model, tensors, **kwargs):
        return load(model, {key: tensor * 2 for key, tensor in tensors.items()}, **kwargs)

    monkeypatch.setattr(skeletons, "set_peft_model_state_dict", transforming)
    for seed in range(2):
        folder = save_adapter(LLAMA, tmp_path / str(seed), seed, **KINDS["bias"])
        weights = reader.open("a", folder).read()
        save_file({key: 2 * value for key, value in load_file(weights_file(folder)).items()}, weights_file(folder))
        assert_as_peft(weights, folder)
    assert len(injections) == 4  # for the shapes, and for the numbers
    assert not reader._plans


def test_a_transposed_tensor_is_no_plan(reader, monkeypatch, tmp_path):
    """A square matrix keeps its shape when it is turned; its identity is not its shape."""
    load = skeletons.set_peft_model_state_dict
    monkeypatch.setattr(
        skeletons,
        "set_peft_model_state_dict",
        lambda model, tensors, **kwargs: load(model, {k: t.t() for k, t in tensors.items()}, **kwargs),
    )
    folder = save_adapter(LLAMA, tmp_path, target_modules=["q_proj"], r=32)
    reader.open("a", folder).read()
    assert not reader._plans


def test_plans_are_few(reader, monkeypatch, tmp_path):
    monkeypatch.setattr(reading, "PLANS_KEPT", 3)
    folders = [save_adapter(LLAMA, tmp_path / str(r), target_modules=["q_proj"], r=r) for r in range(1, 6)]
    for folder in folders:
        reader.open("a", folder)
    assert len(reader._plans) == 3
    assert_as_peft(reader.open("a", folders[0]).read(), folders[0])


def test_nothing_is_read_before_read(reader, monkeypatch, tmp_path):
    folder = save_adapter(LLAMA, tmp_path, **KINDS["qkv"])
    outline = reader.open("a", folder)
    assert outline.sites["model.layers.0.self_attn.q_proj"].in_features == 32
    assert outline.ranks == [4]
    with weights_file(folder).open("r+b") as file:
        file.seek(-128, 2)
        file.write(struct.pack("<f", 7.0) * 32)
    assert outline.read().sites["model.layers.1.self_attn.v_proj"].b[-1, -1] == 7.0


def test_what_is_wrong_is_said_before_anything_is_read(reader, monkeypatch, tmp_path):
    folder = save_adapter(LLAMA, tmp_path, **KINDS["qkv"])
    tensors = load_file(weights_file(folder))
    tensors[next(iter(tensors))] = torch.zeros(4, 31)
    save_file(tensors, weights_file(folder))
    monkeypatch.setattr(reading, "load_onto", checked_on_meta(reading.load_onto))
    with pytest.raises(
        lorafx.AdapterMismatchError, match=r"size mismatch for .*: the adapter has \[4, 31\], this model \[4, 32\]\."
    ):
        reader.open("a", folder)


def checked_on_meta(load):
    def loaded(name, bare, config, tensors):
        assert all(tensor.is_meta for tensor in tensors.values())
        return load(name, bare, config, tensors)

    return loaded


# ------------------------------------------------------------------------------------------------ weights read before


def test_weights_pass_through_without_a_copy(reader, injections, tmp_path):
    folder = save_adapter(LLAMA, tmp_path, **KINDS["bias"])
    first = reader.open("a", folder)
    weights = first.read()
    for source in (weights, weights.outline):
        again = reader.open("b", source)
        assert (again.name, again.sites) == ("b", first.sites)
        got = again.read()
        assert got.name == "b"
        assert got.flat is weights.flat
    assert reader.open("c", first).read().name == "c"  # an outline that is still to be read
    wide = AdapterReader(LLAMA.build(), torch.float64).open("b", weights).read()
    assert wide.flat.dtype == torch.float64
    assert torch.equal(wide.flat, weights.flat.double())
    assert len(injections) == 1


def test_weights_of_another_model_are_refused(reader, tmp_path):
    weights = reader.open("a", save_adapter(LLAMA, tmp_path, target_modules="all-linear")).read()
    other = AdapterReader(LLAMA.build(layers=1), torch.float32)
    with pytest.raises(lorafx.AdapterMismatchError, match=r"'b' does not fit.*model.layers.1"):
        other.open("b", weights)
    wide = LLAMA.build()
    wide.model.layers[0].mlp.up_proj = nn.Linear(32, 50)
    with pytest.raises(lorafx.AdapterMismatchError, match=r"up_proj' from 32 to 48 features"):
        AdapterReader(wide, torch.float32).open("b", weights)


def test_weights_that_are_not_finite_are_refused(reader, tmp_path):
    weights = copy.deepcopy(reader.open("a", save_adapter(LLAMA, tmp_path, **KINDS["qkv"])).read())
    weights.flat[3] = float("inf")
    with pytest.raises(lorafx.AdapterFormatError, match=r"A of .* holds NaN or Inf"):
        reader.open("b", weights).read()


def test_large_finite_weights_are_no_infinity(reader, tmp_path):
    """Their sum overflows, they don't."""
    folder = save_adapter(LLAMA, tmp_path, **KINDS["qkv"])
    tensors = {key: torch.full_like(value, 3e38) for key, value in load_file(weights_file(folder)).items()}
    save_file(tensors, weights_file(folder))
    assert reader.open("a", folder).read().flat[0] == 3e38


# ------------------------------------------------------------------------------------------------ the reader itself


def test_on_a_model_with_pefts_layers(tmp_path):
    """Adapters that stand there, one of the same name too, make no difference."""
    folders = {name: save_adapter(LLAMA, tmp_path / name, **KINDS[name]) for name in ("qkv", "all", "bias")}
    root = with_peft(LLAMA.build(), folders).get_base_model()
    reader = AdapterReader(root, torch.float32)
    before = list(root.state_dict())
    for name, folder in folders.items():
        config, outline = reader.open_with_config(name, folder)
        assert_as_peft(outline.read(), folder)
        assert config.r == KINDS[name].get("r", 4)
    assert list(root.state_dict()) == before


@pytest.mark.parametrize("how", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_plan_anew(how, reader, injections, tmp_path):
    folder = save_adapter(LLAMA, tmp_path, **KINDS["qkv"])
    reader.open("a", folder)
    copied = how(reader)
    assert copied.root is not reader.root
    assert not copied._plans
    assert_as_peft(copied.open("a", folder).read(), folder)
    assert len(injections) == 2


def test_threads_share_a_plan(reader, injections, tmp_path):
    folders = [save_adapter(LLAMA, tmp_path / str(seed), seed, **KINDS["all"]) for seed in range(6)]
    read = {}
    threads = [
        threading.Thread(target=lambda folder=folder: read.update({folder: reader.open("a", folder).read()}))
        for folder in folders
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for folder in folders:
        assert_as_peft(read[folder], folder)
    assert len(injections) == 1


def test_identity_is_more_than_memory():
    tensor = torch.empty(4, 4, device="meta")
    same = nn.Parameter(tensor)
    written = torch.empty(4, 4, device="meta")
    before = plans._identity(written)
    assert plans._identity(same) == plans._identity(tensor)
    for other in (
        tensor.t(),
        tensor[:2],
        tensor[1:],
        tensor.view(16),
        tensor.clone(),
        tensor.double(),
        written.mul_(2),
    ):
        assert plans._identity(other) not in (plans._identity(tensor), before)


def test_weights_packed_by_hand_are_looked_at_too(tmp_path):
    """replace by weights of the same layout is only a copy of their numbers; NaN must not come in that way."""
    folder = save_adapter(LLAMA, tmp_path / "a", **KINDS["qkv"])
    model = lorafx.compile(LLAMA.build(), {"a": folder}, mode="eager")
    good = model.lora.read(folder)
    bad = good.packed(torch.float64).packed(torch.float32)
    assert model.lora.store.holds(0, bad.layout)
    bad.flat[-1] = float("nan")
    before = model.lora.store.storage.clone()
    with pytest.raises(lorafx.AdapterFormatError, match="NaN"):
        model.lora.replace("a", bad)
    assert torch.equal(model.lora.store.storage, before)
    model.lora.replace("a", good)


def test_names_with_peft_s_prefix_or_without_but_no_mixture(tmp_path):
    """A PeftModel would leave the layers of names without the prefix at random values."""
    folder = save_adapters(LLAMA, tmp_path, one={"target_modules": ["q_proj", "up_proj"]})["one"]
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    config = LoraConfig.from_pretrained(folder)
    reader = AdapterReader(LLAMA.build(), torch.float32)
    whole = reader.open("whole", (tensors, config)).read()
    bare = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    without = reader.open("without", (bare, config)).read()
    for path, site in whole.sites.items():
        assert torch.equal(site.a, without.sites[path].a)
        assert torch.equal(site.b, without.sites[path].b)
    for key in tensors:
        mixed = {other: tensor for other, tensor in tensors.items() if other != key}
        mixed[key.removeprefix("base_model.model.")] = tensors[key]
        with pytest.raises(lorafx.AdapterFormatError, match=r"1 of its 8 names.*lack the prefix"):
            reader.open("mixed", (mixed, config))
