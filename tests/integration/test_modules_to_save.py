"""modules_to_save: each row through its own adapter's copy of a module, in one graph, as PEFT's eager gives it."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from torch import nn

import lorafx
from tests.integration.models import EAGER_GRAPH, VOCABULARY, config, difference, tokens

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_labels": 3,
    "pad_token_id": 0,
}
NAMES = ["one", None, "plain", "two", "one"]


def llama(kind="SequenceClassification", **fields):
    values = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": None, **fields}
    return getattr(transformers, f"LlamaFor{kind}")(transformers.LlamaConfig(**values))


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, max_position_embeddings=64))


def roberta():  # its head is a module of several layers
    values = {**SIZES, "max_position_embeddings": 64}
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**values))


KINDS = {  # model, fields of the adapters that bring modules, their layers
    "llama score": (llama, {"modules_to_save": ["score"]}, ["q_proj", "v_proj"]),
    "bert classifier": (bert, {"modules_to_save": ["classifier"]}, ["query", "value"]),
    "roberta head": (roberta, {"modules_to_save": ["classifier"]}, ["query", "value"]),
    "lm_head": (lambda: llama("CausalLM"), {"modules_to_save": ["lm_head"]}, ["q_proj"]),
    "tied lm_head": (lambda: llama("CausalLM", tie_word_embeddings=True), {"modules_to_save": ["lm_head"]}, ["q_proj"]),
    "embeddings": (lambda: llama("CausalLM"), {"modules_to_save": ["embed_tokens"]}, ["q_proj"]),
    "tied embeddings": (
        lambda: llama("CausalLM", tie_word_embeddings=True),
        {"modules_to_save": ["embed_tokens"]},
        ["q_proj"],
    ),
    "norm": (lambda: llama("CausalLM"), {"modules_to_save": ["input_layernorm"]}, ["q_proj"]),
}
SCORE = "llama score"
SLOW = {"tied lm_head", "embeddings", "roberta head"}  # like others here


def build(kind):
    torch.manual_seed(0)
    return KINDS[kind][0]().eval()


def save(kind, folder, seed, plain=False, **more):
    _, fields, targets = KINDS[kind]
    model = get_peft_model(build(kind), config(target_modules=targets, **({} if plain else fields), **more))
    torch.manual_seed(50 + seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.5)
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return str(folder)


def save_three(kind, folder):
    return {
        "one": save(kind, folder / "one", 1),
        "two": save(kind, folder / "two", 2, r=7),
        "plain": save(kind, folder / "plain", 3, plain=True),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_three(SCORE, tmp_path_factory.mktemp("score"))


def with_peft(kind, folders):
    names = list(folders)
    model = PeftModel.from_pretrained(build(kind), folders[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folders[name], name)
    return model.eval()


IDS = tokens(len(NAMES))


@torch.no_grad()
def run(model, names=None, ids=IDS):
    return model(input_ids=ids, **({} if names is None else {"adapter_names": names})).logits.clone()


def check(model, reference, names=NAMES):
    """Each adapter alone, then a mixed batch; base rows to the bit as the same model when idle."""
    model.lora.use(None)
    base, alone = run(model), {}
    for name in dict.fromkeys(filter(None, names)):
        reference.set_adapter(name)
        alone[name] = run(reference)
        assert difference(run(model, [name] * len(names)) - base, alone[name] - base) <= 1e-5
    got = run(model, names)
    want = torch.stack([base[i] if name is None else alone[name][i] for i, name in enumerate(names)])
    assert difference(got - base, want - base) <= 1e-5
    for i, name in enumerate(names):
        assert name is not None or torch.equal(got[i], base[i])


@pytest.mark.parametrize("peft", [False, True], ids=["plain", "peft"])
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW)) for k in KINDS])
def test_rows_go_through_their_own_copies(kind, peft, tmp_path):
    folders = save_three(kind, tmp_path)
    reference = with_peft(kind, folders)
    model = with_peft(kind, folders) if peft else build(kind)
    keys = list(model.state_dict())
    lorafx.compile(model, None if peft else folders, options=EAGER_GRAPH)
    check(model, reference)
    report = lorafx.explain(model)
    assert (len(report.graphs), report.recompiles, report.skipped) == (1, 0, [])
    assert list(model.state_dict()) == keys
    lorafx.uncompile(model)
    assert list(model.state_dict()) == keys
    reference.set_adapter("one")
    if peft:
        model.set_adapter("one")
        assert torch.equal(run(model), run(reference))


@pytest.mark.parametrize("peft", [False, True], ids=["plain", "peft"])
@pytest.mark.parametrize("kind", ["llama score", "bert classifier"])
def test_sequence_classification_is_pefts_own_mixed_batch(kind, peft, tmp_path):
    """PEFT makes the heads of such models modules_to_save by itself."""
    targets = KINDS[kind][2]
    folders = {}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        fields = config(task_type=TaskType.SEQ_CLS, target_modules=targets)
        saved = get_peft_model(build(kind), fields)
        with torch.no_grad():
            for parameter in saved.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        saved.save_pretrained(str(tmp_path / name))
        folders[name] = str(tmp_path / name)
    reference = with_peft(kind, folders)
    model = with_peft(kind, folders) if peft else build(kind)
    lorafx.compile(model, None if peft else folders, options=EAGER_GRAPH)
    names = ["one", "__base__", "two", "two", "one"]
    assert difference(run(model, names), run(reference, names)) <= 1e-5
    check(model, reference, ["one", None, "two", "two", "one"])
    assert len(lorafx.explain(model).graphs) == 1


def test_eager_mode_and_inductor(folders):
    reference = with_peft(SCORE, folders)
    check(lorafx.compile(build(SCORE), folders, mode="eager"), reference)
    check(lorafx.compile(with_peft(SCORE, folders), mode="eager"), reference)


class Two(nn.Module):
    """Few enough layers for Inductor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, x):
        return self.head(self.first(x).relu())


def test_inductor_keeps_the_op(tmp_path):
    torch.manual_seed(1)
    reference = get_peft_model(Two(), config(target_modules=["first"], modules_to_save=["head"])).eval()
    with torch.no_grad():
        reference.base_model.model.head.modules_to_save["default"].weight.add_(1)
    reference.save_pretrained(str(tmp_path))
    model = lorafx.compile(Two(), {"one": str(tmp_path)})
    x = torch.randn(3, 16)
    with torch.no_grad():
        want, got = reference(x), model(x)
        model.lora.use(None)
        base, mixed = model(x), model(x, adapter_names=["one", None, "one"])
    assert difference(got, want) <= 1e-5
    assert torch.equal(mixed[1], base[1])
    assert difference(mixed[::2], want[::2]) <= 1e-5
    assert len(lorafx.explain(model).graphs) == 1


def test_pefts_verbs_trace_nothing_anew(folders):
    model, reference = (with_peft(SCORE, folders) for _ in range(2))
    lorafx.compile(model, options=EAGER_GRAPH)
    for name in ("two", "plain", "one"):
        for each in (model, reference):
            each.set_adapter(name)
        assert difference(run(model), run(reference)) <= 1e-5
    with model.disable_adapter(), reference.disable_adapter():
        assert difference(run(model), run(reference)) <= 1e-5
    with torch.no_grad():  # PEFT's own weights: what is edited is seen
        for each in (model, reference):
            each.base_model.model.score.modules_to_save["one"].weight.mul_(2)
    assert difference(run(model), run(reference)) <= 1e-5
    for each in (model, reference):
        each.delete_adapter("two")
        each.load_adapter(folders["two"], "again")
        each.eval()
    check(model, reference, ["again", None, "one", "plain", "again"])
    assert (len(lorafx.explain(model).graphs), lorafx.explain(model).recompiles) == (1, 0)


def test_load_replace_and_unload(folders, tmp_path):
    reference = with_peft(SCORE, folders)
    model = lorafx.compile(build(SCORE), {"one": folders["one"]}, max_adapters=3, max_rank=8, options=EAGER_GRAPH)
    run(model)
    held = model.lora.nbytes
    model.lora.load("two", folders["two"])
    assert model.lora.nbytes == held + 3 * 32 * 4
    model.lora.load("plain", folders["plain"])
    check(model, reference)
    model.lora.replace("two", folders["plain"])
    reference.delete_adapter("two")
    reference.load_adapter(folders["plain"], "two")
    check(model, reference.eval(), ["two", "one", None, "plain", "two"])
    model.lora.replace("plain", folders["one"])
    reference.delete_adapter("plain")
    reference.load_adapter(folders["one"], "plain")
    check(model, reference.eval(), ["two", "one", None, "plain", "two"])
    model.lora.use(None)
    for name in ("one", "plain", "two"):
        model.lora.unload(name)
    assert model.lora.nbytes == held - 3 * 32 * 4
    assert (len(lorafx.explain(model).graphs), lorafx.explain(model).recompiles) == (1, 0)


@pytest.mark.parametrize("name", ["one", "default"])
def test_an_adapter_without_copies_beside_one_that_has_them(name, folders):
    """What another adapter has is not asked of its file, whatever that one is called."""
    reference = with_peft(SCORE, {name: folders["one"], "plain": folders["plain"]})
    model = lorafx.compile(with_peft(SCORE, {name: folders["one"]}), options=EAGER_GRAPH)
    model.lora.load("plain", folders["plain"])
    check(model, reference, [name, None, "plain", name, name])


@pytest.mark.parametrize("peft", [False, True], ids=["plain", "peft"])
def test_the_first_one_costs_one_trace_and_says_so(folders, peft):
    given = {"plain": folders["plain"]}
    model = with_peft(SCORE, given) if peft else build(SCORE)
    model = lorafx.compile(model, None if peft else given, max_adapters=3, max_rank=8, options=EAGER_GRAPH)
    reference = with_peft(SCORE, folders)
    run(model)
    with pytest.warns(UserWarning, match="score"):
        model.lora.load("one", folders["one"])
    model.lora.load("two", folders["two"])
    check(model, reference)
    assert len(lorafx.explain(model).graphs) == 2
    model.lora.replace("one", folders["two"])
    reference.delete_adapter("one")
    reference.load_adapter(folders["two"], "one")
    check(model, reference.eval())
    assert len(lorafx.explain(model).graphs) == 2


def test_failed_loads_leave_everything(folders):
    state = get_peft_model_state_dict(with_peft(SCORE, {"one": folders["one"]}), adapter_name="one")
    fields = LoraConfig.from_pretrained(folders["one"])
    key = next(key for key in state if "score" in key)
    model = lorafx.compile(build(SCORE), folders, options=EAGER_GRAPH)
    before = run(model, NAMES)
    for message, broken in {
        "holds NaN or Inf": {**state, key: torch.full_like(state[key], torch.inf)},
        "missing in the file": {k: v for k, v in state.items() if k != key},
        "size mismatch": {**state, key: torch.ones(2, 32)},
        "no layer for": {**state, key.replace("score", "scores"): state[key]},
    }.items():
        for change in (lambda s: model.lora.load("new", s), lambda s: model.lora.replace("one", s)):
            with pytest.raises(lorafx.LorafxError, match=message):
                change((broken, fields))
    assert torch.equal(run(model, NAMES), before)
    assert len(lorafx.explain(model).graphs) == 1


def test_two_copies_on_one_row_are_refused_by_name(folders):
    model = lorafx.compile(build(SCORE), folders, options=EAGER_GRAPH)
    with pytest.raises(lorafx.UnsupportedModelError, match="one and two each bring a score of their own"):
        model.lora.use({"one": 0.5, "two": 0.5})
    model.lora.use({"one": 0.5, "plain": 0.5})  # PEFT doesn't weight a module: it is there or not
    got = run(model)
    reference = with_peft(SCORE, folders)
    for layer in reference.modules():
        if hasattr(layer, "set_scale"):
            layer.scaling.update({name: layer.scaling[name] * 0.5 for name in layer.scaling})
    reference.base_model.set_adapter(["one", "plain"])
    assert difference(got, run(reference)) <= 1e-5


def test_a_layer_that_one_adapter_adapts_and_another_brings(tmp_path):
    kind = "lm_head"
    one = save(kind, tmp_path / "one", 1)
    torch.manual_seed(9)
    get_peft_model(build(kind), config(target_modules=["lm_head"])).save_pretrained(
        str(tmp_path / "lora"), save_embedding_layers=False
    )
    model = lorafx.compile(build(kind), {"one": one, "lora": str(tmp_path / "lora")}, options=EAGER_GRAPH)
    model.lora.use(None)
    base = run(model)
    got = run(model, ["one", "lora", None, "lora", "one"])
    for name, rows in (("one", [0, 4]), ("lora", [1, 3])):
        want = run(with_peft(kind, {name: str(tmp_path / name)}))
        assert difference(got[rows] - base[rows], want[rows] - base[rows]) <= 1e-5
    assert torch.equal(got[2], base[2])


def test_gradients_are_pefts(folders):
    model, reference = (with_peft(SCORE, folders) for _ in range(2))
    lorafx.compile(model, mode="eager")
    for each in (model, reference):
        each.set_adapter("two")  # which makes it trainable
        each(input_ids=IDS).logits.square().sum().backward()
    want = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    assert any("modules_to_save" in name for name in got)
    assert all(difference(got[name], want[name]) <= 1e-4 for name in want)


def test_gradients_through_a_frozen_copy(folders):
    model = lorafx.compile(build(SCORE), {"one": folders["one"]}, options=EAGER_GRAPH).requires_grad_(False)
    reference = with_peft(SCORE, {"one": folders["one"]}).requires_grad_(False)
    grads = []
    for each in (model, reference):
        embeds = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4)).requires_grad_(True)
        each(inputs_embeds=embeds).logits.square().sum().backward()
        grads.append(embeds.grad)
    assert difference(*grads) <= 1e-5


def test_gradients_of_rows_with_copies_of_their_own(folders):
    """The backward comes when the call, and what it chose, is over."""
    model = lorafx.compile(build(SCORE), folders, options=EAGER_GRAPH).requires_grad_(False)
    reference = with_peft(SCORE, folders).requires_grad_(False)
    names = ["one", "__base__", "two"]
    grads = []
    for each in (model, reference):
        embeds = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(4)).requires_grad_(True)
        each(inputs_embeds=embeds, adapter_names=names).logits.square().sum().backward()
        grads.append(embeds.grad)
    assert difference(*grads) <= 1e-5


def test_moves_and_copies(folders):
    model = lorafx.compile(build(SCORE), folders, mode="eager")
    reference = with_peft(SCORE, folders)
    other = copy.deepcopy(model)
    model.lora.replace("one", folders["two"])
    check(other, reference)
    other.double()
    assert run(other, NAMES).dtype == torch.float64


def test_what_can_not_be_run_row_by_row_is_refused_or_left_to_peft(tmp_path):
    kind, fields = "lm_head", {"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]}
    fields["target_modules"] = ["up_proj"]
    get_peft_model(build(kind), config(**fields)).save_pretrained(str(tmp_path))
    with pytest.raises(lorafx.AdapterFormatError, match=r"brings its own model.layers.0.self_attn.*pass the PeftModel"):
        lorafx.compile(build(kind), {"one": str(tmp_path)})
    model, reference = (with_peft(kind, {"one": str(tmp_path)}) for _ in range(2))
    lorafx.compile(model, options=EAGER_GRAPH)
    assert difference(run(model), run(reference)) <= 1e-5
    (skipped,) = lorafx.explain(model).skipped
    assert skipped.name == "model.layers.0.self_attn"
    assert "modules_to_save" in skipped.reason


def test_an_adapter_store_refuses_them_by_name(folders):
    model = lorafx.compile(build(SCORE), lorafx.AdapterStore(folders), max_adapters=2, mode="eager")
    run(model, ["plain"] * 5)
    with pytest.raises(lorafx.UnsupportedModelError, match="brings its own score"):
        run(model, NAMES)
