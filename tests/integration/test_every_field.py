"""Each field of PEFT's LoraConfig: PEFT's result, or one named reason. A field that nobody has looked at fails here."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, LoraRuntimeConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import (
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)

import lorafx
from tests.integration.models import EAGER_GRAPH, FAMILIES, assert_close, config, run, tokens

QV = ["q_proj", "v_proj"]
INPUTS = {"input_ids": tokens(3)}
INVOCATION = [int(INPUTS["input_ids"][0, 2])]


class Case(NamedTuple):
    """left: of the reason of what a PeftModel keeps; refused: of what is said of a file. None: neither"""

    fields: dict[str, Any]
    left: str | None = None
    refused: str | None = None
    family: str = "llama"
    layers: int = 1

    def build(self) -> Any:
        return FAMILIES[self.family].build(self.layers)


NEEDS_MORE = "PEFT's own set-up needs packages, processes or calibration data"
FIELDS: dict[str, Case | str] = {  # of every field a value that is not its default; or why there is nothing to try
    "task_type": Case({"task_type": "CAUSAL_LM"}),
    "peft_type": "PEFT sets it",
    "auto_mapping": "PEFT sets it",
    "peft_version": "PEFT sets it",
    "base_model_name_or_path": Case({"base_model_name_or_path": "another/model"}),
    "revision": Case({"revision": "main"}),
    "inference_mode": Case({"inference_mode": True}),
    "r": Case({"r": 7}),
    "target_modules": Case({"target_modules": r".*\.(q|o)_proj$"}),
    "exclude_modules": Case({"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "lora_alpha": Case({"lora_alpha": 3}),
    "lora_dropout": Case({"lora_dropout": 0.3}),
    "fan_in_fan_out": Case({"fan_in_fan_out": True, "target_modules": ["c_attn"]}, family="gpt2"),
    "bias": Case({"bias": "all", "target_modules": ["query"]}, refused="bias='all'", family="bert"),
    "use_rslora": Case({"use_rslora": True}),
    "modules_to_save": Case({"modules_to_save": ["lm_head"]}),
    "init_lora_weights": Case({"init_lora_weights": "pissa"}, refused="init_lora_weights='pissa'"),
    "layers_to_transform": Case({"layers_to_transform": [0]}, layers=2),
    "layers_pattern": Case({"layers_to_transform": [1], "layers_pattern": "layers"}, layers=2),
    "rank_pattern": Case({"rank_pattern": {"v_proj": 9}}),
    "alpha_pattern": Case({"alpha_pattern": {"v_proj": 1}}),
    "megatron_config": NEEDS_MORE,
    "megatron_core": "of no use without megatron_config",
    "trainable_token_indices": Case({"trainable_token_indices": [5, 6, 7, 8]}),
    "loftq_config": NEEDS_MORE,
    "eva_config": Case({"init_lora_weights": "eva", "eva_config": EvaConfig()}),
    "corda_config": Case({"init_lora_weights": True, "corda_config": CordaConfig()}),
    "lora_ga_config": Case({"init_lora_weights": True, "lora_ga_config": LoraGAConfig()}),
    "use_dora": Case({"use_dora": True}),
    "velora_config": Case({"velora_config": VeloraConfig(num_groups=4)}, "VeloraLinearVariant", "VeLoRA"),
    "alora_invocation_tokens": Case({"alora_invocation_tokens": INVOCATION, "task_type": "CAUSAL_LM"}),
    "use_qalora": NEEDS_MORE,
    "qalora_group_size": "of no use without use_qalora",
    "monteclora_config": Case({"monteclora_config": MontecloraConfig()}, "MontecloraLinearVariant", "MonteCLoRA"),
    "layer_replication": Case({"layer_replication": [[0, 2], [1, 2]]}, refused="layer replication", layers=2),
    "runtime_config": Case({"runtime_config": LoraRuntimeConfig()}),
    "lora_bias": Case({"lora_bias": True}),
    "target_parameters": Case({"target_parameters": ["mlp.experts.down_proj"], "lora_dropout": 0.0}, family="mixtral"),
    "use_bdlora": Case(
        {"use_bdlora": BdLoraConfig(target_modules_bd_b=QV, nblocks=2)}, "BdLoraLinearVariant", "BD-LoRA"
    ),
    "arrow_config": "PEFT's create_arrow_model sets it up; tests/integration/test_variants.py",
    "kasa_config": Case({"kasa_config": KasaConfig(), "init_lora_weights": True}, "KasaLinearVariant", "KaSA"),
    "ensure_weight_tying": Case(
        {"ensure_weight_tying": True, "target_modules": ["wte", "lm_head"]}, "ensure_weight_tying", None, "gpt2"
    ),
}
CASES = {field: case for field, case in FIELDS.items() if isinstance(case, Case)}


def test_no_field_of_peft_has_come_that_nobody_has_looked_at():
    assert {field.name for field in dataclasses.fields(LoraConfig)} == FIELDS.keys()


def adapted(case: Case) -> PeftModel:
    fields = {"target_modules": QV, **case.fields}
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(case.build(), config(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = ("lora_B", "lora_embedding_A", "trainable_tokens_delta", "lora_diag")
            if any(part in name for part in drawn) or (parameter.requires_grad and "lora_" not in name):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.mark.parametrize("field", CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_peft_model_gives_what_it_gave(field):
    case = CASES[field]
    model = adapted(case)
    want = run(model, INPUTS)
    with model.disable_adapter():
        base = run(model, INPUTS)
    assert (want - base).norm() > 1e-3 * base.norm() or case.fields.get("bias")
    lorafx.compile(model, options=EAGER_GRAPH)
    assert_close(run(model, INPUTS), want)
    with model.disable_adapter():
        assert_close(run(model, INPUTS), base)
    assert_close(run(model, INPUTS), want)
    report = lorafx.explain(model)
    reasons = {item.reason for item in report.skipped}
    assert report.uncompiled == ""
    assert len(reasons) == (case.left is not None)
    assert all(case.left in reason for reason in reasons)


@pytest.mark.parametrize("field", CASES)
@pytest.mark.filterwarnings("ignore")
def test_its_file_gives_the_same_or_is_refused_by_name(field, tmp_path):
    case = CASES[field]
    if field == "ensure_weight_tying":
        case = case._replace(refused="ensure_weight_tying")
    model = adapted(case)
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    base = case.build()
    if case.refused is not None:
        before = copy.deepcopy(base.state_dict())
        with pytest.raises(lorafx.AdapterFormatError, match=rf"{case.refused}.*Load it with PEFT"):
            lorafx.compile(base, str(tmp_path), mode="eager")
        assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
        return
    want = run(PeftModel.from_pretrained(case.build(), str(tmp_path)).eval(), INPUTS)
    assert_close(want, run(model, INPUTS))
    compiled = lorafx.compile(case.build(), str(tmp_path), mode="eager")
    assert_close(run(compiled, INPUTS), want)
    assert lorafx.explain(compiled).skipped == []
