"""LoRA on embeddings of language models, on both roads, held to PEFT's eager result."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import lorafx

from .models import EAGER_GRAPH, FAMILIES, LLAMA, VOCABULARY, Family, assert_close, config, run, tokens
from .other_layers import assert_same_delta, filled


def _gemma(layers):
    """Its embedding multiplies what it finds, and PEFT the delta too."""
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
    )


def _tied(layers):
    model = LLAMA.model(layers)
    model.config.tie_word_embeddings = True
    return transformers.LlamaForCausalLM(model.config)


GEMMA = Family(_gemma, LLAMA.inputs, ("q_proj",))
TIED = Family(_tied, LLAMA.inputs, ("q_proj",))
CASES = {
    "llama": (LLAMA, ["embed_tokens", "q_proj"]),
    "gemma3, scaled": (GEMMA, ["embed_tokens"]),
    "tied": (TIED, ["embed_tokens"]),
    "tied, the head too": (TIED, ["embed_tokens", "lm_head"]),
    "bert": (FAMILIES["bert"], ["word_embeddings", "query"]),
    "t5": (FAMILIES["t5"], ["embed_tokens", "q"]),
}
POSITIONS = {
    "bert": (FAMILIES["bert"], ["position_embeddings", "word_embeddings"]),
    "gpt2": (FAMILIES["gpt2"], ["wpe", "wte"]),
}
NAMES = ["other", "__base__", "default", "other"]


def two_adapters(family, targets, dtype=torch.float32, **fields):
    """A PeftModel with "default" on all of the targets and "other" on the first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(family.build(dtype=dtype), config(target_modules=targets, **fields))
        model.add_adapter("other", config(r=3, target_modules=targets[:1]))
    return filled(model)


@pytest.mark.parametrize("case", CASES)
def test_families(case):
    family, targets = CASES[case]
    reference = two_adapters(family, targets)
    inputs, base = family.inputs(4), run(family.build(), family.inputs(4))
    model = lorafx.compile(copy.deepcopy(reference), options=EAGER_GRAPH)
    for name in ("other", "default"):
        for each in (model, reference):
            each.set_adapter(name)
        assert_same_delta(run(model, inputs), run(reference, inputs), base)
    got = run(model, inputs, NAMES)
    assert_same_delta(got, run(reference, inputs, NAMES), base)
    assert torch.equal(got[1], run(model, inputs, [None] * 4)[1])
    report = lorafx.explain(model)
    assert not report.skipped
    assert len(report.graphs) == 1


@pytest.mark.parametrize("case", POSITIONS)
def test_positions_refuse_mixed_batches(case):
    """All rows share one row of positions: which adapter it is to take can't be told, in PEFT neither."""
    family, targets = POSITIONS[case]
    reference = two_adapters(family, targets)
    inputs, base = family.inputs(4), run(family.build(), family.inputs(4))
    for arguments in ({"options": EAGER_GRAPH}, {"mode": "eager"}):
        model = lorafx.compile(copy.deepcopy(reference), **arguments)
        for each in (model, reference):
            each.set_adapter("default")
        assert_same_delta(run(model, inputs), run(reference, inputs), base)
        with pytest.raises(lorafx.UnsupportedModelError, match=f"{targets[0]} can't take different adapters"):
            run(model, inputs, NAMES)
        for each in (model, reference):
            each.set_adapter("other")
        assert_same_delta(run(model, inputs), run(reference, inputs), base)


def test_bfloat16_base_with_float32_adapters():
    reference = two_adapters(GEMMA, ["embed_tokens"], torch.bfloat16)
    base = GEMMA.build(dtype=torch.bfloat16)
    ids = tokens(4)
    model = lorafx.compile(copy.deepcopy(reference), options=EAGER_GRAPH)
    with torch.no_grad():
        for name in ("default", "other"):
            for each in (model, reference):
                each.set_adapter(name)
            got, want, without = (m.get_input_embeddings()(ids) for m in (model, reference, base))
            assert got.dtype == torch.bfloat16
            assert_same_delta(got, want, without, 5e-3)


def test_generate_token_for_token():
    reference = two_adapters(LLAMA, ["embed_tokens", "q_proj"])
    model = lorafx.compile(copy.deepcopy(reference), options=EAGER_GRAPH)
    arguments = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(tokens(4))}
    want = reference.generate(input_ids=tokens(4), adapter_names=NAMES, **arguments)
    assert torch.equal(model.generate(input_ids=tokens(4), adapter_names=NAMES, **arguments), want)


def test_weights_tied_to_the_head_stay_with_peft():
    """PEFT's ensure_weight_tying gives the head the embedding's parameters, turned: one memory, two layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fields = config(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
        reference, model = (filled(get_peft_model(TIED.build(), fields)) for _ in range(2))
    inputs = TIED.inputs(3)
    lorafx.compile(model, options=EAGER_GRAPH)
    skipped = {item.name: item.reason for item in lorafx.explain(model).skipped}
    assert skipped.keys() == {"model.embed_tokens", "lm_head"}
    assert all("ensure_weight_tying" in reason for reason in skipped.values())
    assert_close(run(model, inputs), run(reference, inputs))


# ------------------------------------------------------------------------------------------------ from files


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the PeftModel, folders of its adapters): PEFT writes the base weight of the embedding into each."""
    folder = tmp_path_factory.mktemp("adapters")
    reference = two_adapters(LLAMA, ["embed_tokens", "q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference.save_pretrained(str(folder))
    return reference, {"default": str(folder), "other": str(folder / "other")}


@pytest.mark.parametrize("arguments", [{"options": EAGER_GRAPH}, {"mode": "eager"}], ids=["graph", "eager"])
def test_files_on_a_plain_model(made, arguments):
    reference, folders = made
    inputs, base = LLAMA.inputs(4), run(LLAMA.build(), LLAMA.inputs(4))
    assert any(".base_layer." in key for key in load_file(Path(folders["other"]) / "adapter_model.safetensors"))
    room = {"max_adapters": 3, "max_rank": 4, "target_modules": ["embed_tokens", "q_proj"]}
    model = lorafx.compile(LLAMA.build(), {"default": folders["default"]}, **room, **arguments)
    run(model, inputs)
    model.lora.load("other", folders["other"])
    want = run(reference, inputs, NAMES)
    got = run(model, inputs, ["other", None, "default", "other"])
    assert_same_delta(got, want, base)
    model.lora.replace("default", folders["other"])
    assert_same_delta(run(model, inputs, ["other", None, None, "default"])[[0, 3]], want[[0, 3]], base[[0, 3]])
    model.lora.use(None)
    model.lora.unload("default")
    assert_close(run(model, inputs), base, 1e-6)
    assert len(lorafx.explain(model).graphs) == ("options" in arguments)


def test_a_store_brings_them_in(made):
    reference, folders = made
    inputs, base = LLAMA.inputs(2), run(LLAMA.build(), LLAMA.inputs(2))
    store = lorafx.AdapterStore(folders)
    model = lorafx.compile(LLAMA.build(), store, max_adapters=1, options=EAGER_GRAPH)
    for name in ("default", "other", "default"):
        reference.set_adapter(name)
        assert_same_delta(run(model, inputs, [name] * 2), run(reference, inputs), base)
    assert len(lorafx.explain(model).graphs) == 1


def test_another_base_weight_is_refused(made, tmp_path):
    _, folders = made
    tensors = load_file(Path(folders["other"]) / "adapter_model.safetensors")
    key = next(key for key in tensors if ".base_layer." in key)
    tensors[key] = tensors[key] + 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((Path(folders["other"]) / "adapter_config.json").read_text())
    with pytest.raises(lorafx.AdapterMismatchError, match=r"embed_tokens.*not the model's own"):
        lorafx.compile(LLAMA.build(), {"a": str(tmp_path)}, mode="eager")


def test_a_state_dict_alone_and_a_folder_on_a_peft_model(made):
    reference, folders = made
    state = load_file(Path(folders["other"]) / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="alpha = rank"):
        model = lorafx.compile(LLAMA.build(), {"a": state}, mode="eager")
    assert [site.name for site in model.lora.store.sites] == ["model.embed_tokens"]
    inputs = LLAMA.inputs(4)
    model = lorafx.compile(PeftModel.from_pretrained(LLAMA.build(), folders["default"]).eval(), options=EAGER_GRAPH)
    model.lora.load("other", folders["other"])
    assert_close(run(model, inputs, NAMES), run(reference, inputs, NAMES))


def test_training_steps_are_pefts():
    weights = []
    for compiled in (False, True):
        model = two_adapters(LLAMA, ["embed_tokens", "q_proj"], lora_dropout=0.0)
        if compiled:
            lorafx.compile(model, options=EAGER_GRAPH)
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        for step in range(2):
            ids = tokens(2, seed=step)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append({n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n})
    for name, tensor in weights[0].items():
        assert torch.allclose(weights[1][name], tensor, atol=1e-5), name


def test_room_can_be_reserved_there():
    model = lorafx.compile(
        LLAMA.build(), max_adapters=2, max_rank=4, target_modules=["embed_tokens"], options=EAGER_GRAPH
    )
    inputs, base = LLAMA.inputs(2), run(LLAMA.build(), LLAMA.inputs(2))
    assert_close(run(model, inputs), base, 1e-6)
    peft = filled(get_peft_model(LLAMA.build(), LoraConfig(r=4, target_modules=["embed_tokens"])))
    state = {key: value for key, value in peft.state_dict().items() if "lora_" in key}
    state = {key.replace(".default", ""): value for key, value in state.items()}
    model.lora.load("a", (state, peft.peft_config["default"]))
    model.lora.use("a")
    assert_same_delta(run(model, inputs), run(peft, inputs), base)
    assert len(lorafx.explain(model).graphs) == 1
