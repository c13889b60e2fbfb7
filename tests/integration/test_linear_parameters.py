"""LoRA on a parameter that a module uses as a linear layer's weight, as routers do: seen, or left and named."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from lorafx.experts import why_not

from .models import EAGER_GRAPH, FAMILIES, assert_close, config, difference, run, tokens

NAMES = ["a", None, "b", "a"]


class Router(nn.Module):
    """A weight, a bias and a buffer, and a forward that the tests replace."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6))
        self.register_buffer("table", torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def chosen(self, x):
    """As transformers' routers do it."""
    x = x.reshape(-1, x.shape[-1])
    logits = F.linear(x.to(self.weight.dtype), self.weight, self.bias)
    return logits, *torch.topk(logits.softmax(-1), 2)


KNOWN = {
    "plain": lambda self, x: F.linear(x, self.weight),
    "bias": lambda self, x: F.linear(x, self.weight, self.bias),
    "by name": lambda self, x: F.linear(input=x, weight=self.weight, bias=None),
    "casts": lambda self, x: F.linear(x.type(torch.float32), self.weight.type(torch.float32)),
    "cast twice": lambda self, x: F.linear(x.double(), self.weight.to(torch.float16).double()),
    "type_as": lambda self, x: F.linear(x, self.weight.type_as(x)),
    "asks for its dtype": lambda self, x: F.linear(x.to(self.weight), self.weight) * self.weight.shape[0],
    "another layer beside it": lambda self, x: F.linear(x, self.weight) + F.linear(x, self.table),
    "three dimensions": lambda self, x: F.linear(x.reshape(x.shape[0] * x.shape[1], x.shape[2]), self.weight),
    "chosen": chosen,
    "more arguments": lambda self, x, mask=None, **kwargs: F.linear(x, self.weight),
}
UNKNOWN = {
    "not used": lambda self, x: F.linear(x, self.table),
    "used twice": lambda self, x: F.linear(x, self.weight) + F.linear(x * 2, self.weight),
    "scaled": lambda self, x: F.linear(x, self.weight * 2),
    "normalised": lambda self, x: F.linear(x, F.normalize(self.weight)),
    "part of it": lambda self, x: F.linear(x, self.weight[:3]),
    "read elsewhere": lambda self, x: F.linear(x, self.weight) + self.weight.sum(),
    "its data": lambda self, x: F.linear(x, self.weight.data),
    "matmul": lambda self, x: x @ self.weight.T,
    "as input": lambda self, x: F.linear(x, self.table) @ F.linear(self.weight, self.weight),
    "written to": lambda self, x: F.linear(x, self.weight.mul_(2)),
    "two inputs": lambda self, x, y: F.linear(x, self.weight) + y,
    "by keyword alone": lambda self, *, x: F.linear(x, self.weight),
    "asks for numbers": lambda self, x: F.linear(x, self.weight) if x.sum() > 0 else x,
    "raises": lambda self, x: F.linear(x[0, 0, 0, 0], self.weight),
    "by its rank": lambda self, x: F.linear(x, self.weight) if x.dim() == 3 else F.linear(x, self.weight * 2),
}


def router(forward):
    return type("Gate", (Router,), {"forward": forward})()


@pytest.mark.parametrize("name", KNOWN)
def test_a_linear_layer_is_seen(name):
    module = router(KNOWN[name])
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert why_not(module, "weight") is None
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_no_linear_layer_is_named(name):
    module = router(UNKNOWN[name])
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert "weight of a Gate (target_parameters), whose products lorafx does not know" in why_not(module, "weight")
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_hooks_do_not_run_and_other_forwards_are_named():
    module = Router()
    called = []
    module.register_forward_hook(lambda *_: called.append(1))
    module.register_forward_pre_hook(lambda *_: called.append(1))
    assert why_not(module, "weight") is None
    assert not called
    vars(module)["forward"] = module.forward
    assert "another forward" in why_not(module, "weight")
    assert "in torch.int32" in why_not(make_integer(Router()), "weight")


def make_integer(module):
    module.weight = nn.Parameter(module.weight.to(torch.int32), requires_grad=False)
    return module


class Block(nn.Module):
    """Two parameters in one module, which read different inputs, beside ordinary layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(8, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, self.up)), self.down.to(x.dtype))


class Model(nn.Module):
    def __init__(self, forward=chosen) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.gate = nn.Linear(8, 8), Block(), router(forward)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.first(x))
        logits, weights, index = self.gate(x)
        flat = logits * torch.zeros_like(logits).scatter(-1, index, weights)
        return self.last(flat.view(*x.shape[:-1], 6))


FIELDS = {
    "a": {"r": 3, "lora_alpha": 5},
    "b": {"r": 4, "use_rslora": True},
}
COMMON = {
    "target_modules": ["first", "last"],
    "target_parameters": ["block.up", "block.down", "gate.weight"],
    "lora_dropout": 0.0,
}
X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def sources():
    """(state dict, config) by name"""
    found = {}
    for seed, name in enumerate(FIELDS):
        model = get_peft_model(Model(), config(**COMMON, **FIELDS[name]))
        fill(model, seed)
        found[name] = get_peft_model_state_dict(model), model.peft_config["default"]
    return found


def fill(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


def on_peft(sources, names=("a", "b")):
    model = get_peft_model(Model(), sources[names[0]][1], adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, sources[name][1])
    for name in names:
        result = model.load_state_dict(
            {key.replace(".weight", f".{name}.weight"): value for key, value in sources[name][0].items()}, strict=False
        )
        assert not result.unexpected_keys
    model.set_adapter(names[0])
    return model.eval()


@pytest.fixture(scope="module")
def wanted(sources):
    """The base's output, and what each adapter adds, by PEFT alone, in double precision."""
    base = Model().double()
    out = {}
    with torch.no_grad():
        plain = base(X.double())
        for name in FIELDS:
            out[name] = on_peft(sources, [name]).double()(X.double()) - plain
            assert out[name].norm() > 0.1 * plain.norm()
    return plain, out


def check(got, names, wanted):
    plain, deltas = wanted
    for row, name in enumerate(names):
        if name is None:
            assert_close(got[row].double(), plain[row], 1e-6)
        else:
            assert_close(got[row].double() - plain[row], deltas[name][row])


HOW = {"graph": {"options": EAGER_GRAPH}, "eager": {"mode": "eager"}}


@pytest.mark.parametrize("how", HOW)
def test_files_on_a_plain_model(sources, wanted, how):
    torch._dynamo.reset()
    original = Model()
    model = lorafx.compile(Model(), sources, max_adapters=2, max_rank=4, **HOW[how])
    with torch.no_grad():
        check(model(X, adapter_names=NAMES), NAMES, wanted)
        for name in ("a", "b", None):
            model.lora.use(name)
            check(model(X), [name] * 4, wanted)
        idle = model(X)
        assert torch.equal(model(X, adapter_names=NAMES)[1], idle[1])
        model.lora.replace("a", sources["b"])
        check(model(X, adapter_names=NAMES), ["b", None, "b", "b"], wanted)
        report = lorafx.explain(model)
        assert not report.skipped
        names = {branch.name for group in report.groups for branch in group.branches}
        assert names == {"first", "last", "block.up", "block.down", "gate.weight"}
        assert {group.op for group in report.groups} == {"routed_lora"}
        assert "first, down, up, gate.weight, last" in repr(model.lora)
        assert "gate.weight" in str(report)
        if how == "graph":
            assert (len(report.graphs), report.recompiles, report.retraces) == (1, 0, [])
            after = report.graphs[0].passes.after
            assert after["lorafx.routed_lora"] == 5
            assert not after["lorafx.site"]
        twin = copy.deepcopy(model)
        check(twin(X, adapter_names=NAMES), ["b", None, "b", "b"], wanted)
        twin.lora.replace("a", model.lora.read(sources["a"]))
        check(twin(X, adapter_names=NAMES), NAMES, wanted)
        assert lorafx.uncompile(model) is model
        assert torch.equal(model(X), original(X))
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.state_dict().keys() == original.state_dict().keys()


@pytest.mark.parametrize("how", HOW)
def test_peft_model_in_place(sources, wanted, how):
    torch._dynamo.reset()
    model = on_peft(sources)
    assert lorafx.compile(model, **HOW[how]) is model
    with torch.no_grad():
        for name in ("b", "a"):
            model.set_adapter(name)
            check(model(X), [name] * 4, wanted)
        with model.disable_adapter():
            check(model(X), [None] * 4, wanted)
        check(model(X, adapter_names=[name or "__base__" for name in NAMES]), NAMES, wanted)
        model.lora.use(NAMES)
        check(model(X), NAMES, wanted)
        assert not lorafx.explain(model).skipped
        lorafx.uncompile(model)
        model.set_adapter("b")
        check(model(X), ["b"] * 4, wanted)
        model.merge_adapter()
        check(model(X), ["b"] * 4, wanted)


@pytest.mark.parametrize("how", HOW)
def test_gradients_are_pefts(sources, how):
    """With one adapter PEFT's own; row by row those of the rows' own adapters."""
    torch._dynamo.reset()
    reference, model = on_peft(sources), lorafx.compile(on_peft(sources), **HOW[how])
    weights = torch.randn(4, 5, 4)
    for each in (reference, model):
        each.set_adapter("b")
        (each(X) * weights).sum().backward()
    want = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert any("gate" in name for name in want)
    got = dict(model.named_parameters())
    for name, gradient in want.items():
        assert_close(got[name].grad, gradient)
    model.zero_grad()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in key)
    model.lora.use(["b", "b", None, None])
    (model(X) * weights).sum().backward()
    rows = on_peft(sources)
    rows.set_adapter("b")
    (rows(X) * weights)[:2].sum().backward()
    for name, parameter in rows.named_parameters():
        if parameter.grad is not None:
            assert_close(got[name].grad, parameter.grad)


def test_the_weight_of_a_linear_layer_as_a_parameter():
    """``target_parameters=["q_proj.weight"]``: PEFT wraps the layer itself."""
    torch._dynamo.reset()
    family = FAMILIES["llama"]
    fields = config(target_modules=["o_proj"], target_parameters=["q_proj.weight"], lora_dropout=0.0)
    reference = get_peft_model(family.build(1), fields).eval()
    fill(reference)
    inputs = {"input_ids": tokens(3)}
    base, want = run(family.build(1), inputs), run(reference, inputs)
    source = get_peft_model_state_dict(reference), fields
    model = lorafx.compile(family.build(1), {"a": source}, options=EAGER_GRAPH)
    got = run(model, inputs, ["a", None, "a"])
    for row in (0, 2):
        assert_close(got[row] - base[row], want[row] - base[row])
    assert_close(got[1], base[1], 1e-6)
    assert lorafx.explain(model).graphs[0].passes.after["lorafx.routed_lora"] == 2


def test_a_layer_adapted_as_one_and_by_its_weight():
    """By two adapters: PEFT takes that one way round; on a plain model each has a site of its own."""
    torch._dynamo.reset()
    sources, want = {}, {}
    fields = {
        "a": {"target_modules": ["last"], "target_parameters": ["first.weight"]},
        "b": {"target_modules": ["first"]},
    }
    with torch.no_grad():
        base = Model()(X)
        for seed, name in enumerate(fields):
            made = get_peft_model(Model(), config(lora_dropout=0.0, **fields[name])).eval()
            fill(made, seed)
            sources[name], want[name] = (get_peft_model_state_dict(made), made.peft_config["default"]), made(X) - base
        model = lorafx.compile(Model(), sources, options=EAGER_GRAPH)
        got = model(X, adapter_names=NAMES)
        both = on_peft(sources)
        lorafx.compile(both, options=EAGER_GRAPH)
        check(got, NAMES, (base, want))
        for name in ("b", "a"):
            both.set_adapter(name)
            assert_close(both(X) - base, want[name])
        other = lorafx.compile(on_peft(sources, ["b"]), options=EAGER_GRAPH)
        with pytest.raises(lorafx.AdapterMismatchError, match=r"'a' can't stand beside the others.*not also targeted"):
            other.lora.load("a", sources["a"])
        assert other.lora.names == ["b"]
        assert_close(other(X) - base, want["b"])


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])  # the second one's router computes in float32
def test_bf16_is_no_further_from_the_truth_than_peft(name, tmp_path):
    """PEFT rounds the sum of weight and delta to bfloat16; here the delta is added to the product."""
    family = FAMILIES[name]
    gate = {"target_modules": ["o_proj"], "target_parameters": ["mlp.gate.weight"], "lora_dropout": 0.0}
    made = get_peft_model(family.build(2), config(**gate))
    fill(made)
    made.save_pretrained(str(tmp_path))
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float32).bfloat16()
    reference = PeftModel.from_pretrained(family.build(2, torch.bfloat16), str(tmp_path)).eval()
    model = lorafx.compile(family.build(2, torch.bfloat16), {"a": str(tmp_path)}, mode="eager")
    exact = copy.deepcopy(reference).double()
    path = "model.layers.1.mlp.gate"
    with torch.no_grad():
        truth = exact.get_base_model().get_submodule(path)(x.double())[0]
        theirs = reference.get_base_model().get_submodule(path)(x)[0]
        got = model.get_submodule(path)(x)[0]
        assert difference(got, family.build(2, torch.bfloat16).get_submodule(path)(x)[0]) > 0.05
    assert difference(got, truth) <= 1.05 * difference(theirs, truth)
    assert difference(got, truth) < 2e-2
