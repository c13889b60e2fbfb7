"""The whole way of a quantised model: a checkpoint, transformers' quantisation, PEFT's choice of layers, generate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lorafx

from .families import Family, _decoder
from .models import EAGER_GRAPH, LLAMA, assert_close, difference, run, save_adapters, with_peft
from .quantised_models import gptqmodel_layer, need

FAMILY = Family(_decoder("Llama", hidden_size=64, intermediate_size=64), LLAMA.inputs, LLAMA.qkv, layers=1)
INPUTS = FAMILY.inputs(3)
TARGETS = {"target_modules": "all-linear"}
# Where the next product rounds its input to 8 or 16 bits, a last bit before it shows after it
LOADED = {"nf4": 5e-3, "8 bits": 5e-3, "torchao": 1e-5, "awq": 5e-2}
ONE_GRAPH = [kind for kind in LOADED if kind != "8 bits"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    FAMILY.build().save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_adapters(FAMILY, tmp_path_factory.mktemp("adapters"), a=TARGETS, b={"r": 7, **TARGETS})


@pytest.fixture
def load(checkpoint, tmp_path):
    return lambda kind: read(kind, checkpoint, tmp_path).eval()


def read(kind: str, checkpoint: Path, other: Path) -> nn.Module:
    if kind == "awq":
        need("gptqmodel", "optimum")
        return AutoModelForCausalLM.from_pretrained(str(awq_checkpoint(other)), dtype=torch.bfloat16, device_map="cpu")
    return AutoModelForCausalLM.from_pretrained(
        str(checkpoint), quantization_config=settings(kind), dtype=torch.float32, device_map="cpu"
    )


def settings(kind: str) -> object:
    if kind == "torchao":
        need("torchao")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    need("bitsandbytes")
    from transformers import BitsAndBytesConfig

    if kind == "8 bits":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def awq_checkpoint(folder: Path) -> Path:
    """As AWQ's tools write it; ``torch_awq`` is the backend that compiles nothing."""
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    model = FAMILY.build()
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and path != "lm_head":
            model.set_submodule(path, gptqmodel_layer(AwqTorchLinear, layer))
    model.save_pretrained(str(folder))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "backend": "torch_awq"}
    config["quantization_config"] |= {"zero_point": True, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rows_of(reference: nn.Module, call: Callable[[], Tensor]) -> Tensor:
    """What PEFT makes of a's row, of one without an adapter, and of b's. Its AWQ layers know no mixed batch."""
    found = {}
    for name in "ab":
        reference.set_adapter(name)
        found[name] = call()
    with reference.disable_adapter():
        return torch.stack([found["a"][0], call()[1], found["b"][2]])


@pytest.mark.parametrize("kind", LOADED)
def test_as_peft_computes_it(kind, load, folders):
    names, short = ["a", "__base__", "b"], {"max_new_tokens": 3, "do_sample": False}
    base, reference = run(load(kind), INPUTS), with_peft(load(kind), folders)
    want = rows_of(reference, lambda: run(reference, INPUTS))
    tokens = rows_of(reference, lambda: reference.generate(**INPUTS, **short))
    graph = {"options": EAGER_GRAPH} if kind in ONE_GRAPH else {"mode": "eager"}
    models = lorafx.compile(with_peft(load(kind), folders), **graph), lorafx.compile(load(kind), folders, mode="eager")
    for model in models:
        got = run(model, INPUTS, names)
        assert torch.equal(got[1], base[1])
        assert difference(got - base, want - base) <= LOADED[kind]
        assert torch.equal(model.generate(**INPUTS, adapter_names=names, **short), tokens)
        assert not [entry for entry in lorafx.explain(model).skipped if "left to PEFT" in entry.reason]
    for model in models:
        lorafx.uncompile(model)
    assert torch.equal(run(models[1], INPUTS), base)
    models[0].set_adapter("b")
    assert torch.equal(run(models[0], INPUTS)[2], want[2])


@pytest.mark.parametrize("kind", ONE_GRAPH)
def test_branches_in_a_graph_of_plain_peft(kind, load, folders):
    """``torch.compile(model, backend="lorafx")``, which packs no weights: bitsandbytes does so in a first call."""
    model = with_peft(load(kind), folders)
    want = run(model, INPUTS)
    root = model.get_base_model()
    compiled = torch.compile(root, backend="lorafx", options=EAGER_GRAPH)
    assert_close(run(compiled, INPUTS), want, max(LOADED[kind], 1e-5))
    assert sum(len(group.branches) for group in lorafx.explain(root).groups) == 7


@pytest.mark.parametrize("kind", ["nf4", "torchao"])
def test_gradients_of_training(kind, load, folders):
    """In training mode, where bitsandbytes packs nothing: the fused ops' gradients are PEFT's."""
    reference, model = (
        PeftModel.from_pretrained(load(kind), folders["a"], is_trainable=True).train() for _ in range(2)
    )
    for layer in (m for each in (reference, model) for m in each.modules() if isinstance(m, nn.Dropout)):
        layer.p = 0.0
    lorafx.compile(model, options=EAGER_GRAPH)
    for each in (reference, model):
        each(**INPUTS).logits.square().sum().backward()
    for (name, mine), (_, theirs) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        if theirs.requires_grad:
            assert difference(mine.grad, theirs.grad) <= LOADED[kind], name
    model.eval(), reference.eval()
    assert difference(run(model, INPUTS), run(reference, INPUTS)) <= LOADED[kind]
