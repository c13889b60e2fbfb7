"""``Trainer.evaluate`` and ``Trainer.predict``, with one adapter after the other."""

import tempfile

import numpy
import torch
from common import mode, save_adapters, tiny_llama
from peft import PeftModel
from transformers import PrinterCallback, Trainer, TrainingArguments

import lorafx

adapters = save_adapters()
generator = torch.Generator().manual_seed(1)
rows = [torch.randint(4, 96, (12,), generator=generator) for _ in range(7)]
dataset = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]


with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, per_device_eval_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True, log_level="error"
    )

    def scores(model: torch.nn.Module) -> tuple[float, numpy.ndarray]:
        trainer = Trainer(model, arguments, eval_dataset=dataset)
        trainer.remove_callback(PrinterCallback)
        return trainer.evaluate()["eval_loss"], trainer.predict(dataset).predictions

    model = lorafx.compile(tiny_llama(), adapters, mode=mode())
    for name, source in adapters.items():
        model.lora.use(name)
        loss, logits = scores(model)
        their_loss, their_logits = scores(PeftModel.from_pretrained(tiny_llama(), source))
        assert abs(loss - their_loss) < 1e-5
        assert numpy.allclose(logits, their_logits, atol=1e-5)
        print(f"{name}: loss {loss:.5f}, PEFT's {their_loss:.5f}; logits {logits.shape}")
