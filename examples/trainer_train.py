"""``Trainer.train`` on a compiled ``PeftModel``: three steps, whose losses and weights are plain PEFT's."""

import tempfile

import torch
from common import mode, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, Trainer, TrainingArguments

import lorafx

generator = torch.Generator().manual_seed(1)
rows = [torch.randint(4, 96, (12,), generator=generator) for _ in range(12)]
dataset = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]


def draft() -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


with tempfile.TemporaryDirectory() as folder:

    def train(model: torch.nn.Module, name: str) -> list[float]:
        arguments = TrainingArguments(
            f"{folder}/{name}",
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
            save_steps=3,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            log_level="error",
        )
        trainer = Trainer(model, arguments, train_dataset=dataset)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    plain, model = draft(), lorafx.compile(draft(), mode=mode())
    ours, theirs = train(model, "ours"), train(plain, "theirs")
    for loss, their_loss in zip(ours, theirs, strict=True):
        assert abs(loss - their_loss) < 1e-4
        print(f"loss {loss:.5f}, PEFT's {their_loss:.5f}")
    saved = PeftModel.from_pretrained(tiny_llama(), f"{folder}/ours/checkpoint-3")

ids = torch.stack(rows[:2])
with torch.no_grad():
    logits = model.eval()(ids).logits  # reads what the optimizer wrote
    for other in (plain, saved):
        assert torch.allclose(logits, other.eval()(ids).logits, atol=1e-4)
print("the checkpoint gives the same logits")
