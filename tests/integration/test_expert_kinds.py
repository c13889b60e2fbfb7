"""LoRA on every kind of experts that transformers tells apart, and the graph that users run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from transformers.integrations.moe import use_experts_implementation

import lorafx

from .models import EAGER_GRAPH, FAMILIES, assert_close, config, run
from .test_experts import COMMON, EXPERTS, INPUTS


class Mixture(torch.nn.Module):
    """Experts of every kind that transformers tells apart: weights turned, biases, no gate, a norm behind."""

    def __init__(self, **flags: bool) -> None:
        super().__init__()
        torch.manual_seed(0)

        @use_experts_implementation(**flags)
        class Experts(torch.nn.Module):
            def __init__(self, config) -> None:
                super().__init__()
                self.num_experts, self.act_fn = 4, torch.nn.functional.gelu
                turned, up = flags.get("is_transposed"), "gate_up_proj" if flags.get("has_gate", True) else "up_proj"
                for name, out, width in ((up, 24 if "gate" in up else 12, 8), ("down_proj", 8, 12)):
                    shape = (4, width, out) if turned else (4, out, width)
                    self.register_parameter(name, torch.nn.Parameter(torch.randn(shape)))
                    if flags.get("has_bias"):
                        self.register_parameter(f"{name}_bias", torch.nn.Parameter(torch.randn(4, out)))
                if flags.get("has_post_expert_norm"):
                    self.post_expert_norm = torch.nn.LayerNorm(8)

            def forward(self, hidden_states, top_k_index, top_k_weights):
                raise NotImplementedError

        self.router = torch.nn.Linear(8, 4)
        self.experts = Experts(SimpleNamespace(_experts_implementation="grouped_mm"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        weights, index = self.router(flat).softmax(-1).topk(2)
        return self.experts(flat, index, weights).view_as(x)


@pytest.mark.parametrize(
    "flags",
    [
        {"is_transposed": True, "has_bias": True},
        {"has_gate": False, "has_bias": True},
        {"has_post_expert_norm": True},
    ],
    ids=lambda flags: "+".join(flags),
)
def test_every_kind_of_experts(flags):
    up = "gate_up_proj" if flags.get("has_gate", True) else "up_proj"
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    fields = config(lora_dropout=0.0, target_modules=[], target_parameters=[f"experts.{up}", "experts.down_proj"])
    base = Mixture(**flags).eval()(x)
    reference = get_peft_model(Mixture(**flags), fields).eval()
    want = reference(x) - base
    state = get_peft_model_state_dict(reference)
    model = lorafx.compile(Mixture(**flags).eval(), {"a": (state, fields)}, options=EAGER_GRAPH)
    got = model(x, adapter_names=["a", None, "a"])
    assert torch.allclose(got[1], base[1], atol=1e-6)
    for row in (0, 2):
        assert_close(got[row] - base[row], want[row])
    assert not lorafx.explain(model).skipped


def test_through_inductor(tmp_path):
    """The graph that users run, one layer, its router adapted too; another adapter, another batch of names: nothing is
    compiled again."""
    family = FAMILIES["mixtral"]
    folders, want = {}, {}
    base = run(family.build(1), INPUTS)
    for seed, name in enumerate("ab"):
        fields = {**COMMON, "target_parameters": [*EXPERTS, "mlp.gate.weight"]}
        model = get_peft_model(family.build(1), config(r=3 + seed, target_modules=["q_proj"], **fields)).eval()
        model.save_pretrained(str(tmp_path / name))
        folders[name], want[name] = str(tmp_path / name), run(model, INPUTS)
    torch._dynamo.reset()
    model = lorafx.compile(family.build(1), folders)
    for names in (["a", None, "b", "b", "a"], ["b"] * 5):
        got = run(model, INPUTS, names)
        for row, name in enumerate(names):
            if name is None:
                assert_close(got[row], base[row], 1e-6)
            else:
                assert_close(got[row] - base[row], want[name][row] - base[row])
    report = lorafx.explain(model)
    assert (len(report.graphs), report.recompiles) == (1, 0)
    assert {"model.layers.0.mlp.gate.weight"} in [{b.name for b in g.branches} for g in report.groups]
