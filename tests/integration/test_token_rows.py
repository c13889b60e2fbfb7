"""trainable_token_indices: rows of an embedding, and of the head tied to it, that are each adapter's own."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import lorafx
from tests.integration.models import EAGER_GRAPH, FAMILIES, config, difference, run, tokens

ROWS, OTHER = [3, 11, 40, 95], [95, 7, 30]  # of a vocabulary of 96, not in order
NAMES = ["one", None, "plain", "two", "one"]
KINDS = {  # family, the layers that LoRA is on, trainable_token_indices of two adapters
    "llama": ("llama", ["q_proj", "v_proj"], ROWS, OTHER),
    "head and embedding apart": ("llama", ["q_proj"], {"lm_head": ROWS, "embed_tokens": OTHER}, {"lm_head": OTHER}),
    "tied": ("gpt2", ["c_attn"], ROWS, OTHER),
    "scaled and tied": ("gemma3", ["q_proj"], ROWS, OTHER),
    "bert": ("bert", ["query"], {"word_embeddings": ROWS}, {"word_embeddings": OTHER}),
}
MODES = {"graph": {"options": EAGER_GRAPH}, "eager": {"mode": "eager"}}
INPUTS = {
    "input_ids": torch.cat([tokens(len(NAMES), 5), torch.tensor([[3, 95], [95, 7], [3, 7], [7, 95], [40, 30]])], 1)
}


def build(kind):
    return FAMILIES[KINDS[kind][0]].build(1)


def adapted(kind, name):
    """A PeftModel with this adapter alone, its numbers far from the model's own."""
    _, targets, first, second = KINDS[kind]
    indices = {"one": first, "two": second, "plain": None}[name]
    seed = ["one", "two", "plain"].index(name)
    model = get_peft_model(build(kind), config(r=3 + seed, target_modules=targets, trainable_token_indices=indices))
    torch.manual_seed(50 + seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key or "trainable_tokens_delta" in key:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of the adapters, and what each gives alone, made once for each kind."""
    kept = {}

    def make(kind):
        if kind not in kept:
            folders, alone = {}, {None: run(build(kind), INPUTS)}
            for name in ("one", "two", "plain"):
                model = adapted(kind, name)
                folders[name] = str(tmp_path_factory.mktemp(name))
                model.save_pretrained(folders[name], save_embedding_layers=False)
                alone[name] = run(model, INPUTS)
            kept[kind] = folders, alone
        return kept[kind]

    return make


def on_peft(kind, folders):
    """PEFT itself can't load an adapter without such rows beside one that has them."""
    model = PeftModel.from_pretrained(build(kind), folders["one"], adapter_name="one")
    model.load_adapter(folders["two"], "two") if kind != "head and embedding apart" else None
    return model.eval()


def check(model, alone, names=NAMES):
    for name in dict.fromkeys(names):
        model.lora.use(name)
        assert difference(run(model, INPUTS), alone[name]) <= 1e-5
    model.lora.use(None)
    want = torch.stack([alone[name][i] for i, name in enumerate(names)])
    assert difference(run(model, INPUTS, names), want) <= 1e-5
    assert difference(want, alone[None]) > 1e-2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_has_the_tokens_of_its_adapter(kind, mode, made):
    folders, alone = made(kind)
    model = lorafx.compile(build(kind), folders, **MODES[mode])
    check(model, alone)
    report = lorafx.explain(model)
    assert (report.skipped, report.uncompiled, report.recompiles) == ([], "", 0)
    lorafx.uncompile(model)
    assert torch.equal(run(model, INPUTS), alone[None])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_models_in_place(kind, mode, made):
    folders, alone = made(kind)
    model = lorafx.compile(on_peft(kind, folders), **MODES[mode])
    for name in ("two", "plain"):
        if name not in model.peft_config:
            model.lora.load(name, folders[name])
    check(model, alone)
    for name in ("one", "plain", "two", "one"):
        model.set_adapter(name)
        assert difference(run(model, INPUTS), alone[name]) <= 1e-5
    with model.disable_adapter():
        assert difference(run(model, INPUTS), alone[None]) <= 1e-5
    assert lorafx.explain(model).skipped == []
    model.delete_adapter("two")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
        assert difference(run(model, INPUTS), alone["one"]) <= 1e-5
        model.unmerge_adapter()
    assert difference(run(model, INPUTS), alone["one"]) <= 1e-5
    lorafx.uncompile(model)
    assert difference(run(model, INPUTS), alone["one"]) <= 1e-5


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_load_replace_and_unload(kind, made):
    folders, alone = made(kind)
    model = lorafx.compile(build(kind), {"plain": folders["plain"]}, max_adapters=3, max_rank=8, options=EAGER_GRAPH)
    run(model, INPUTS)
    held = model.lora.nbytes
    model.lora.load("two", folders["two"])
    modules = 2 if kind == "tied" else 1
    assert model.lora.nbytes == held + modules * len(OTHER) * (32 * 4 + 8)
    model.lora.load("one", model.lora.read(folders["one"], "again"))  # weights that were read before
    check(model, alone)
    model.lora.replace("one", folders["two"])
    assert difference(run(model, INPUTS, ["one"] * 5), alone["two"]) <= 1e-5
    model.lora.use(None)
    for name in ("two", "one"):
        model.lora.unload(name)
    assert model.lora.nbytes == held
    assert len(lorafx.explain(model).retraces) == 1


def test_weights_that_were_read_go_onto_a_peft_model(made):
    folders, alone = made("tied")
    read = lorafx.compile(build("tied"), mode="eager").lora.read(folders["one"], "one")
    model = lorafx.compile(adapted("tied", "plain"), mode="eager")
    model.lora.load("one", read)
    model.set_adapter("one")
    assert difference(run(model, INPUTS), alone["one"]) <= 1e-5


def test_inductor_and_generate(made):
    folders, alone = made("tied")
    model = lorafx.compile(build("tied"), folders)
    check(model, alone)
    ids, count = INPUTS["input_ids"], {"max_new_tokens": 3, "do_sample": False}
    got = model.generate(ids, attention_mask=torch.ones_like(ids), adapter_names=NAMES, **count)
    for i, name in enumerate(NAMES):
        one = adapted("tied", name) if name else build("tied")
        want = one.generate(input_ids=ids[i : i + 1], attention_mask=torch.ones_like(ids[i : i + 1]), **count)
        assert torch.equal(got[i : i + 1], want)


def test_gradients_are_pefts(made):
    reference = adapted("tied", "one")
    model = lorafx.compile(copy.deepcopy(reference), options=EAGER_GRAPH)
    grads = []
    for each in (reference, model):
        each(**INPUTS).logits.square().mean().backward()
        grads.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert any("trainable_tokens_delta" in name for name in grads[0])
    for name, grad in grads[0].items():
        assert difference(grads[1][name], grad) <= 1e-4


def test_edits_in_place_are_seen(made):
    folders, _ = made("tied")
    model, reference = lorafx.compile(on_peft("tied", folders), options=EAGER_GRAPH), on_peft("tied", folders)
    run(model, INPUTS)
    with torch.no_grad():
        for each in (model, reference):
            next(p for n, p in each.named_parameters() if "trainable_tokens_delta.one" in n).mul_(-2)
    assert difference(run(model, INPUTS), run(reference, INPUTS)) <= 1e-5
    assert len(lorafx.explain(model).graphs) == 1


BAD = {
    "beyond the vocabulary": (
        {"trainable_token_indices": [3, 11, 40, 96]},
        "name token 96, .*embed_tokens has 96 rows",
    ),
    "another number": ({"trainable_token_indices": [3, 11]}, "size mismatch"),
    "no list": ({"trainable_token_indices": "3"}, "expected a list of token ids"),
    "no module": ({"trainable_token_indices": {"nothing": ROWS}}, "nothing"),
    "negative": ({"trainable_token_indices": [-1, 3, 11, 40]}, "expected a list of token ids"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configs(case, made, tmp_path):
    folders, _ = made("llama")
    fields, said = BAD[case]
    state = load_file(f"{folders['one']}/adapter_model.safetensors")
    save_file(state, tmp_path / "adapter_model.safetensors")
    with open(f"{folders['one']}/adapter_config.json") as file:
        (tmp_path / "adapter_config.json").write_text(json.dumps({**json.load(file), **fields}))
    with pytest.raises(lorafx.LorafxError, match=said):
        lorafx.compile(build("llama"), {"one": str(tmp_path)}, mode="eager")


def test_bad_tensors_and_places(made, tmp_path):
    folders, _ = made("llama")
    state = load_file(f"{folders['one']}/adapter_model.safetensors")
    with open(f"{folders['one']}/adapter_config.json") as file:
        fields = json.load(file)
    key = next(key for key in state if "token" in key)
    model = lorafx.compile(build("llama"), {"plain": folders["plain"]}, mode="eager")
    before = run(model, INPUTS)
    with pytest.raises(lorafx.AdapterMismatchError, match="is missing in the file"):
        model.lora.load("one", ({k: v for k, v in state.items() if k != key}, fields))
    with pytest.raises(lorafx.AdapterFormatError, match=r"of its own model.embed_tokens holds NaN"):
        model.lora.load("one", ({**state, key: state[key] * float("nan")}, fields))
    assert model.lora.names == ["plain"]
    assert torch.equal(run(model, INPUTS), before)
    store = lorafx.compile(build("llama"), lorafx.AdapterStore(folders), max_adapters=2, mode="eager")
    with pytest.raises(lorafx.UnsupportedModelError, match=r"brings its own model.embed_tokens"):
        store.lora.use("one")


def test_the_table_says_what_is_more_than_plain_lora(made, tmp_path):
    folders, _ = made("llama")
    dora, late = str(tmp_path / "dora"), str(tmp_path / "late")
    get_peft_model(build("llama"), config(target_modules=["q_proj"], use_dora=True)).save_pretrained(dora)
    fields = {"target_modules": ["q_proj"], "alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"}
    get_peft_model(build("llama"), config(**fields)).save_pretrained(late)
    model = lorafx.compile(build("llama"), {"plain": folders["plain"]}, mode="eager")
    assert "kind" not in model.lora.table()[0]
    for name, folder in (("one", folders["one"]), ("dora", dora), ("late", late)):
        model.lora.load(name, folder)
    kinds = {row["name"]: row["kind"] for row in model.lora.table()}
    assert kinds == {"plain": "", "one": "its own embed_tokens", "dora": "DoRA", "late": "aLoRA"}
    assert "its own embed_tokens" in repr(model.lora)
