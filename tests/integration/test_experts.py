"""LoRA on the experts of a mixture (PEFT's ``target_parameters``), against plain PEFT, row by row."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter

import lorafx

from .models import EAGER_GRAPH, FAMILIES, assert_close, config, difference, run, tokens

NAMES = ["mixtral", "qwen3_moe"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
COMMON = {"lora_dropout": 0.0, "target_parameters": EXPERTS}
ADAPTERS = {
    "a": {"r": 4, "target_modules": ["q_proj", "v_proj"], **COMMON},
    "b": {
        "r": 3,
        "lora_alpha": 5,
        "rank_pattern": {"mlp.experts.down_proj": 5},
        "alpha_pattern": {"mlp.experts.gate_up_proj": 9},
        "target_modules": ["o_proj"],
        **COMMON,
    },
    "c": {"r": 2, "use_rslora": True, "target_modules": [], **COMMON},
    "plain": {"r": 4, "target_modules": ["q_proj"]},
}
MIXED = ["b", None, "a", "plain", "c"]
INPUTS = {"input_ids": tokens(5)}


@pytest.fixture(scope="module", params=NAMES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def folders(family, tmp_path_factory):
    """Adapters that PEFT made and saved, signed and not small."""
    found = {}
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        model = get_peft_model(family.build(2), config(**fields))
        generator = torch.Generator().manual_seed(seed)
        for parameter_name, parameter in sorted(model.named_parameters()):
            if "lora_" in parameter_name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        found[name] = str(tmp_path_factory.mktemp("experts") / name)
        model.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def wanted(family, folders):
    """What each adapter adds, by PEFT alone: that is the only way in which PEFT can run them."""
    base = run(family.build(2), INPUTS)
    deltas = {}
    for name, folder in folders.items():
        deltas[name] = run(PeftModel.from_pretrained(family.build(2), folder).eval(), INPUTS) - base
        assert deltas[name].norm() > 0.01 * base.norm()
    return base, {**deltas, None: torch.zeros_like(base)}


def compiled(family, folders, names=("a", "b", "c", "plain"), **arguments):
    arguments.setdefault("options", EAGER_GRAPH)
    torch._dynamo.reset()
    return lorafx.compile(family.build(2), {name: folders[name] for name in names}, **arguments)


def check_rows(got, names, wanted):
    base, deltas = wanted
    for row, name in enumerate(names):
        if name is None:
            assert_close(got[row], base[row], 1e-6)
        else:
            assert_close(got[row] - base[row], deltas[name][row])


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_files_on_a_plain_model_are_pefts_row_by_row(family, folders, wanted, mode):
    model = compiled(family, folders, **({"mode": "eager"} if mode == "eager" else {}))
    for name in (*ADAPTERS, None):
        model.lora.use(name)
        check_rows(run(model, INPUTS), [name] * 5, wanted)
    idle = run(model, INPUTS)
    for names in (MIXED, MIXED[::-1]):
        got = run(model, INPUTS, names)
        check_rows(got, names, wanted)
        row = names.index(None)
        assert torch.equal(got[row], idle[row])
    report = lorafx.explain(model)
    assert not report.skipped
    assert {group.branches[0].name for group in report.groups if group.op == "expert_site"} == {
        f"model.layers.{layer}.{name}" for layer in (0, 1) for name in EXPERTS
    }
    if mode == "graph":
        assert (len(report.graphs), report.recompiles, report.retraces) == (1, 0, [])
        assert report.graphs[0].passes.after["lorafx.expert_site"] == 4


def test_weighted_sum_and_few_tokens(family, folders, wanted):
    model = compiled(family, folders, mode="eager")
    base, deltas = wanted
    few = {"input_ids": INPUTS["input_ids"][:1, :1]}  # fewer pairs than experts: another way of computing them
    plain = run(family.build(2), few)
    for name in ("a", "b"):
        want = run(PeftModel.from_pretrained(family.build(2), folders[name]).eval(), few)
        assert_close(run(model, few, [name]) - plain, want - plain)
    half = PeftModel.from_pretrained(family.build(2), folders["a"]).eval()
    for module in half.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(0.5)
    model.lora.use({"a": 0.5})
    assert_close(run(model, INPUTS) - base, run(half, INPUTS) - base)
    assert difference(run(model, INPUTS) - base, deltas["a"]) > 0.1


def test_loading_and_replacing_compile_nothing(family, folders, wanted):
    model = compiled(family, folders, ["a"], max_adapters=3, max_rank=8, target_modules=["q_proj", "v_proj", "o_proj"])
    run(model, INPUTS)
    model.lora.load("b", folders["b"])
    model.lora.load("c", folders["c"])
    names = ["b", None, "a", "c", "b"]
    check_rows(run(model, INPUTS, names), names, wanted)
    with pytest.raises(lorafx.CapacityError, match="max_adapters is 3"):
        model.lora.load("plain", folders["plain"])
    model.lora.use("b")
    model.lora.replace("a", folders["c"])
    model.lora.unload("c")
    model.lora.load("c", folders["a"])
    check_rows(run(model, INPUTS, ["c", "a", "b", None, "a"]), ["a", "c", "b", None, "c"], wanted)
    check_rows(run(model, INPUTS), ["b"] * 5, wanted)
    report = lorafx.explain(model)
    assert (len(report.graphs), report.recompiles, report.retraces) == (1, 0, [])
    large = state_of(family, rank=30)
    with pytest.raises(lorafx.CapacityError, match="has rank 30"):
        model.lora.replace("a", large)
    assert [row["rank"] for row in model.lora.table()] == ["2", "3, 5", "4"]


def state_of(family, rank):
    """An adapter like "a", of another rank."""
    model = get_peft_model(family.build(2), config(**{**ADAPTERS["a"], "r": rank}))
    return get_peft_model_state_dict(model), model.peft_config["default"]


def test_first_adapter_on_experts_is_one_retrace(family, folders, wanted):
    model = compiled(family, folders, ["plain"])
    run(model, INPUTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.lora.load("a", folders["a"])
    text = lorafx.explain(model).retraces[0]
    assert "room for weights of experts and routers comes with an adapter of them given to lorafx.compile" in text
    assert "target_modules reserves room there" in text  # for v_proj
    check_rows(run(model, INPUTS, ["a", "plain", None, "a", "a"]), ["a", "plain", None, "a", "a"], wanted)
    assert len(lorafx.explain(model).retraces) == 1


def test_room_for_experts_is_not_called_one_of_target_modules(family, folders):
    model = compiled(family, folders, ["plain"])
    run(model, INPUTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.lora.load("c", folders["c"])
    (text,) = lorafx.explain(model).retraces
    assert re.search(r"experts\.\w+ \(room for weights of experts and routers comes with an adapter of them", text)
    assert "target_modules" not in text


@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[1:]], ids=["both weights", "one weight"])
@pytest.mark.parametrize("on_peft", [False, True], ids=["plain", "PeftModel"])
def test_a_state_dict_alone_does_not_say_which_weights(family, folders, parameters, on_peft):
    made = get_peft_model(family.build(2), config(**{**ADAPTERS["a"], "target_parameters": parameters}))
    state = get_peft_model_state_dict(made)
    model = compiled(family, folders, ["plain"], mode="eager")
    if on_peft:
        plain = PeftModel.from_pretrained(family.build(2), folders["plain"], adapter_name="plain").eval()
        model = lorafx.compile(plain, mode="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(lorafx.AdapterFormatError, match=r"(?s)which of their weights.*\(state_dict, config\)"):
            model.lora.load("x", state)
    assert model.lora.names == ["plain"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.lora.load("x", (state, made.peft_config["default"]))


def test_uncompile_and_copies(family, folders, wanted):
    model = compiled(family, folders, ["a", "b"], mode="eager")
    twin = copy.deepcopy(model)
    twin.lora.replace("a", folders["b"])
    check_rows(run(twin, INPUTS, ["a", None, "b", "b", "a"]), ["b", None, "b", "b", "b"], wanted)
    check_rows(run(model, INPUTS, ["a", None, "b", "b", "a"]), ["a", None, "b", "b", "a"], wanted)
    lorafx.uncompile(model)
    assert torch.equal(run(model, INPUTS), run(family.build(2), INPUTS))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_generate_mixed(family, folders, mode):
    """Token by token, and by the scores of each: PEFT runs one adapter at a time."""
    model = compiled(family, folders, ["a", "b"], **({"mode": "eager"} if mode == "eager" else {}))
    ids = INPUTS["input_ids"][:3]
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    base = family.build(2).generate(ids, **settings)
    for names in (["b", None, "a"], ["a", "b", None]):
        got = model.generate(ids, adapter_names=names, **settings)
        changed = 0
        for row, name in enumerate(names):
            alone = family.build(2)
            if name is not None:
                alone = PeftModel.from_pretrained(alone, folders[name]).eval()
            want = alone.generate(input_ids=ids, **settings)
            assert torch.equal(got.sequences[row], want.sequences[row])
            for mine, theirs in zip(got.logits, want.logits, strict=True):
                assert_close(mine[row], theirs[row])
            changed += not torch.equal(want.sequences[row], base.sequences[row])
        assert changed


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_peft_models_in_place(family, folders, wanted, mode, tmp_path):
    model = PeftModel.from_pretrained(family.build(2), folders["a"], adapter_name="a")
    model.load_adapter(folders["b"], "b")
    model.eval()
    types = {type(module) for module in model.modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch._dynamo.reset()
    arguments = {"mode": "eager"} if mode == "eager" else {"options": EAGER_GRAPH}
    lorafx.compile(model, max_adapters=3, **arguments)
    assert not lorafx.explain(model).skipped
    for name in ("a", "b", "a"):
        model.set_adapter(name)
        check_rows(run(model, INPUTS), [name] * 5, wanted)
    names = ["b", None, "a", "b", "a"]
    check_rows(run(model, INPUTS, ["__base__" if name is None else name for name in names]), names, wanted)
    with model.disable_adapter():
        check_rows(run(model, INPUTS), [None] * 5, wanted)
    model.load_adapter(folders["c"], "c")
    model.set_adapter("c")
    check_rows(run(model, INPUTS), ["c"] * 5, wanted)
    model.delete_adapter("c")
    model.set_adapter("b")
    check_rows(run(model, INPUTS), ["b"] * 5, wanted)
    report = lorafx.explain(model)
    if mode == "graph":
        assert (len(report.graphs), report.recompiles, report.retraces) == (1, 0, [])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(family.build(2), str(tmp_path / "b")).eval()
    check_rows(run(again, INPUTS), ["b"] * 5, wanted)
    model.merge_adapter(["b"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = run(model, INPUTS)
    assert_close(merged - wanted[0], wanted[1]["b"], 1e-4)
    with pytest.raises(lorafx.LorafxError, match="merge"):
        run(model, INPUTS, ["a"] * 5)
    model.unmerge_adapter()
    model.set_adapter("a")
    got = run(model, INPUTS)
    assert_close(got - wanted[0], wanted[1]["a"], 1e-4)
    lorafx.uncompile(model)
    assert {type(module) for module in model.modules()} == types
    assert_close(run(model, INPUTS) - wanted[0], wanted[1]["a"], 1e-4)


def test_hotswap_and_edits_are_seen(family, folders, wanted):
    model = PeftModel.from_pretrained(family.build(2), folders["a"], adapter_name="a").eval()
    torch._dynamo.reset()
    lorafx.compile(model, options=EAGER_GRAPH)
    run(model, INPUTS)
    same = get_peft_model(family.build(2), config(**ADAPTERS["a"], lora_alpha=20)).eval()
    want = run(same, INPUTS)
    folder = folders["a"] + "-swapped"
    same.save_pretrained(folder)
    hotswap_adapter(model, folder, adapter_name="a")
    assert_close(run(model, INPUTS) - wanted[0], want - wanted[0])
    with torch.no_grad():
        for each in (model, same):
            for name, parameter in each.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(2)
    assert_close(run(model, INPUTS) - wanted[0], run(same, INPUTS) - wanted[0])
    report = lorafx.explain(model)
    assert (len(report.graphs), report.recompiles, report.retraces) == (1, 0, [])


def test_gradients_are_pefts(family, folders):
    model = PeftModel.from_pretrained(family.build(2), folders["a"], adapter_name="a", is_trainable=True)
    reference = PeftModel.from_pretrained(family.build(2), folders["a"], adapter_name="a", is_trainable=True)
    lorafx.compile(model, mode="eager")

    def gradients(each, choose):
        each.zero_grad()
        choose(each).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in each.named_parameters() if p.grad is not None}

    want = gradients(reference, lambda each: each(**INPUTS))
    assert any("experts" in name for name in want)
    for choose in (lambda each: each(**INPUTS), lambda each: each(**INPUTS, adapter_names=["a"] * 5)):
        got = gradients(model, choose)
        assert got.keys() == want.keys()
        for name in want:
            assert_close(got[name], want[name], 1e-4)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_is_one_graph(family, folders, checkpointed):
    """PEFT's own forward adds B A to the weights, and breaks Dynamo's graph at each layer."""
    torch._dynamo.reset()
    fields = {**ADAPTERS["b"], "target_modules": ["q_proj"], "target_parameters": [*EXPERTS, "mlp.gate.weight"]}
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        model = get_peft_model(family.build(2), config(**{**fields, "init_lora_weights": False}))
        model.add_adapter("other", config(**{**fields, "r": 2, "init_lora_weights": False}))
        models.append(model)
    model, reference = models
    lorafx.compile(model, options=EAGER_GRAPH)
    if checkpointed:
        for each in models:
            each.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    for name in ("default", "other"):
        found = []
        for each in models:
            each.train()
            each.set_adapter(name)
            each.zero_grad()
            logits = each(**INPUTS, use_cache=False).logits
            logits.square().mean().backward()
            found.append({name: p.grad.clone() for name, p in each.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys()
        for part in ("experts", "mlp.gate", "q_proj"):
            assert any(part in key for key in found[1])
        for key in found[1]:
            assert_close(found[0][key], found[1][key], 1e-4)
    if checkpointed:  # Dynamo enters no TorchFunctionMode in such layers, which run as PEFT runs them
        return
    report = lorafx.explain(model)
    assert len(report.graphs) == 2  # one for each adapter, whose parameters it reads
    bodies = sum((graph.passes.after for graph in report.graphs), Counter())
    assert (bodies["lorafx.expert_lora"], bodies["lorafx.fused_lora"]) == (8, 8)
    assert len({branch.name for group in report.groups for branch in group.branches}) == 8
    assert not report.skipped
    model.eval()
    with model.disable_adapter(), reference.disable_adapter():
        assert_close(model(**INPUTS).logits, reference(**INPUTS).logits, 1e-5)


def test_gradients_of_inputs_and_base_weights(family, folders):
    """Of a plain model, whose adapters have none."""
    model = compiled(family, folders, ["a", "b"])
    reference = PeftModel.from_pretrained(family.build(2), folders["a"]).eval()
    embedded = reference.get_input_embeddings()(INPUTS["input_ids"]).detach()
    found = []
    for each, extra in ((model, {"adapter_names": ["a"] * 5}), (reference, {})):
        x = embedded.clone().requires_grad_()
        each(inputs_embeds=x, **extra).logits.square().mean().backward()
        found.append(x.grad)
    assert_close(*found, tolerance=1e-4)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(lorafx.UnsupportedModelError, match="checkpoint"):
        model(**INPUTS, adapter_names=["a"] * 5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_other_implementations_of_experts(implementation, folders, wanted, family):
    model = family.build(2)
    model.set_experts_implementation(implementation)
    lorafx.compile(model, {name: folders[name] for name in ("a", "b")}, mode="eager")
    names = ["a", None, "b", "b", "a"]
    check_rows(run(model, INPUTS, names), names, wanted)


def test_bf16_is_as_near_as_peft(folders, family):
    truth = PeftModel.from_pretrained(family.build(2, torch.bfloat16), folders["b"]).eval()
    truth.get_base_model().set_experts_implementation("eager")
    plain = family.build(2, torch.bfloat16)
    plain.set_experts_implementation("eager")
    want = run(truth.double(), INPUTS) - run(plain.double(), INPUTS)
    theirs = run(PeftModel.from_pretrained(family.build(2, torch.bfloat16), folders["b"]).eval(), INPUTS)
    model = lorafx.compile(family.build(2, torch.bfloat16), folders["b"], mode="eager")
    base = run(plain.double(), INPUTS)
    assert difference(run(model, INPUTS) - base, want) <= 1.25 * difference(theirs - base, want)


def test_what_is_not_known_is_refused_by_name(family, folders, tmp_path):
    """Experts with a forward of their own."""
    model = family.build(2)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    vars(experts)["forward"] = experts.forward
    with pytest.raises(lorafx.AdapterFormatError, match="another forward"):
        lorafx.compile(model, folders["a"], mode="eager")


def test_weights_that_were_read_go_onto_a_peft_model(family, folders, wanted):
    weights = compiled(family, folders, ["a"], mode="eager").lora.read(folders["b"])
    model = PeftModel.from_pretrained(family.build(2), folders["a"], adapter_name="a").eval()
    lorafx.compile(model, mode="eager")
    model.lora.load("b", weights)
    check_rows(run(model, INPUTS, ["a", "b", "__base__", "b", "a"]), ["a", "b", None, "b", "a"], wanted)
    other = get_peft_model(
        family.build(2), config(**{**COMMON, "target_modules": [], "target_parameters": EXPERTS[:1]})
    )
    with pytest.raises(lorafx.AdapterMismatchError, match="same weights only"):
        model.lora.load("c", (get_peft_model_state_dict(other), other.peft_config["default"]))
    check_rows(run(model, INPUTS, ["b"] * 5), ["b"] * 5, wanted)


def test_store_brings_them_in(family, folders, wanted):
    store = lorafx.AdapterStore({name: folders[name] for name in ("a", "b", "c")})
    model = lorafx.compile(family.build(2), store, max_adapters=2, mode="eager")
    for names in (["a", "b", None, "a", "b"], ["c", None, "a", "c", "a"], ["b", "b", "c", None, "c"]):
        check_rows(run(model, INPUTS, names), names, wanted)


def test_double_precision(family, folders):
    def build():
        model = family.build(2, torch.float64)
        model.set_experts_implementation("eager")  # the only one that takes it
        return model

    base = run(build(), INPUTS)
    want = run(PeftModel.from_pretrained(build(), folders["a"]).double().eval(), INPUTS) - base
    model = lorafx.compile(build(), folders["a"], mode="eager")
    assert_close(run(model, INPUTS) - base, want, 1e-7)
