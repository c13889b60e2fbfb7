"""Checks the saved adapters on unseen prompts with plain PEFT: `python -m demo.evaluate` or `... json french`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from demo.checks import CHECKS, PROMPTS, unseen
from demo.model import load
from demo.train import ADAPTERS


def answers(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], length: int = 40
) -> list[tuple[str, bool]]:
    """Greedy answers to all prompts in one batch, each with whether it ended by itself."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    with torch.inference_mode():
        rows = model.generate(**inputs, max_new_tokens=length, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [(text, tokenizer.eos_token_id in row) for text, row in zip(texts, rows.tolist(), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", nargs="*", help=f"some of {', '.join(CHECKS)}; all if none is named")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = args.adapter or list(CHECKS)
    seen = [prompt for prompt in PROMPTS if not unseen(prompt)]
    if seen:
        raise SystemExit(f"in the training data: {seen}")

    model, tokenizer = load()
    base = answers(model, tokenizer, PROMPTS)
    for prompt, (text, _) in zip(PROMPTS, base, strict=True):
        print(f"base    {prompt} -> {text!r}")
    table = [("base, " + name, base, CHECKS[name]) for name in names]
    model = PeftModel.from_pretrained(model, str(args.adapters / names[0]), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(args.adapters / name), adapter_name=name)
    for name in names:
        model.set_adapter(name)
        model.eval()
        made = answers(model, tokenizer, PROMPTS)
        for prompt, (text, ended) in zip(PROMPTS, made, strict=True):
            verdict = ("pass" if CHECKS[name](text) else "FAIL") + ("" if ended else " (cut off)")
            print(f"{name:7} {verdict} {prompt} -> {text!r}")
        table.append((name, made, CHECKS[name]))
    for label, made, check in table:
        passed, ended = sum(check(text) for text, _ in made), sum(end for _, end in made)
        print(f"{label:13} {passed}/{len(made)} pass, {ended}/{len(made)} end by themselves")


if __name__ == "__main__":
    main()
