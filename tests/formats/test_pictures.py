"""kohya's and diffusers' files, on a small UNet and text encoders; diffusers itself is the judge where it is there."""

from __future__ import annotations

import json
import random
import re
import warnings

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import lorafx
from lorafx.formats import detect, to_peft

from .files import assert_same, deltas, linear_paths, matrices

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(16, 24)
        self.to_out = nn.ModuleList([nn.Linear(24, 16), nn.Dropout()])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn_1, self.proj_in = Attention(), nn.Conv2d(16, 16, 1)


class UNet(nn.Module):
    """Names as diffusers' UNets have them, underscores and lists included."""

    def __init__(self):
        super().__init__()
        self.down_blocks, self.mid_block = nn.ModuleList([Block(), Block()]), Block()


def text_encoder(width=32):
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.CLIPTextModel(config).eval()


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet().eval()


def wanted(weights, alphas=None):
    return {p: ((alphas or {}).get(p, len(a)) / len(a)) * b.double() @ a.double() for p, (a, b) in weights.items()}


def save(path, tensors, metadata=None):
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, str(path), metadata=metadata)
    return path


def kohya(weights, part="unet", alphas=None, prefix=""):
    found = {}
    for path, (a, b) in weights.items():
        name = f"lora_{part}_{prefix}{path.replace('.', '_')}"
        found[f"{name}.lora_down.weight"], found[f"{name}.lora_up.weight"] = a, b
        if alphas is not None:
            found[f"{name}.alpha"] = torch.tensor(alphas[path])
    return found


@pytest.fixture
def weights(unet):
    return matrices(unet, linear_paths(unet, *ATTENTION))


@pytest.fixture
def text_weights():
    model = text_encoder()
    return matrices(model, linear_paths(model, *PROJECTIONS), seed=1)


# ------------------------------------------------------------------------------------------------ kohya


@pytest.mark.parametrize("alphas", ["none", "floats", "whole"])
def test_kohya(unet, weights, tmp_path, alphas):
    by_path = {path: 2.5 + 3 * place for place, path in enumerate(weights)}
    by_path = {"none": None, "floats": by_path, "whole": {path: round(alpha) for path, alpha in by_path.items()}}[
        alphas
    ]
    path = save(tmp_path / "any.name", kohya(weights, alphas=by_path))
    assert detect(path) == "kohya"
    assert_same(deltas(unet, path), wanted(weights, by_path))
    assert_same(deltas(unet, to_peft(path, tmp_path / "out", unet)), wanted(weights, by_path))


def test_kohya_takes_the_part_that_is_for_the_model(unet, weights, text_weights, tmp_path):
    other = text_encoder(48)
    other_weights = matrices(other, linear_paths(other, *PROJECTIONS), seed=2)
    conv = {"lora_unet_mid_block_proj_in.lora_down.weight": torch.ones(2, 16, 1, 1)}
    conv["lora_unet_mid_block_proj_in.lora_up.weight"] = torch.ones(16, 2, 1, 1)
    both = {**kohya(text_weights, "te1", prefix="text_model_"), **kohya(other_weights, "te2", prefix="text_model_")}
    path = save(tmp_path / "a.safetensors", {**kohya(weights), **both})
    assert_same(deltas(unet, path), wanted(weights))
    assert_same(deltas(text_encoder(), path), wanted(text_weights))  # by its sizes
    assert_same(deltas(other, path), wanted(other_weights))
    path = save(tmp_path / "b.safetensors", {**kohya(weights), **conv, **both})
    assert_same(deltas(text_encoder(), path), wanted(text_weights))  # what is not for it may be of any kind
    with_conv = {**wanted(weights), "mid_block.proj_in": torch.full((16, 16), 2.0, dtype=torch.float64)}
    assert_same(deltas(unet, path), with_conv)
    assert_same(deltas(unet, to_peft(path, tmp_path / "out", unet)), with_conv)
    conv["lora_unet_mid_block_proj_in.lora_up.weight"] = torch.ones(16, 2, 3, 3)
    with pytest.raises(lorafx.AdapterFormatError, match=r"of a convolution \[rank, in, height, width\]"):
        deltas(unet, save(tmp_path / "e.safetensors", {**kohya(weights), **conv}))
    twins = {**kohya(text_weights, "te1", prefix="text_model_"), **kohya(text_weights, "te2", prefix="text_model_")}
    with pytest.raises(lorafx.AdapterMismatchError, match="'te1', 'te2' are all layers"):
        deltas(text_encoder(), save(tmp_path / "c.safetensors", twins))
    with pytest.raises(lorafx.AdapterMismatchError, match="no sizes fit"):
        deltas(text_encoder(64), save(tmp_path / "d.safetensors", both))


def test_kohya_of_other_names_is_refused_by_some_of_them(unet, weights, tmp_path):
    def refused(error, text, tensors):
        with pytest.raises(error, match=text):
            deltas(unet, save(tmp_path / "a.safetensors", tensors))

    good = kohya(weights)
    other = {key.replace("down_blocks", "input_blocks"): tensor for key, tensor in good.items()}
    refused(lorafx.AdapterMismatchError, r"8 of the 12 layers of its part 'unet' are none.*input_blocks_0", other)
    nothing = {key.replace("attn", "other"): tensor for key, tensor in good.items()}
    refused(lorafx.AdapterMismatchError, r"none of its layers \('unet': 12\)", nothing)
    name = next(iter(good)).removesuffix(".lora_down.weight")
    refused(lorafx.AdapterFormatError, "dora_scale", {**good, f"{name}.dora_scale": torch.ones(24, 1)})
    refused(lorafx.AdapterFormatError, "hada_w1_a", {**good, f"{name}.hada_w1_a": torch.ones(24, 1)})
    refused(lorafx.AdapterFormatError, "finite", {**good, f"{name}.alpha": torch.tensor(float("nan"))})
    refused(lorafx.AdapterFormatError, "matrix", {**good, f"{name}.alpha": torch.ones(3, 1, 1)})
    refused(lorafx.AdapterFormatError, r"\[rank, in\]", {**good, f"{name}.lora_up.weight": torch.ones(24, 9)})
    refused(lorafx.AdapterFormatError, "both", {k: t for k, t in good.items() if k != f"{name}.lora_up.weight"})
    wide = {**good, f"{name}.lora_down.weight": torch.ones(4, 17)}
    refused(lorafx.AdapterMismatchError, "size mismatch", wide)


def test_kohya_names_that_may_be_two_modules():
    model = nn.ModuleDict({"a_b": nn.ModuleDict({"c": nn.Linear(4, 4)}), "a": nn.ModuleDict({"b_c": nn.Linear(4, 4)})})
    from lorafx.formats.base import base_of
    from lorafx.formats.kohya import convert

    shapes = {"lora_unet_a_b_c.lora_down.weight": (1, 4), "lora_unet_a_b_c.lora_up.weight": (4, 1)}
    with pytest.raises(lorafx.AdapterMismatchError, match=r"'a_b.c', 'a.b_c'"):
        convert("x", shapes, base_of(model))


# ------------------------------------------------------------------------------------------------ diffusers

OLD = {"to_q": "to_q_lora", "to_k": "to_k_lora", "to_v": "to_v_lora", "to_out.0": "to_out_lora"}
OLD_TEXT = {"q_proj": "to_q_lora", "k_proj": "to_k_lora", "v_proj": "to_v_lora", "out_proj": "to_out_lora"}


def processor(path):
    before, last = re.fullmatch(r"(.*)\.(to_[qkv]|to_out\.0)", path).groups()
    return f"{before}.processor.{OLD[last]}"


def old_text(path):
    before, _, last = path.rpartition(".")
    return f"{before}.{OLD_TEXT[last]}"


def named(weights, prefix, down, up, rename=lambda path: path):
    found = {}
    for path, (a, b) in weights.items():
        found[f"{prefix}{rename(path)}{down}"], found[f"{prefix}{rename(path)}{up}"] = a, b
    return found


SPELLINGS = {
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "old": (".lora.down.weight", ".lora.up.weight"),
    "processor": (".down.weight", ".up.weight", processor),
}
TEXT_SPELLINGS = {
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "old": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "processor": (".down.weight", ".up.weight", old_text),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("prefix", ["unet.", "transformer.", ""])
def test_diffusers(unet, weights, text_weights, tmp_path, prefix, spelling):
    tensors = named(weights, prefix, *SPELLINGS[spelling])
    text = named(text_weights, "text_encoder.text_model.", *TEXT_SPELLINGS[spelling])
    path = save(tmp_path / "pytorch_lora_weights.safetensors", tensors)
    assert detect(tmp_path) == detect(path) == "diffusers"
    assert_same(deltas(unet, tmp_path), wanted(weights))
    assert_same(deltas(unet, to_peft(path, tmp_path / "without a model")), wanted(weights))
    save(path, {**tensors, **text})
    assert_same(deltas(unet, path), wanted(weights))
    assert_same(deltas(text_encoder(), path), wanted(text_weights))
    with pytest.raises(lorafx.AdapterMismatchError, match="several models"):
        to_peft(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_diffusers_alphas_and_config(unet, weights, tmp_path):
    tensors = named(weights, "unet.", *SPELLINGS["peft"])
    first = next(iter(weights))
    path = save(tmp_path / "a.safetensors", {**tensors, f"unet.{first}.alpha": torch.tensor(7.0)})
    assert_same(deltas(unet, path), wanted(weights, {first: 7.0}))
    ranks = {path: len(a) for path, (a, _) in weights.items()}
    fields = {
        "unet.r": 4, "unet.lora_alpha": 10, "unet.target_modules": list(ATTENTION), "unet.use_rslora": True,
        "unet.rank_pattern": {re.escape(path): rank for path, rank in ranks.items() if rank != 4},
        "text_encoder.r": 9, "unet.peft_type": "LORA",
    }  # fmt: skip
    save(path, tensors, {"lora_adapter_metadata": json.dumps(fields)})
    assert_same(deltas(unet, path), {p: d * 10 / ranks[p] ** 0.5 for p, d in wanted(weights).items()})
    for bad, text in (
        ("{", "can't be read"),
        ("[1]", "expected an object"),
        (json.dumps({**fields, "unet.r": -1}), "r=-1"),
        (json.dumps({**fields, "unet.use_qalora": True}), "QALoRA"),
        (json.dumps({**fields, "unet.target_modules": "(a+)+$"}), "pattern"),
        (json.dumps(fields)[:-1] + ', "unet.r": 4}', "more than once"),
    ):
        save(path, tensors, {"lora_adapter_metadata": bad})
        with pytest.raises(lorafx.AdapterFormatError, match=re.escape(text)):
            deltas(unet, path)


def test_diffusers_refuses_by_name(unet, weights, tmp_path):
    def refused(error, text, tensors):
        with pytest.raises(error, match=text):
            deltas(unet, save(tmp_path / "a.safetensors", tensors))

    good = named(weights, "unet.", *SPELLINGS["peft"])
    first = next(iter(weights))
    refused(
        lorafx.AdapterFormatError, "lora_magnitude", {**good, f"unet.{first}.lora_magnitude_vector": torch.ones(24)}
    )
    refused(lorafx.AdapterMismatchError, "other_blocks", {k.replace("down_", "other_"): t for k, t in good.items()})
    twice = named({first: weights[first]}, "unet.", *SPELLINGS["old"])
    refused(lorafx.AdapterFormatError, "two names", {**good, **twice})


@pytest.mark.parametrize("kind", ["kohya", "diffusers", "processor"])
def test_names_shapes_and_dtypes_changed(unet, weights, tmp_path, kind):
    """Whatever stands in the file: read, or refused by name."""
    whole = kohya(weights, alphas=dict.fromkeys(weights, 2.0))
    if kind != "kohya":
        whole = named(weights, "unet.", *SPELLINGS["peft" if kind == "diffusers" else kind])
    generator = random.Random(0)
    outcomes = set()
    for _ in range(60):
        tensors = dict(whole)
        for key in generator.sample(list(whole), generator.randint(1, 3)):
            tensor = tensors.pop(key)
            place = generator.randrange(len(key))
            change = generator.randrange(6)
            if change == 0:
                key = key[:place] + generator.choice("._0x\u00e9\ud7ff(*") + key[place + 1 :]
            elif change == 1:
                key = key[:place] + key[place + 1 :]
            elif change == 2:
                key = generator.choice(list(whole))
            elif change == 3:
                tensor = torch.ones([generator.randint(0, 5) for _ in range(generator.randint(0, 4))])
            elif change == 4:
                tensor = tensor.to(generator.choice([torch.int8, torch.bool, torch.complex64, torch.float64]))
            tensors[key] = tensor
        try:
            deltas(unet, save(tmp_path / "a.safetensors", tensors))
            outcomes.add("read")
        except lorafx.LorafxError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


# ------------------------------------------------------------------------------------------------ their own words


@pytest.fixture(scope="module")
def real_unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8, use_linear_projection=True,
    ).eval()  # fmt: skip


def as_diffusers_runs(unet, path, inputs):
    import copy

    from diffusers import StableDiffusionPipeline

    unet = copy.deepcopy(unet)
    state, alphas, *rest = StableDiffusionPipeline.lora_state_dict(
        str(path), unet_config=unet.config, return_lora_metadata=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet, metadata=rest[0] if rest else None)
    with torch.no_grad():
        return unet(**inputs).sample


@pytest.mark.parametrize("kind", ["kohya", "saved by diffusers", "processor"])
def test_a_unet_runs_as_diffusers_runs_it(real_unet, tmp_path, kind):
    import copy

    from diffusers import StableDiffusionPipeline

    weights = matrices(real_unet, linear_paths(real_unet, *ATTENTION))
    path = tmp_path / "pytorch_lora_weights.safetensors"
    if kind == "kohya":
        save(path, kohya(weights, alphas=dict.fromkeys(weights, 20.0)))
    elif kind == "processor":
        weights = {p: (a[:4], b[:, :4].contiguous()) for p, (a, b) in weights.items()}
        save(path, named(weights, "unet.", *SPELLINGS["processor"]))
    else:
        from peft import LoraConfig
        from peft.utils import get_peft_model_state_dict

        trained = copy.deepcopy(real_unet)
        trained.add_adapter(LoraConfig(r=3, lora_alpha=9, target_modules=["to_q", "to_k"], init_lora_weights=False))
        StableDiffusionPipeline.save_lora_weights(
            str(tmp_path),
            unet_lora_layers=get_peft_model_state_dict(trained),
            unet_lora_adapter_metadata={**trained.peft_config["default"].to_dict(), "target_modules": ["to_q", "to_k"]},
        )
    assert detect(path) == ("kohya" if kind == "kohya" else "diffusers")
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "sample": torch.randn(2, 4, 8, 8, generator=generator), "timestep": 3,
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=generator),
    }  # fmt: skip
    want = as_diffusers_runs(real_unet, path, inputs)
    model = lorafx.compile(copy.deepcopy(real_unet), path, mode="eager")
    with torch.no_grad():
        base, got = real_unet(**inputs).sample, model(**inputs).sample
    assert (want - base).norm() > 0.01 * base.norm()
    assert ((got - base) - (want - base)).norm() <= 1e-5 * (want - base).norm()
