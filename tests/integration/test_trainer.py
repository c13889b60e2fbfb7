"""transformers' Trainer and accelerate with a compiled PeftModel: losses, weights and files are those of plain PEFT."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file, save_model
from transformers import PrinterCallback, Trainer, TrainingArguments

import lorafx
from tests.integration.models import EAGER_GRAPH, LLAMA, difference, run, tokens
from tests.integration.test_training import GROUPS, IDS, LAYERS, fused, pair, plain_peft

DATA = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tokens(12, 9)]
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(model, folder, resume=None, **arguments):
    """Three steps of AdamW; the trainer."""
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 1,
        "seed": 0,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }
    trainer = Trainer(model, TrainingArguments(str(folder), **{**settings, **arguments}), collate, DATA, DATA)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def losses(trainer):
    return [entry[name] for entry in trainer.state.log_history for name in ("loss", "eval_loss") if name in entry]


def adapter(model):
    return {name: p.detach().double() for name, p in model.named_parameters() if "lora_" in name}


def error(got, want):
    """rel-L2 of all of them together."""
    assert got.keys() == want.keys()
    parts = [((got[name] - want[name]).norm() ** 2, want[name].norm() ** 2) for name in want]
    return float((sum(d for d, _ in parts) / sum(n for _, n in parts)) ** 0.5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_three_steps(dropout, tmp_path):
    """AdamW makes a full step of a gradient that is next to nothing, so what is compared is double precision; in
    float32 the distance to it is PEFT's own. With dropout the masks are PEFT's."""
    model, reference = pair(lora_dropout=dropout)
    start, exact = adapter(reference), copy.deepcopy(reference).double()
    trainers = [
        train(each, tmp_path / name, eval_strategy="steps", eval_steps=1)
        for name, each in (("ours", model), ("theirs", reference), ("exact", exact))
    ]
    assert losses(trainers[0]) == pytest.approx(losses(trainers[1]), rel=1e-6)
    assert len(losses(trainers[0])) == 6
    got, want, true = adapter(model), adapter(reference), adapter(exact)
    assert error(got, want) <= 1e-5
    assert error(got, true) <= 2 * error(want, true) + 1e-6
    assert error(want, start) > 1e-2
    assert fused(model) == [(0 if dropout else GROUPS, 0), (0, GROUPS)]  # training, evaluation
    # what the steps wrote is what inference reads
    assert difference(run(model.eval(), {"input_ids": IDS}), run(reference.eval(), {"input_ids": IDS})) <= 1e-5
    assert fused(model)[2:] in ([], [(0, GROUPS)])  # another batch size
    for step in (1, 2, 3):
        ours, theirs = (tmp_path / name / f"checkpoint-{step}" for name in ("ours", "theirs"))
        assert sorted(os.listdir(ours)) == sorted(os.listdir(theirs))
        one, other = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
        assert error({k: v.double() for k, v in one.items()}, {k: v.double() for k, v in other.items()}) <= 1e-5
        assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}
        config, expected = (json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, theirs))
        assert config == expected
    loaded = PeftModel.from_pretrained(LLAMA.build(LAYERS), tmp_path / "ours" / "checkpoint-3")
    assert difference(run(loaded.eval(), {"input_ids": IDS}), run(model, {"input_ids": IDS})) <= 1e-5


def test_resume(tmp_path):
    """One step, then two more from its checkpoint in a new model: as three in one go; the best one is loaded back."""
    straight, first, second = (pair()[0] for _ in range(3))
    train(straight, tmp_path / "straight")
    train(first, tmp_path / "parts", max_steps=3, save_steps=1)
    again = train(second, tmp_path / "again", resume=str(tmp_path / "parts" / "checkpoint-1"))
    assert again.state.global_step == 3
    assert error(adapter(second), adapter(straight)) <= 1e-6
    again._load_from_checkpoint(str(tmp_path / "parts" / "checkpoint-2"))
    saved = load_file(tmp_path / "parts" / "checkpoint-2" / "adapter_model.safetensors")
    name = next(name for name in saved if "q_proj.lora_B" in name)
    assert torch.equal(dict(second.named_parameters())[name.replace(".weight", ".default.weight")], saved[name])
    plain = PeftModel.from_pretrained(LLAMA.build(LAYERS), tmp_path / "parts" / "checkpoint-2").eval()
    assert difference(run(second.eval(), {"input_ids": IDS}), run(plain, {"input_ids": IDS})) <= 1e-5


def test_gradient_checkpointing_and_accumulation(tmp_path):
    model, reference = pair(lora_dropout=0.2)
    settings = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    settings["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    ours, theirs = (train(each, tmp_path / str(i), **settings) for i, each in enumerate((model, reference)))
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-6)
    assert error(adapter(model), adapter(reference)) <= 1e-5


def test_a_plain_model_trains_its_own_weights(tmp_path):
    """Adapters from files are no parameters: Trainer moves the base weights under them, or says that there are none."""
    plain_peft().save_pretrained(tmp_path / "a")
    model = lorafx.compile(LLAMA.build(LAYERS), {"a": tmp_path / "a"}, options=EAGER_GRAPH)
    model.config.use_cache = False
    before = model.lora.store.storage.clone()
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    train(model, tmp_path / "run", save_strategy="no")
    assert torch.equal(model.lora.store.storage, before)
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, weight)
    model.requires_grad_(False)
    with pytest.raises((RuntimeError, ValueError), match=r"grad|empty parameter list"):
        train(model, tmp_path / "run", save_strategy="no")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision, tmp_path):
    """prepare, backward, save_state and load_state, unwrap_model."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model, reference = pair()
    seen = []
    for each in (model, reference):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        prepared, optimizer = accelerator.prepare(each, optimizer)
        for _ in range(3):
            with accelerator.autocast():
                loss = prepared(input_ids=IDS, labels=IDS).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        assert accelerator.unwrap_model(prepared, keep_fp32_wrapper=False) is each
        seen.append(run(each.eval(), {"input_ids": IDS}))
    assert difference(*seen) <= (1e-5 if precision == "no" else 3e-2)
    assert fused(model) == [(GROUPS, 0), (0, GROUPS)]
    saved = adapter(model)
    accelerator.save_state(str(tmp_path))
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    accelerator.load_state(str(tmp_path))
    assert error(adapter(model), saved) == 0
    assert difference(run(model, {"input_ids": IDS}), seen[0]) <= 1e-6
    AcceleratorState._reset_state(True)


def test_state_dict_shares_no_memory(tmp_path):
    """As safetensors wants it: also its ``save_model``, which looks for tensors that share memory."""
    model, reference = pair()
    save_model(model, str(tmp_path / "ours.safetensors"))
    save_model(reference, str(tmp_path / "theirs.safetensors"))
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    kept, parameters = model.state_dict(keep_vars=True), dict(model.named_parameters())
    assert all(kept[name] is parameter for name, parameter in parameters.items())


INDUCTOR = """
import torch
from tests.integration.test_training import IDS, backward, difference, plain_peft
import copy, lorafx
for dropout in (0.0, 0.5):
    reference = plain_peft(lora_dropout=dropout)
    for each in (reference,):
        each.enable_input_require_grads()
        each.gradient_checkpointing_enable({"use_reentrant": False})
    model = lorafx.compile(copy.deepcopy(reference))
    loss, got = backward(model)
    if not dropout:
        expected, want = backward(reference)
        print("gradients", max(difference(got[name], want[name]) for name in want) < 1e-4)
        continue
    # the masks are Inductor's: the gradient is held against how the loss changes under the same seed
    steps = {name: torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in steps:
                    p.add_(steps[name], alpha=5e-4 if sign > 0 else -1e-3)
        moved.append(backward(model)[0])
    slope = (moved[0] - moved[1]) / 1e-3
    along = sum((got[name] * steps[name]).sum() for name in steps)
    print("slope", abs(float(slope / along) - 1) < 2e-2, float(slope), float(along))
"""


@pytest.mark.slow
def test_through_inductor():
    """Forward and backward are compiled, under gradient checkpointing, without dropout and with it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INDUCTOR], env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "gradients True" in done.stdout
    assert "slope True" in done.stdout
