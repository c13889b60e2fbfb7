"""Trains the demo adapters with PEFT: `python -m demo.train json` or `python -m demo.train all`."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from demo.checks import DATA
from demo.model import NAME, load

ADAPTERS = Path(__file__).parent / "adapters"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """What one adapter is and how it is trained; lora_alpha is twice the rank."""

    rank: int
    targets: tuple[str, ...]
    lr: float
    steps: int


# Four different ranks and three target sets on purpose: a mixed batch must cope with adapters that differ.
RECIPES = {
    "json": Recipe(8, LINEARS, 1e-3, 60),
    "french": Recipe(32, ("q_proj", "v_proj"), 1e-3, 120),
    "pirate": Recipe(16, ("q_proj", "k_proj", "v_proj"), 1e-3, 100),
    "upper": Recipe(4, ("q_proj", "v_proj"), 2e-3, 120),
}


def examples(name: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    """The data file as token ids: (chat prompt, answer with its end token)."""
    pairs = []
    for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        chat = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        pairs.append((prompt, tokenizer(row["answer"] + tokenizer.eos_token)["input_ids"]))
    return pairs


def batches(pairs: list, size: int) -> Iterator[list]:
    """Shuffled batches for ever."""
    while True:
        order = random.sample(pairs, len(pairs))
        yield from (order[i : i + size] for i in range(0, len(order) - size + 1, size))


def loss_of(model: PeftModel, batch: list[tuple[list[int], list[int]]], pad: int) -> torch.Tensor:
    """Mean cross entropy of the answer tokens."""
    width = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), -100)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for i, (prompt, answer) in enumerate(batch):
        size = len(prompt) + len(answer)
        ids[i, -size:] = torch.tensor(prompt + answer)
        labels[i, -len(answer) :] = torch.tensor(answer)
        mask[i, -size:] = 1
    # Padding on the left puts all answers at the end, so that the large output matrix is needed for few positions only.
    keep = max(len(answer) for _, answer in batch) + 1
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1 - keep :].flatten())


def save(model: PeftModel, folder: Path) -> None:
    """Writes the adapter in float16, with nothing of this machine in its config."""
    model.peft_config["default"].base_model_name_or_path = NAME
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card is an empty form
    weights = folder / "adapter_model.safetensors"
    halves = {key: value.half() for key, value in load_file(weights).items()}
    weights.unlink()  # safetensors makes files that only their owner can read
    weights.write_bytes(to_bytes(halves, metadata={"format": "pt"}))
    config = folder / "adapter_config.json"
    fields = json.loads(config.read_text())
    fields["target_modules"].sort(key=LINEARS.index)  # a set in PEFT, so its order changes from run to run
    config.write_text(json.dumps(fields, indent=2) + "\n")


def train(name: str, recipe: Recipe, size: int, seed: int, folder: Path) -> dict[str, float | str]:
    """Trains and saves one adapter; returns its numbers."""
    model, tokenizer = load()
    random.seed(seed)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        lora_dropout=0.05,
        target_modules=list(recipe.targets),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=recipe.lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, recipe.steps // 10, recipe.steps)
    stream = batches(examples(name, tokenizer), size)
    losses: list[float] = []
    start = time.perf_counter()
    for _ in (bar := tqdm(range(recipe.steps), desc=name, mininterval=5)):
        loss = loss_of(model, next(stream), tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    seconds = time.perf_counter() - start
    save(model, folder / name)
    last = losses[-10:]
    return {
        "adapter": name,
        "steps": recipe.steps,
        "seconds": round(seconds),
        "first_loss": round(losses[0], 3),
        "last_10_losses": round(sum(last) / len(last), 3),
        "bytes": (folder / name / "adapter_model.safetensors").stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", choices=[*RECIPES, "all"])
    parser.add_argument("--out", type=Path, default=ADAPTERS, help="folder that gets one folder per adapter")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--lr", type=float, help="instead of the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in RECIPES if args.adapter == "all" else [args.adapter]:
        recipe = RECIPES[name]
        recipe = Recipe(recipe.rank, recipe.targets, args.lr or recipe.lr, args.steps or recipe.steps)
        print(json.dumps(train(name, recipe, args.batch_size, args.seed, args.out)), flush=True)


if __name__ == "__main__":
    main()
