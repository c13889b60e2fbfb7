"""A compiled model in training: gradients, draws and optimizer steps are those of plain PEFT.

The rewritten graphs run as they are, so the same seed draws the same masks. Where the last bits may differ, both are
held against float64: lorafx is no further from it than PEFT is.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import lorafx
from tests.integration.models import EAGER_GRAPH, LLAMA, difference, run, tokens

IDS = tokens(3)
FIELDS = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
SMALL = {**FIELDS, "r": 2, "target_modules": ["q_proj", "v_proj"]}
LAYERS = 1
GROUPS = 4 * LAYERS  # q + k + v, o, gate + up, down


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def plain_peft(dtype=torch.float32, autocast_adapter_dtype=True, **fields):
    base = LLAMA.build(LAYERS, dtype=dtype)
    base.config.use_cache = False
    model = get_peft_model(base, LoraConfig(**{**FIELDS, **fields}), autocast_adapter_dtype=autocast_adapter_dtype)
    return model.train()


def pair(dtype=torch.float32, autocast_adapter_dtype=True, **fields):
    """Compiled, and plain PEFT with the same weights."""
    reference = plain_peft(dtype, autocast_adapter_dtype, **fields)
    return lorafx.compile(copy.deepcopy(reference), options=EAGER_GRAPH), reference


def backward(model, context=nullcontext, seed=3, **inputs):
    """The loss, and every gradient by name."""
    model.zero_grad()
    torch.manual_seed(seed)
    with context():
        loss = model(input_ids=IDS, labels=IDS, **inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, reference, bound=2e-5, **arguments):
    (loss, got), (expected, want) = backward(model, **arguments), backward(reference, **arguments)
    assert difference(loss, expected) <= 1e-6
    assert got.keys() == want.keys()
    assert any("lora_A" in name for name in want)
    for name in want:
        assert got[name].dtype == want[name].dtype
        assert difference(got[name], want[name]) <= bound, name
    return got


def assert_no_worse(model, reference, **arguments):
    """All gradients together, against float64."""
    _, exact = backward(copy.deepcopy(reference).double())

    def error(grads):
        assert grads.keys() == exact.keys()
        return sum((grads[k].double() - exact[k]).norm() ** 2 for k in exact) ** 0.5

    (_, got), (_, want) = backward(model, **arguments), backward(reference, **arguments)
    assert {name: grad.dtype for name, grad in got.items()} == {name: grad.dtype for name, grad in want.items()}
    assert error(got) <= 1.25 * error(want)


def fused(model):
    """(fused_lora, routed_lora) of each graph."""
    after = [graph.passes.after for graph in lorafx.explain(model).graphs]
    return [(ops["lorafx.fused_lora"], ops["lorafx.routed_lora"]) for ops in after]


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def test_fused_without_dropout_and_again_for_inference():
    """One graph for training, one for calls without gradients, however often they alternate and weights change."""
    model, reference = pair()
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (model, reference)
    ]
    for _ in range(3):
        assert_same(model.train(), reference.train(), 2e-4)
        for optimizer in optimizers:
            optimizer.step()
        assert difference(run(model.eval(), {"input_ids": IDS}), run(reference.eval(), {"input_ids": IDS})) <= 1e-5
    assert fused(model) == [(GROUPS, 0), (0, GROUPS)]
    report = lorafx.explain(model)
    assert report.recompiles == 1  # the second of them
    assert [graph.recompiled is None for graph in report.graphs] == [True, False]
    assert f"recompiled: {report.graphs[1].recompiled.splitlines()[0]}" in str(report)
    assert report.skipped == []
    before, after = report.graphs[0].passes.before, report.graphs[0].passes.after
    assert before["linear"] - after["linear"] == 2 * 7 * LAYERS
    assert before["lorafx.fused_lora"] == before["lorafx.branch"] == after["lorafx.branch"] == 0


def test_dropout_is_peft_s_own():
    """Nothing is fused, each branch draws its mask, and the generator is left where eager leaves it."""
    model, reference = pair(lora_dropout=0.3)
    assert_same(model, reference, seed=1)
    state = torch.get_rng_state()  # as the reference has left it
    backward(model, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    (first, _), (second, _) = backward(model, seed=1), backward(model, seed=2)
    assert first != second
    assert fused(model) == [(0, 0)]
    assert {skipped.reason.partition(":")[0] for skipped in lorafx.explain(model).skipped} == {"dropout is active"}
    run(model.eval(), {"input_ids": IDS})
    assert fused(model) == [(0, 0), (0, GROUPS)]


def test_gradient_checkpointing():
    """Layers are computed again in the backward, and fused in both. With dropout: see ``test_trainer``."""
    model, reference = pair()
    for each in (model, reference):
        each.enable_input_require_grads()
        each.gradient_checkpointing_enable({"use_reentrant": True})  # which Dynamo takes for False
    assert_same(model, reference)
    (layers,) = [g.passes for g in lorafx.explain(model).graphs if g.passes.after["tag_activation_checkpoint"]]
    assert layers.after["lorafx.fused_lora"] == GROUPS
    assert layers.skipped == []
    assert layers.proved == sum(len(group.branches) for group in layers.groups)  # in the bodies, too


def test_accumulated_gradients():
    model, reference = pair()
    for each in (model, reference):
        for seed in range(3):
            ids = tokens(2, seed=seed)
            (each(input_ids=ids, labels=ids).loss / 3).backward()
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        if theirs.requires_grad:
            assert difference(mine.grad, theirs.grad) <= 2e-5, name
    assert fused(model) == [(GROUPS, 0)]


BF16 = {
    "autocast": ({}, bf16),
    "bf16 base": ({"dtype": torch.bfloat16}, nullcontext),
    "bf16": ({"dtype": torch.bfloat16, "autocast_adapter_dtype": False}, nullcontext),
}


@pytest.mark.parametrize(("arguments", "context"), BF16.values(), ids=BF16.keys())
def test_bf16(arguments, context):
    model, reference = pair(**arguments)
    assert_no_worse(model, reference, context=context)
    assert fused(model) == [(GROUPS, 0)]


def test_scaled_gradients_of_float16():
    """torch.amp as it is used by hand: autocast, a scaler, clipping."""
    losses = []
    for model in pair():
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer, scaler = torch.optim.AdamW(trained, lr=1e-2), torch.amp.GradScaler("cpu")
        for _ in range(3):
            with torch.autocast("cpu", torch.float16):
                loss = model(input_ids=IDS, labels=IDS).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained, 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-3)
    assert losses[2] < losses[0]


def test_one_adapter_of_several_is_trained():
    model, reference = pair()
    torch.manual_seed(5)
    reference.add_adapter("second", LoraConfig(**SMALL))
    model.add_adapter("second", LoraConfig(**SMALL))
    model.load_state_dict({k: v for k, v in reference.state_dict().items() if "second" in k}, strict=False)
    for each in (model, reference):
        each.set_adapter("second")
    got = assert_same(model, reference)
    assert all(".second." in name for name in got)
    assert fused(model) == [(LAYERS, GROUPS)]  # layers without it run the bank's op, where a switch costs nothing
    for each in (model, reference):
        each.base_model.set_adapter(["default", "second"])
    got = assert_same(model, reference)
    assert {name.split(".")[-2] for name in got} == {"default", "second"}


def test_what_lorafx_chose_is_trained():
    """``model.lora.use`` and ``adapter_names`` over weights that are trained: eagerly, every gradient its own."""
    model, reference = pair()
    for each in (model, reference):
        torch.manual_seed(5)
        each.add_adapter("second", LoraConfig(**SMALL))
        for name, parameter in each.named_parameters():
            parameter.requires_grad_("lora_" in name)
    model.lora.use("second")
    reference.set_adapter("second")
    (_, got), (_, want) = backward(model), backward(reference)
    assert all(difference(got[name], want[name]) <= 2e-5 for name in want)
    model.lora.use(None)
    assert not model(input_ids=IDS, labels=IDS).loss.requires_grad
    _, rows = backward(model, adapter_names=["default", None, "default"])
    assert any(grad.any() for name, grad in rows.items() if ".default." in name)
    assert not any(grad.any() for name, grad in rows.items() if ".second." in name)


def test_modules_to_save_are_trained_beside_it():
    model, reference = pair(modules_to_save=["lm_head"])
    got = assert_same(model, reference)
    assert "base_model.model.lm_head.modules_to_save.default.weight" in got
    assert fused(model) == [(GROUPS, 0)]
    assert lorafx.explain(model).skipped == []


def test_embeddings_are_trained_beside_it():
    """Their branches are no linear layers, and stay PEFT's."""
    model, reference = pair(target_modules=["embed_tokens", "q_proj"])
    got = assert_same(model, reference)
    assert any("lora_embedding_A" in name for name in got)
    assert fused(model) == [(LAYERS, 0)]


def test_adapters_from_files_are_constants(tmp_path):
    """A plain model: a backward reaches what else wants gradients, through the adapters, and never these."""
    reference = plain_peft()
    reference.save_pretrained(tmp_path)
    model = lorafx.compile(LLAMA.build(LAYERS), {"a": tmp_path}, options=EAGER_GRAPH).train()
    assert not any("lora" in name for name, _ in model.named_parameters())
    for parameter in reference.parameters():
        parameter.requires_grad_(True)
    for each in (model, reference):
        each.config.use_cache = False
    names = {
        name: name.replace("base_model.model.", "").replace(".base_layer", "")
        for name, _ in reference.named_parameters()
    }
    (loss, got), (expected, want) = backward(model), backward(reference)
    assert difference(loss, expected) <= 1e-6
    assert got.keys() == {names[name] for name in want if "lora" not in name}
    assert all(difference(got[names[name]], want[name]) <= 2e-5 for name in want if "lora" not in name)
    model.requires_grad_(False)
    assert not model(input_ids=IDS, labels=IDS).loss.requires_grad


def test_names_of_a_call_and_gradient_checkpointing(tmp_path):
    """Compiled, a backward after the call has its routing still; run eagerly it has not, and that is refused."""
    plain_peft(**SMALL).save_pretrained(tmp_path)
    names = ["a", None, "a"]

    def model(checkpointing, **arguments):
        made = lorafx.compile(LLAMA.build(LAYERS), {"a": tmp_path}, **arguments).train()
        made.config.use_cache = False
        if checkpointing:
            made.gradient_checkpointing_enable({"use_reentrant": False})
        return made

    (_, want), (_, got) = (backward(model(on, options=EAGER_GRAPH), adapter_names=names) for on in (False, True))
    assert all(difference(got[name], want[name]) <= 1e-5 for name in want)
    eager = model(True, mode="eager")
    with pytest.raises(
        lorafx.UnsupportedModelError, match=r"gradient checkpointing and runs eagerly.*model\.lora\.use"
    ):
        backward(eager, adapter_names=names)
    eager.lora.use(names)
    _, got = backward(eager)
    assert all(difference(got[name], want[name]) <= 1e-5 for name in want)
    with torch.no_grad():
        eager(input_ids=IDS, adapter_names=names)


LATE = {**SMALL, "alora_invocation_tokens": [int(IDS[0, 2])]}


def test_alora_and_gradient_checkpointing(tmp_path):
    """A layer that runs eagerly is computed again when the prompt of the call is gone: refused; PEFT's own on a
    PeftModel, which sets its hooks anew; compiled, the graph has the routing still."""
    reference = plain_peft(**LATE)
    reference.save_pretrained(tmp_path)

    def gradients(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" not in name)
        model.train().config.use_cache = False
        model.gradient_checkpointing_enable({"use_reentrant": False})
        _, found = backward(model)
        return {name.removeprefix("base_model.model.").replace(".base_layer", ""): g for name, g in found.items()}

    want = gradients(reference)
    adapted = lorafx.compile(copy.deepcopy(reference), mode="eager")
    plain = lorafx.compile(LLAMA.build(LAYERS), {"late": tmp_path}, options=EAGER_GRAPH)
    plain.lora.use("late")
    without = gradients(LLAMA.build(LAYERS))
    for got in (gradients(adapted), gradients(plain)):
        assert got.keys() == want.keys()
        assert all(difference(got[name], want[name]) <= 2e-5 for name in want)
    assert max(difference(without[name], want[name]) for name in want) > 1e-2  # the adapter makes a difference
    eager = lorafx.compile(LLAMA.build(LAYERS), {"late": tmp_path}, mode="eager")
    eager.lora.use("late")
    with pytest.raises(lorafx.UnsupportedModelError, match="where its aLoRA adapter begins"):
        gradients(eager)


def test_copied_modules_in_checkpointed_layers_through_inductor(tmp_path):
    """What such a module's marker does is computed as outside a graph, and Inductor can't trace that."""
    reference = plain_peft(**{**SMALL, "modules_to_save": ["up_proj"]})
    reference.save_pretrained(tmp_path)
    model = lorafx.compile(LLAMA.build(LAYERS), {"a": tmp_path}).train()
    model.lora.use("a")
    found = []
    for each in (reference, model):
        each.requires_grad_(False).get_input_embeddings().requires_grad_(True)
        each.config.use_cache = False
        each.gradient_checkpointing_enable({"use_reentrant": False})
        loss, gradients = backward(each)
        found.append((loss, *gradients.values()))
    for want, got in zip(*found, strict=True):
        assert difference(got, want) <= 2e-5


class Broken(nn.Module):
    """Dynamo compiles what each layer's hook does as a frame of its own, with the layer's number as a symbol."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x)
        return x


@pytest.mark.parametrize("options", [EAGER_GRAPH, {"lowering": "aten"}], ids=["graph", "inductor"])
def test_a_backward_after_the_call_has_its_routing(options, tmp_path):
    """Also where hooks are graphs of their own, and no pass knows which layer's they are."""
    for name in "ab":
        torch.manual_seed(ord(name))
        config = LoraConfig(r=2, target_modules=["0", "1", "2"], init_lora_weights=False)
        get_peft_model(Broken(), config).save_pretrained(tmp_path / name)
    x = torch.randn(3, 4, 8)
    grads = []
    for arguments in ({"mode": "eager"}, {"options": options}):
        model = lorafx.compile(Broken(), {name: tmp_path / name for name in "ab"}, **arguments)
        for names in (["a", "b", None], ["b", "a", "b"], [None, None, None]):
            given = x.clone().requires_grad_()
            model(given, adapter_names=names).square().sum().backward()
            grads.append(given.grad)
    assert any("lorafx.site" in graph.passes.after for graph in lorafx.explain(model).graphs)
    for want, got in zip(grads[:3], grads[3:], strict=True):
        assert difference(got, want) <= 1e-6


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_torch_compile_with_the_backend(dropout):
    reference = plain_peft(lora_dropout=dropout)
    model = copy.deepcopy(reference)
    compiled = torch.compile(model, backend="lorafx", options=EAGER_GRAPH)
    got = []
    for each in (compiled, reference):
        torch.manual_seed(4)
        each(input_ids=IDS, labels=IDS).loss.backward()
        got.append([p.grad for p in each.parameters() if p.grad is not None])
    assert all(difference(mine, theirs) <= 2e-5 for mine, theirs in zip(*got, strict=True))
    assert fused(model) == [(0 if dropout else GROUPS, 0)]


def test_the_training_graph_is_no_larger():
    """Ops of forward and backward together, as AOTAutograd traces them: as many products, less of the rest."""

    def count(backend):
        graphs = []

        def keep(gm, inputs):
            graphs.append(gm)
            return gm.forward

        compiler = aot_autograd(fw_compiler=keep, bw_compiler=keep)
        torch._dynamo.reset()
        model = plain_peft().get_base_model()
        torch.compile(model, backend=backend(compiler))(input_ids=IDS, labels=IDS).loss.backward()
        nodes = [node for gm in graphs for node in gm.graph.nodes if node.op == "call_function"]
        products = sum(node.target in PRODUCTS for node in nodes)
        views = sum(node.target in VIEWS for node in nodes)
        return products, len(nodes) - products - views

    def after_passes(compiler):
        def backend(gm, inputs):
            gm, report = lorafx.fuse(gm)
            assert len(report.groups) == GROUPS
            return compiler(gm, inputs)

        return backend

    (ours, our_rest), (theirs, their_rest) = count(after_passes), count(lambda compiler: compiler)
    assert ours == theirs
    assert our_rest < their_rest


aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default}
VIEWS = {aten.view.default, aten.t.default, aten.permute.default, aten.reshape.default, aten._unsafe_view.default}
