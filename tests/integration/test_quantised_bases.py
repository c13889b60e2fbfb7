"""Adapters on quantised layers, which are left as they are: what is added is held to double precision."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear

import lorafx

from .models import EAGER_GRAPH, difference
from .quantised_models import KINDS, SIZES, FusedModel, Model, build

HOW = {"eager": {"mode": "eager"}, "graph": {"options": EAGER_GRAPH}}
PEFT_KINDS = [kind for kind in KINDS if kind not in ("transformers gguf", "packed")]
RANKS = {"q_proj": 3, "k_proj": 5, "v_proj": 8}
X = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Made by PEFT on the model before it was quantised."""
    folders = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(10 + seed)
        config = LoraConfig(
            r=4, lora_alpha=8 + seed, target_modules=list(SIZES), rank_pattern=RANKS, init_lora_weights=False
        )
        folders[name] = str(tmp_path_factory.mktemp("quantised") / name)
        get_peft_model(Model(), config).save_pretrained(folders[name])
    return folders


def exact_delta(folder, x=X):
    """In double precision, from the file's numbers."""
    layers = PeftModel.from_pretrained(Model(), folder).get_base_model().attn
    deltas = []
    for name in SIZES:
        layer = getattr(layers, name)
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        deltas.append(x.double() @ a.T @ b.T * layer.scaling["default"])
    return torch.cat(deltas, dim=-1).detach()


@torch.no_grad()
def call(model, names=None, x=X):
    return model(x, adapter_names=names) if names else model(x)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", KINDS)
def test_files_on_a_quantised_model(folders, kind, how):
    base = call(build(kind))
    model = lorafx.compile(build(kind), folders, **HOW[how])
    idle = call(model)
    assert torch.equal(idle, base)
    got = call(model, ["a", None, "b"])
    assert torch.equal(got[1], idle[1])
    for row, name in ((0, "a"), (2, "b")):
        assert difference(got[row] - idle[row], exact_delta(folders[name])[row]) <= 1e-5
    model.lora.replace("a", folders["b"])
    assert difference(call(model, ["a"] * 3) - idle, exact_delta(folders["b"])) <= 1e-5
    lorafx.uncompile(model)
    assert torch.equal(call(model), base)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_q_k_and_v_on_one_quantised_layer(folders, kind, how):
    base = call(build(kind, make=FusedModel))
    model = lorafx.compile(build(kind, make=FusedModel), folders, **HOW[how])
    got = call(model, ["a", None, "b"])
    assert torch.equal(got[1], base[1])
    for row, name in ((0, "a"), (2, "b")):
        assert difference(got[row] - base[row], exact_delta(folders[name])[row]) <= 1e-5
    lorafx.uncompile(model)
    assert torch.equal(call(model), base)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_layers_that_peft_has_for_them(folders, kind, how):
    base = call(build(kind))
    peft_model = PeftModel.from_pretrained(build(kind), folders["a"], adapter_name="a").eval()
    peft_model.load_adapter(folders["b"], adapter_name="b")
    model = lorafx.compile(peft_model, **HOW[how])
    kinds = {type(layer).__name__ for layer in peft_model.get_base_model().attn.children()}
    assert all(name.startswith("Adapted") for name in kinds), kinds
    assert not [s for s in lorafx.explain(model).skipped if "left to PEFT" in s.reason]
    for name in "ab":
        model.set_adapter(name)
        assert difference(call(model) - base, exact_delta(folders[name])) <= 1e-5
    got = call(model, ["b", "__base__", "a"])
    with model.disable_adapter():
        assert torch.equal(call(model), base)
    assert torch.equal(got[1], base[1])
    for row, name in ((0, "b"), (2, "a")):
        assert difference(got[row] - base[row], exact_delta(folders[name])[row]) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_dora_needs_weights_that_can_be_read(folders, kind, tmp_path):
    config = LoraConfig(r=4, target_modules=list(SIZES), init_lora_weights=False, use_dora=True)
    get_peft_model(Model(), config).save_pretrained(str(tmp_path))
    base, said = call(build(kind)), r"q_proj needs the norms of that layer's weight, and it(s weight)? is"
    with pytest.raises(lorafx.UnsupportedModelError, match=said):
        lorafx.compile(build(kind), {"dora": tmp_path}, mode="eager")
    model = lorafx.compile(build(kind), folders, max_adapters=3, mode="eager")
    with pytest.raises(lorafx.UnsupportedModelError, match=said):
        model.lora.load("dora", tmp_path)
    model.lora.use(None)
    assert torch.equal(call(model), base)


@pytest.mark.parametrize("kind", ["nf4", "torchao int8", "torchao int4"])  # of int8, PEFT's own second call fails
def test_dora_of_pefts_quantised_layers_stays_pefts(kind):
    config = LoraConfig(r=4, target_modules=list(SIZES), init_lora_weights=False, use_dora=True)
    torch.manual_seed(3)
    model = get_peft_model(build(kind), config).eval()
    want = call(model)
    lorafx.compile(model, options=EAGER_GRAPH)
    assert difference(call(model), want) <= 1e-6
    reasons = {skipped.name: skipped.reason for skipped in lorafx.explain(model).skipped}
    assert {name.rpartition(".")[2] for name in reasons} == set(SIZES)
    assert all("DoRA needs the norms of this layer's weight" in reason for reason in reasons.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_rounded_once_is_no_farther_than_rounded_twice(folders, kind, dtype):
    """PEFT rounds the delta to the base's dtype, and then the sum; lorafx the sum alone."""
    x = X.to(dtype)
    peft_model = PeftModel.from_pretrained(build(kind, dtype), folders["a"], adapter_name="a").eval()
    theirs = call(peft_model, x=x)
    with peft_model.disable_adapter():
        base = call(peft_model, x=x)
    exact = base.double() + exact_delta(folders["a"], x)
    ours = call(lorafx.compile(peft_model, options=EAGER_GRAPH), x=x)
    assert ours.dtype == theirs.dtype == dtype
    nearest = (exact.to(dtype).double() - exact).abs()
    assert ((ours.double() - exact).abs() <= nearest + 1e-6).all()
    assert difference(ours, exact) <= (1 + 1e-6) * difference(theirs, exact)  # where they are the same but for a tie


# the others' code breaks Dynamo's graph, or writes in place on its way
ONE_GROUP = ["nf4", "fp4", *(kind for kind in KINDS if "torchao" in kind), "diffusers gguf", "packed"]


@pytest.mark.parametrize("kind", ONE_GROUP)
def test_siblings_are_one_group(folders, kind):
    model = lorafx.compile(build(kind), folders, options=EAGER_GRAPH)
    for _ in range(2):
        call(model)
    report = lorafx.explain(model)
    assert [len(group.branches) for group in report.groups] == [len(SIZES)]
    assert len(report.graphs) == 1
    assert report.folded == 0
    assert not report.skipped


@pytest.mark.parametrize("kind", ["nf4", "torchao int8", "awq"])
def test_with_inductor(folders, kind):
    model = lorafx.compile(build(kind), folders)
    for _ in range(2):
        idle, got = call(model, [None] * 3), call(model, ["a", None, "b"])
        assert torch.equal(got[1], idle[1])
        assert difference(got[0] - idle[0], exact_delta(folders["a"])[0]) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "named"), [("int8", "bitsandbytes's Linear8bitLt"), ("gptq", "gptqmodel's TorchLinear")]
)
def test_a_layer_that_breaks_the_graph_is_named(folders, kind, named):
    model = lorafx.compile(build(kind), folders, options=EAGER_GRAPH)
    call(model)
    skipped = lorafx.explain(model).skipped
    assert {entry.name for entry in skipped} == {f"attn.{name}" for name in SIZES}
    assert all(f"{named} is not traced with the model" in entry.reason for entry in skipped)


@pytest.mark.parametrize("theirs", [GPTQLoraLinear, AwqLoraLinear])
@pytest.mark.parametrize("how", HOW)
def test_peft_layers_of_gptq_and_awq(folders, theirs, how):
    """PEFT itself makes them of gptqmodel's layers only; here each is put on by hand."""
    model, base = build("packed"), call(build("packed"))
    weights = PeftModel.from_pretrained(Model(), folders["a"]).get_base_model().attn
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(SIZES))
    for name in SIZES:
        layer = theirs(getattr(model.attn, name), "a", config=config, r=RANKS[name], lora_alpha=8).eval()
        layer.lora_A["a"].weight.data = getattr(weights, name).lora_A["default"].weight.data.clone()
        layer.lora_B["a"].weight.data = getattr(weights, name).lora_B["default"].weight.data.clone()
        setattr(model.attn, name, layer)
    lorafx.compile(model, **HOW[how])
    assert {type(layer).__name__ for layer in model.attn.children()} == {f"Adapted{theirs.__name__}"}
    assert difference(call(model) - base, exact_delta(folders["a"])) <= 1e-5
    got = call(model, ["a", None, "a"])
    assert torch.equal(got[1], base[1])
    assert difference(got[2] - base[2], exact_delta(folders["a"])[2]) <= 1e-5
    if how == "graph":
        assert [len(group.branches) for group in lorafx.explain(model).groups] == [3]
    lorafx.uncompile(model)
    assert {type(layer) for layer in model.attn.children()} == {theirs}


def test_merging_is_pefts(folders):
    """It dequantises, adds, and quantises anew; lorafx stands aside while that holds."""
    base = call(build("nf4"))
    reference = PeftModel.from_pretrained(build("nf4"), folders["a"]).eval()
    model = lorafx.compile(PeftModel.from_pretrained(build("nf4"), folders["a"]).eval(), options=EAGER_GRAPH)
    for each in (reference, model):
        each.merge_adapter()
    assert torch.equal(call(model), call(reference))
    assert "merged into the base weights" in lorafx.explain(model).uncompiled
    assert difference(call(model) - base, exact_delta(folders["a"])) < 0.2  # it is quantised with the weights


CAN_BE = {"copied": copy.deepcopy, "pickled": lambda model: pickle.loads(pickle.dumps(model))}
NOT_PICKLED = ("diffusers gguf", *(kind for kind in KINDS if "torchao" in kind))  # nor without lorafx


@pytest.mark.parametrize(
    ("kind", "how"),
    [(kind, "copied") for kind in PEFT_KINDS if kind != "diffusers gguf"]
    + [(kind, "pickled") for kind in PEFT_KINDS if kind not in NOT_PICKLED],
)
def test_loading_and_copying_a_quantised_peft_model(folders, kind, how):
    base = call(build(kind))
    model = PeftModel.from_pretrained(build(kind), folders["a"], adapter_name="a").eval()
    lorafx.compile(model, mode="eager")
    model.lora.load("b", folders["b"])
    model.lora.use("b")
    want = exact_delta(folders["b"])
    assert difference(call(model) - base, want) <= 1e-5
    other = CAN_BE[how](model)
    model.lora.use("a")
    assert difference(call(other) - base, want) <= 1e-5
    assert type(other.get_base_model().attn.q_proj) is type(model.get_base_model().attn.q_proj)


def test_nothing_imports_their_packages():
    sources = Path(lorafx.__file__).parent.rglob("*.py")
    pattern = re.compile(r"^\s*(import|from) (bitsandbytes|torchao|gptqmodel|peft\.tuners\.lora\.(bnb|torchao))", re.M)
    assert not [path.name for path in sources if pattern.search(path.read_text(encoding="utf-8"))]
