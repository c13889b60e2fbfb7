import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorafx.experts import layer_at, site_name
from tests.cli.conftest import save_adapter
from tests.integration.models import FAMILIES, config
from tests.integration.other_layers import ADAPTERS, build, with_adapters

ROOT = Path(__file__).parent.parent.parent
WEIGHTS = "adapter_model.safetensors"


def changed(sql: Path, folder: Path, change, **config: object) -> Path:
    """A copy of an adapter, with its tensors or its config changed."""
    shutil.copytree(sql, folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_a_sound_adapter(lorafx_command, sql):
    code, out, _ = lorafx_command("inspect", sql)
    assert code == 0
    assert "4 adapted layer(s), rank 4" in out
    rows = [line.split() for line in out.splitlines() if "_proj" in line]
    assert rows[0] == ["q_proj", "32->32", "4", "8", "2", "float32", "2", "2,048"]
    assert rows[1] == ["v_proj", "32->16", "4", "8", "2", "float32", "2", "1,536"]
    assert out.splitlines()[-1] == "sound"


def test_json_is_what_peft_loads(lorafx_command, sql, model, tmp_path):
    """Ranks, alphas and scales are PEFT's own, patterns and rsLoRA included."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    folder = save_adapter(
        tmp_path / "patterns",
        rank_pattern={"v_proj": 6, r"layers.1.self_attn.q_proj": 3},
        alpha_pattern={r"layers\.0.*q_proj": 5},
        use_rslora=True,
        lora_bias=True,
    )
    code, out, _ = lorafx_command("inspect", folder, "--json")
    assert code == 0
    found = json.loads(out)
    peft_model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model), folder)
    assert len(found["layers"]) == 4
    for layer in found["layers"]:
        theirs = peft_model.base_model.model.get_submodule(layer["path"])
        assert layer["rank"] == theirs.r["default"]
        assert layer["alpha"] == theirs.lora_alpha["default"]
        assert math.isclose(layer["scale"], theirs.scaling["default"])
        assert layer["shapes"]["bias"] == list(theirs.lora_B["default"].bias.shape)
    assert found["bytes"] == sum(t.nbytes for t in load_file(folder / WEIGHTS).values())
    assert (found["problems"], found["left_to_peft"]) == ([], [])


UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
EXPERTS = {
    "both": {"target_parameters": [UP, DOWN], "target_modules": ["q_proj"]},
    "with patterns": {
        "target_parameters": [DOWN, UP],
        "target_modules": [],
        "rank_pattern": {DOWN: 6, r"layers.1.mlp.experts.gate_up_proj": 3},
        "alpha_pattern": {r"layers\.0.*gate_up_proj": 5},
        "use_rslora": True,
    },
    "one alone": {"target_parameters": [UP], "target_modules": []},
    "without its module": {"target_parameters": ["down_proj", "gate_up_proj"], "target_modules": ["v_proj"]},
    "of one layer": {"target_parameters": [f"model.layers.1.{DOWN}", UP], "target_modules": []},
    "beside a router": {"target_parameters": ["mlp.gate.weight", DOWN], "target_modules": ["o_proj"]},
}


def save_experts(folder: Path, **fields: object) -> Path:
    get_peft_model(FAMILIES["mixtral"].build(2), config(r=4, lora_dropout=0.0, **fields)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fields", EXPERTS.values(), ids=EXPERTS)
def test_weights_of_experts(lorafx_command, tmp_path, fields):
    """By the names of the parameters, with PEFT's ranks, alphas and scales."""
    folder = save_experts(tmp_path / "x", **fields)
    code, out, _ = lorafx_command("inspect", folder, "--json")
    found = json.loads(out)
    assert (code, found["problems"]) == (0, [])
    root = PeftModel.from_pretrained(FAMILIES["mixtral"].build(2), folder).get_base_model()
    assert {layer["path"] for layer in found["layers"]} == adapted_layers_of(root)
    for layer in found["layers"]:
        theirs = layer_at(root, layer["path"])
        assert (layer["rank"], layer["alpha"]) == (theirs.r["default"], theirs.lora_alpha["default"])
        assert math.isclose(layer["scale"], theirs.scaling["default"])
        assert layer["shapes"] == {part: list(getattr(theirs, f"lora_{part}")["default"].weight.shape) for part in "AB"}
    code, out, _ = lorafx_command("inspect", folder)
    assert code == 0
    assert "note: it adapts parameters (target_parameters): '" in out
    assert "base_layer" not in out


class Gated(nn.Module):
    """Parameters of its own, of no class of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.up.t()) @ self.down.t()


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gated = Gated()

    def forward(self, x: Tensor) -> Tensor:
        return self.gated(x)


@pytest.mark.parametrize("patterns", [{}, {"gated.up": 3}, {"gated.up": 3, "gated.down": 2}])
def test_several_parameters_of_a_module_that_is_no_experts(lorafx_command, tmp_path, patterns):
    """Which of PEFT's wrappers is whose only the model says, so either may have either's rank."""
    fields = {"target_modules": [], "target_parameters": ["gated.up", "gated.down"], "rank_pattern": patterns}
    get_peft_model(Holder(), config(r=4, lora_dropout=0.0, **fields)).save_pretrained(tmp_path / "x")
    code, out, _ = lorafx_command("inspect", tmp_path / "x", "--json")
    found = json.loads(out)
    assert (code, found["problems"]) == (0, [])
    assert sorted(layer["rank"] for layer in found["layers"]) == sorted(
        patterns.get(name, 4) for name in ("gated.up", "gated.down")
    )
    code, out, _ = lorafx_command(
        "inspect", changed(tmp_path / "x", tmp_path / "y", lambda tensors: None, r=5, rank_pattern={})
    )
    assert code == 1
    assert "whose rank is not what the config says" in out


def adapted_layers_of(root) -> set[str]:
    return {site_name(path, module) for path, module in root.named_modules() if isinstance(module, LoraLayer)}


def test_experts_whose_rank_rows_can_not_be(lorafx_command, tmp_path):
    folder = save_experts(tmp_path / "x", target_parameters=[UP, DOWN], target_modules=[])
    code, out, _ = lorafx_command("inspect", changed(folder, tmp_path / "y", lambda tensors: None, r=5))
    assert code == 1
    rows = 4 * FAMILIES["mixtral"].build(1).config.num_local_experts
    assert "4 layer(s) whose rank is not what the config says, such as 'model.layers.0.mlp.experts." in out
    assert f"its weights have {rows} rank rows, no multiple of what the config says 5" in out


def test_embeddings_and_convolutions(lorafx_command, tmp_path):
    made = with_adapters(build(), {"a": ADAPTERS["a"]})
    made.save_pretrained(str(tmp_path))
    code, out, _ = lorafx_command("inspect", tmp_path / "a")
    assert code == 0
    assert "labels   10->6" in out
    assert "strided  3x3x3->8" in out
    assert out.splitlines()[-1] == "sound"


def test_an_untrained_one(lorafx_command, tmp_path):
    code, out, _ = lorafx_command("inspect", save_adapter(tmp_path / "new", init_lora_weights=True))
    assert code == 0
    assert "B is zero in every layer: untrained" in out


def test_one_layer_untrained(lorafx_command, sql, tmp_path):
    def change(tensors):
        next(tensor for key, tensor in tensors.items() if "lora_B" in key).zero_()

    code, out, _ = lorafx_command("inspect", changed(sql, tmp_path / "x", change))
    assert code == 0
    assert "B is zero in 1 of 4 layers" in out


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_problems(lorafx_command, sql, tmp_path, value):
    def change(tensors):
        tensors[sorted(tensors)[0]][1, 2] = value

    code, out, _ = lorafx_command("inspect", changed(sql, tmp_path / "x", change))
    assert code == 1
    assert "NaN or Inf in 1 tensor(s)" in out
    assert "sound" not in out


def test_what_does_not_belong(lorafx_command, sql, tmp_path):
    def change(tensors):
        tensors["base_model.model.lm_head.weight"] = torch.ones(4, 4)
        first = next(key for key in tensors if "lora_A" in key)
        del tensors[first]

    code, out, _ = lorafx_command("inspect", changed(sql, tmp_path / "x", change))
    assert code == 1
    assert "1 tensor(s) that are no LoRA weights, such as 'base_model.model.lm_head.weight'" in out
    assert "1 layer(s) with an A or a B only" in out


def test_a_rank_that_the_config_does_not_say(lorafx_command, sql, tmp_path):
    code, out, _ = lorafx_command("inspect", changed(sql, tmp_path / "x", lambda tensors: None, r=16))
    assert code == 1
    assert "its weights have rank 4, the config says 16" in out


def test_an_unusual_scale(lorafx_command, sql, tmp_path):
    code, out, _ = lorafx_command("inspect", changed(sql, tmp_path / "x", lambda tensors: None, lora_alpha=4000))
    assert code == 0
    assert "an unusual scale (alpha / rank): 1000" in out


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"bias": "all"}, "left to PEFT: bias="),
        ({"use_dora": True}, "it uses DoRA"),
        ({"modules_to_save": ["lm_head"]}, "it uses modules_to_save"),
        ({"task_type": "CAUSAL_LM", "alora_invocation_tokens": [5, 6]}, "it is aLoRA: it begins at the tokens [5, 6]"),
    ],
)
def test_what_is_left_to_peft_or_special_is_said(lorafx_command, tmp_path, config, said):
    code, out, _ = lorafx_command("inspect", save_adapter(tmp_path / "x", **config))
    assert code == 0
    assert said in out
    assert "4 adapted layer(s)" in out


def test_another_method_is_refused(lorafx_command, sql, tmp_path):
    code, _, err = lorafx_command("inspect", changed(sql, tmp_path / "x", lambda t: None, peft_type="IA3"))
    assert code == 1
    assert "of type 'IA3'" in err


def test_names_that_would_write_to_the_terminal(lorafx_command, tmp_path, sql):
    def change(tensors):
        tensors["base_model.model.\x1b]0;owned\x07[bold]x\x1b[2J.lora_A.weight"] = torch.ones(4, 8)
        tensors["base_model.model.\x1b]0;owned\x07[bold]x\x1b[2J.lora_B.weight"] = torch.ones(8, 4)

    code, out, _ = lorafx_command("inspect", changed(sql, tmp_path / "x", change))
    assert code == 0
    assert not any(letter in out for letter in "\x1b\x07")
    assert "[bold]x" in out


def test_many_different_names_and_patterns(lorafx_command, tmp_path, sql):
    def change(tensors):
        for i in range(1500):
            tensors[f"base_model.model.x.t{i}.lora_A.weight"] = torch.ones(4, 1)
            tensors[f"base_model.model.x.t{i}.lora_B.weight"] = torch.ones(1, 4)

    many = changed(sql, tmp_path / "x", change)
    code, out, _ = lorafx_command("inspect", many)
    assert code == 0
    assert len(out.splitlines()) < 80
    assert "more kinds of layers" in out
    patterns = {f"t{i}": 4 for i in range(1600)}
    code, _, err = lorafx_command("inspect", changed(many, tmp_path / "y", lambda t: None, rank_pattern=patterns))
    assert code == 1
    assert "tries; expected at most" in err


def test_a_file_cut_short(lorafx_command, sql, tmp_path):
    shutil.copytree(sql, tmp_path / "x")
    content = (tmp_path / "x" / WEIGHTS).read_bytes()
    (tmp_path / "x" / WEIGHTS).write_bytes(content[:-100])
    code, _, err = lorafx_command("inspect", tmp_path / "x")
    assert code == 1
    assert "can't be read" in err


def test_in_a_pipe_no_codes_and_no_cut_columns(tmp_path):
    """Not even where the pipe takes ASCII alone."""
    folder = save_adapter(tmp_path / ("long" * 40))
    done = subprocess.run(
        [sys.executable, "-m", "lorafx_cli", "inspect", str(folder)],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "20", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        timeout=120,
    )
    out = done.stdout.decode("ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert "\x1b" not in out
    assert str(folder) in out
    row = next(line for line in out.splitlines() if "q_proj" in line)
    assert row.split() == "q_proj 32->32 4 8 2 float32 2 2,048".split()
