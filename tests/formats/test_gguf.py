"""llama.cpp's LoRA files: read, and written from PEFT's, on tiny models."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
import torch
import transformers

import lorafx
from lorafx.formats import detect, to_gguf, to_peft
from lorafx.formats.gguf_layout import halved, interleaved
from tests.integration.models import FAMILIES, LLAMA, run, save_adapter, tokens, with_peft

from .files import assert_same, deltas, matrices, peft_folder, write_gguf

NAMES = {  # from llama.cpp's own list of tensors, not from the map that is tested
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HEADS = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}  # of the tiny Llama; 8 rows each
ALL = [f"model.layers.{layer}.{path}" for layer in range(2) for path in NAMES]


def gguf_name(path):
    _, _, layer, *rest = path.split(".")
    return f"blk.{layer}.{NAMES['.'.join(rest)]}.weight"


def in_llama_cpps_order(path, b):
    """Row 2i + s of a head is row i of its half s: one row at a time."""
    heads = HEADS.get(path.split(".", 3)[3])
    if heads is None:
        return b
    size = len(b) // heads
    rows = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in range(2)]
    return torch.stack([b[row] for row in rows])


def tensors_of(weights, dtype=np.float32):
    found = {}
    for path, (a, b) in weights.items():
        found[f"{gguf_name(path)}.lora_a"] = a.numpy().astype(dtype)
        found[f"{gguf_name(path)}.lora_b"] = in_llama_cpps_order(path, b).numpy().astype(dtype)
    return found


@pytest.fixture(scope="module")
def model():
    return LLAMA.build()


@pytest.fixture
def weights(model):
    return matrices(model, ALL)


def wanted(weights, alpha=8.0):
    return {path: (alpha / len(a) if alpha else 1.0) * b.double() @ a.double() for path, (a, b) in weights.items()}


def test_the_order_of_rows_is_that_of_the_two_rotary_embeddings():
    """Scores do not depend on the order, if each side rotates its own way: transformers halves, llama.cpp pairs."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2 * 8, 5, dtype=torch.float64, generator=generator) for _ in range(2))  # [heads * size, tokens]
    angles = torch.arange(5)[:, None] * 10.0 ** -torch.arange(4, dtype=torch.float64)  # [tokens, size / 2]
    turn = torch.polar(torch.ones_like(angles), angles)

    def halves(x):
        x = x.T.reshape(5, 2, 2, 4)
        return torch.complex(x[:, :, 0], x[:, :, 1]) * turn[:, None]

    def pairs(x):
        return torch.view_as_complex(x.T.reshape(5, 2, 4, 2).contiguous()) * turn[:, None]

    def scores(rotated_q, rotated_k):
        return torch.einsum("thi,shi->hts", rotated_q, rotated_k.conj()).real

    want = scores(halves(q), halves(k))
    torch.testing.assert_close(scores(pairs(interleaved(q, 2)), pairs(interleaved(k, 2))), want)
    assert (scores(pairs(q), pairs(k)) - want).abs().max() > 0.1
    assert torch.equal(halved(interleaved(q, 2), 2), q)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("alpha", [8.0, 0.0, None])
def test_a_file_is_read(model, weights, tmp_path, dtype, alpha):
    path = write_gguf(tmp_path / "a", tensors_of(weights, dtype), alpha=alpha)
    assert detect(path) == "gguf"
    assert_same(deltas(model, path), wanted(weights, alpha), 1e-6 if dtype is np.float32 else 1e-3)


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_0"])
def test_quantised_tensors_are_read(model, weights, tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    tensors = tensors_of(weights)
    kinds = {key: kind for key in tensors if key.endswith(".lora_a") and "ffn_down" not in key}  # rows of 32
    path = write_gguf(tmp_path / "a.gguf", tensors, kinds=kinds)
    rounded = {
        p: (a if p.endswith("down_proj") else torch.tensor(gguf.dequantize(gguf.quantize(a.numpy(), kind), kind)), b)
        for p, (a, b) in weights.items()
    }
    assert_same(deltas(model, path), wanted(rounded))
    assert_same(deltas(model, path), wanted(weights), {"BF16": 1e-2, "Q8_0": 1e-2, "Q4_0": 0.2}[kind.name])


def test_rank_one_without_its_last_dimension(model, tmp_path):
    a, b = torch.randn(1, 32), torch.randn(32, 1)
    tensors = {"blk.0.attn_v.weight.lora_a": a[0].numpy(), "blk.0.attn_v.weight.lora_b": b[:16].numpy()}
    path = write_gguf(tmp_path / "a.gguf", tensors)
    want = {"model.layers.0.self_attn.v_proj": 8 * b[:16].double() @ a.double()}
    assert_same(deltas(model, path), want)


def test_it_runs_as_peft_runs_what_it_was_made_of(tmp_path):
    folder = peft_folder(LLAMA.build(), tmp_path / "peft", target_modules="all-linear")
    path = to_gguf(folder, tmp_path / "a.gguf", LLAMA.build())
    model = lorafx.compile(LLAMA.build(), {"a": str(path)}, mode="eager", max_adapters=3)
    inputs = LLAMA.inputs(2)
    base, want = run(LLAMA.build(), inputs), run(with_peft(LLAMA.build(), {"a": folder}), inputs)
    assert ((run(model, inputs) - base) - (want - base)).norm() <= 1e-5 * (want - base).norm()
    model.lora.load("b", tmp_path / "a.gguf")
    (tmp_path / "holds").mkdir()
    path.rename(tmp_path / "holds" / "some.gguf")
    model.lora.load("c", str(tmp_path / "holds"))
    assert torch.equal(run(model, inputs, ["b", "c"]), run(model, inputs, ["a", "a"]))


CONFIGS = {
    "plain": {"target_modules": "all-linear"},
    "attention": {"target_modules": ["q_proj", "k_proj"], "lora_alpha": 3},
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 9}},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"k_proj": 2, "layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"q_proj": 5, "layers.0.mlp.up_proj": 0.3, "v_proj": -2},
    },
    "scale 0": {"target_modules": "all-linear", "lora_alpha": 0, "alpha_pattern": {"o_proj": 1}},
    "nothing but scale 0": {"target_modules": ["q_proj"], "lora_alpha": 0},
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_there_and_back(tmp_path, family, kind):
    family = FAMILIES[family]
    folder = peft_folder(family.build(), tmp_path / "peft", **CONFIGS[kind])
    model = family.build().to("meta")
    path = to_gguf(folder, tmp_path / "a.gguf", model)
    back = to_peft(path, tmp_path / "back", model)
    want = deltas(model, folder)
    assert_same(deltas(model, path), want)
    assert_same(deltas(model, str(back)), want)
    raw = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    (alpha,) = gguf.GGUFReader(path).fields["adapter.lora.alpha"].parts[-1]
    for layer, delta in want.items():  # what llama.cpp makes of the file
        name = gguf_name(layer)
        a, b = (torch.tensor(np.array(raw[f"{name}.{end}"])).double() for end in ("lora_a", "lora_b"))
        scale = alpha / b.shape[1] if alpha else 1.0
        turned = in_llama_cpps_order(layer, delta) if family is LLAMA else delta
        assert (scale * b @ a - turned).norm() <= 1e-6 * turned.norm()


def test_f16_rounds_once(tmp_path):
    folder = peft_folder(LLAMA.build(), tmp_path / "peft", target_modules="all-linear")
    model = LLAMA.build().to("meta")
    path = to_gguf(folder, tmp_path / "a.gguf", model, dtype="f16")
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors} == {"F16"}
    assert_same(deltas(model, path), deltas(model, folder), 1e-3)
    kept = to_peft(path, tmp_path / "back", model)
    from safetensors.torch import load_file

    assert {tensor.dtype for tensor in load_file(kept / "adapter_model.safetensors").values()} == {torch.float16}


def test_what_llama_cpp_has_not_is_refused_by_name(tmp_path):
    def refused(text, family=LLAMA, **values):
        folder = peft_folder(family.build(), tmp_path / text.replace(" ", ""), **values)
        with pytest.raises(lorafx.LorafxError, match=text):
            to_gguf(folder, tmp_path / "a.gguf", family.build())
        assert not (tmp_path / "a.gguf").exists()

    refused("LoRA bias", target_modules=["q_proj"], lora_bias=True)
    refused("DoRA", target_modules=["q_proj"], use_dora=True)
    refused("modules_to_save", target_modules=["q_proj"], modules_to_save=["lm_head"])
    refused("of type 'gpt2'", FAMILIES["gpt2"], target_modules=["c_attn"])
    tied = transformers.LlamaConfig(**{**LLAMA.build().config.to_dict(), "tie_word_embeddings": True})
    model = transformers.LlamaForCausalLM(tied)
    head = {"base_model.model.lm_head.lora_A.weight": torch.ones(1, 32)}
    head["base_model.model.lm_head.lora_B.weight"] = torch.ones(96, 1)
    with pytest.raises(lorafx.AdapterFormatError, match="tied embeddings"):
        to_gguf((head, {"r": 1, "lora_alpha": 1, "target_modules": ["lm_head"]}), tmp_path / "a.gguf", model)
    to_gguf((head, {"r": 1, "lora_alpha": 1, "target_modules": ["lm_head"]}), tmp_path / "a.gguf", LLAMA.build())
    assert "output.weight.lora_a" in {tensor.name for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    state = {"model.layers.0.self_attn.v_proj.lora_A.weight": torch.ones(1, 32) * 1e5}
    state["model.layers.0.self_attn.v_proj.lora_B.weight"] = torch.ones(16, 1)
    with pytest.raises(lorafx.AdapterFormatError, match="f16"), pytest.warns(UserWarning, match="alpha"):
        to_gguf(state, tmp_path / "b.gguf", LLAMA.build(), dtype="f16")
    assert not (tmp_path / "b.gguf").exists()


def test_a_file_of_another_model_is_refused(model, weights, tmp_path):
    def refused(error, text, **changes):
        tensors = changes.pop("tensors", tensors_of(weights))
        path = write_gguf(tmp_path / "a.gguf", tensors, **changes)
        with pytest.raises(error, match=text):
            deltas(model, path)

    refused(lorafx.AdapterMismatchError, "qwen2", arch="qwen2")
    refused(lorafx.AdapterFormatError, "general.type='model'", general_type="model")
    refused(lorafx.AdapterFormatError, "general.type=None", general_type=None)
    refused(lorafx.AdapterFormatError, "control", adapter_type="control")
    refused(lorafx.AdapterFormatError, "alpha", alpha=math.nan)
    some = tensors_of(weights)
    missing = {key: tensor for key, tensor in some.items() if key != "blk.1.ffn_up.weight.lora_b"}
    refused(lorafx.AdapterFormatError, "both of its matrices", tensors=missing)
    refused(lorafx.AdapterMismatchError, "blk.9", tensors={"blk.9.attn_q.weight.lora_a": np.ones((2, 32), "f4")})
    refused(lorafx.AdapterMismatchError, "token_embd", tensors={"token_embd.weight.lora_a": np.ones((2, 96), "f4")})
    refused(lorafx.AdapterFormatError, "norm", tensors={**some, "blk.0.attn_norm.weight": np.ones(32, "f4")})
    wide = {"blk.0.attn_q.weight.lora_a": np.ones((2, 40), "f4"), "blk.0.attn_q.weight.lora_b": np.ones((32, 2), "f4")}
    refused(lorafx.AdapterMismatchError, "size mismatch", tensors=wide)
    wide = {key: np.ones(shape, "f4") for key, shape in zip(wide, ((2, 32), (30, 2)), strict=True)}
    refused(lorafx.AdapterMismatchError, "size mismatch", tensors=wide)


def test_a_live_model_stays_as_it_was(weights, tmp_path):
    model = lorafx.compile(LLAMA.build(), write_gguf(tmp_path / "a.gguf", tensors_of(weights)), mode="eager")
    inputs = {"input_ids": tokens(2)}
    before = run(model, inputs)
    tensors = tensors_of(weights)
    tensors["blk.1.ffn_up.weight.lora_b"][3, 1] = np.nan
    bad = write_gguf(tmp_path / "b.gguf", tensors)
    with pytest.raises(lorafx.AdapterFormatError, match="NaN"):
        model.lora.replace("a", bad)
    assert torch.equal(run(model, inputs), before)
    with pytest.raises(lorafx.AdapterFormatError, match="NaN"):
        to_peft(bad, tmp_path / "out", LLAMA.build())
    assert not (tmp_path / "out").exists()


def test_in_a_store(weights, tmp_path):
    path = write_gguf(tmp_path / "a.gguf", tensors_of(weights))
    store = lorafx.AdapterStore({"a": path, "b": str(path)})
    model = lorafx.compile(LLAMA.build(), store, max_adapters=1, mode="eager")
    inputs = LLAMA.inputs(2)
    want = run(lorafx.compile(LLAMA.build(), path, mode="eager"), inputs)
    for name in "ab":
        assert torch.equal(run(model, inputs, [name, name]), want)


def test_on_a_peft_model(tmp_path):
    folder = peft_folder(LLAMA.build(), tmp_path / "peft", target_modules=["q_proj", "k_proj"])
    model = with_peft(LLAMA.build(), {"a": folder})
    path = to_gguf(folder, tmp_path / "a.gguf", model)
    lorafx.compile(model, mode="eager")
    model.lora.load("b", path)
    inputs = LLAMA.inputs(2)
    assert torch.equal(run(model, inputs, ["a", "a"]), run(model, inputs, ["b", "b"]))


def test_alora(model, tmp_path):
    """Where it begins is in the file, as llama.cpp wants it, and comes back."""
    late = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [5, 6]}
    folder = save_adapter(LLAMA, tmp_path / "late", target_modules=["q_proj", "o_proj"], **late)
    path = to_gguf(folder, tmp_path / "late.gguf", model)
    found = gguf.GGUFReader(path).fields["adapter.alora.invocation_tokens"]
    assert found.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]
    assert found.contents() == [5, 6]
    back = to_peft(path, tmp_path / "back", model)
    ids = tokens(2)
    ids[ids == 5] = 7
    ids[0, 2:4] = torch.tensor([5, 6])
    base, want = run(model, {"input_ids": ids}), run(with_peft(LLAMA.build(), {"late": folder}), {"input_ids": ids})
    assert torch.equal(want[1], base[1])
    assert not torch.allclose(want[0], base[0])
    assert torch.equal(run(with_peft(LLAMA.build(), {"late": str(back)}), {"input_ids": ids})[1], base[1])
    for source in (path, back):
        got = run(lorafx.compile(LLAMA.build(), {"late": source}, mode="eager"), {"input_ids": ids})
        assert torch.equal(got[1], base[1])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
