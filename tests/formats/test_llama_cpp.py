"""llama.cpp itself as the judge: an adapter converted to GGUF does there what it does here, on the demo's base model.

The base is a Q4_1 file. llama.cpp rounds activations to 8 bits before it multiplies by such weights, so without any
adapter its logits have a cosine of 0.999 with those of the same weights in float32. The sharp comparison is with the
base written as float32 by llama.cpp, from the same file; on the file itself the bound says what rounding leaves.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import lorafx
from lorafx.formats import gguf_layout, to_gguf

llama_cpp = pytest.importorskip("llama_cpp")
demo = pytest.importorskip("demo.model")

TEXT = "The quick brown fox jumps over the lazy dog. Give me a short list of three fruits in JSON, please."
NAMES = ("french", "json", "pirate", "upper")
F32 = 0  # of ggml_type


@pytest.fixture(scope="module")
def base():
    try:
        return str(demo.folder() / demo.GGUF)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def float_base(base, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("base") / "f32.gguf")
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize, how.nthread = llama_cpp.LLAMA_FTYPE_ALL_F32, True, 1
    assert llama_cpp.llama_model_quantize(base.encode(), path.encode(), ctypes.byref(how)) == 0
    return path


@pytest.fixture(scope="module")
def ours(base, tmp_path_factory):
    """Prompt, logits by adapter (None: the base), and the model to convert for."""
    model = AutoModelForCausalLM.from_pretrained(str(demo.folder()), gguf_file=demo.GGUF).eval()
    engine = llama_cpp.Llama(base, vocab_only=True, verbose=False)
    ids = engine.tokenize(TEXT.encode(), add_bos=False)
    engine.close()
    lorafx.compile(model, {name: f"demo/adapters/{name}" for name in NAMES}, mode="eager")
    with torch.no_grad():
        logits = {
            name: model(torch.tensor([ids]), adapter_names=[name]).logits[0].double().numpy() for name in (None, *NAMES)
        }
    return ids, logits, lorafx.uncompile(model)


def theirs(base, ids, adapter=None):
    """Logits ``[tokens, vocabulary]`` of llama.cpp, with a cache in float32."""
    engine = llama_cpp.Llama(
        base,
        lora_path=None if adapter is None else str(adapter),
        logits_all=True,
        n_ctx=64,
        n_threads=1,
        n_threads_batch=1,
        type_k=F32,
        type_v=F32,
        verbose=False,
    )
    engine.eval(ids)
    logits = np.array(engine.scores[: len(ids)], dtype=np.float64)
    engine.close()
    return logits


def cosine(a, b):
    return (a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b))


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_does_in_llama_cpp_what_it_does_here(ours, float_base, tmp_path, name, monkeypatch):
    ids, logits, model = ours
    nothing = theirs(float_base, ids)
    assert np.linalg.norm(nothing - logits[None]) <= 1e-4 * np.linalg.norm(nothing)

    def compare(path):
        got = theirs(float_base, ids, path)
        return cosine(got, logits[name]), cosine(got - nothing, logits[name] - logits[None])

    path = to_gguf(f"demo/adapters/{name}", tmp_path / "a.gguf", model)
    assert min(compare(path)) >= 0.999999
    half = to_gguf(f"demo/adapters/{name}", tmp_path / "half.gguf", model, dtype="f16")
    assert min(compare(half)) >= 0.9999
    monkeypatch.setitem(gguf_layout.ARCHITECTURES, "llama", ("llama", False))
    wrong = to_gguf(f"demo/adapters/{name}", tmp_path / "wrong.gguf", model)
    assert max(compare(wrong)) < 0.99


def test_on_the_quantised_base_what_is_left_is_its_rounding(ours, base, tmp_path):
    ids, logits, model = ours
    path = to_gguf("demo/adapters/french", tmp_path / "a.gguf", model)
    nothing, got = theirs(base, ids), theirs(base, ids, path)
    assert cosine(nothing, logits[None]) >= 0.998
    assert cosine(got, logits["french"]) >= 0.996
    assert cosine(got - nothing, logits["french"] - logits[None]) >= 0.99
