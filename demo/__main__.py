"""`make demo`: one batch of five rows, four adapters and the base model, through one compiled graph.

Every row is held against the same row alone in plain PEFT; what the compiler did and what a token costs is printed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import transformers
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

import lorafx
from demo.checks import CHECKS
from demo.model import NAME, load
from demo.train import ADAPTERS

PROMPT = "What is the capital of Italy?"
ROWS: list[str | None] = [*CHECKS, None]
NEW_TOKENS = 40
ROUNDS = 3  # alternating timed runs of each contender
TIE = 1e-3  # two best logits closer than this may change places by rounding
PAUSE = 1 if sys.stdout.isatty() else 20  # seconds between two looks of a bar: a log file wants few


@contextmanager
def clock(title: str) -> Iterator[None]:
    """A bar that counts seconds, for work that does not say how far it is."""
    done = threading.Event()
    with tqdm(desc=title, bar_format="{desc} {elapsed}", file=sys.stdout) as bar:
        ticking = threading.Thread(target=lambda: [bar.refresh() for _ in iter(lambda: done.wait(PAUSE), True)])
        ticking.start()
        try:
            yield
        finally:
            done.set()
            ticking.join()


@dataclass
class Stopwatch(StoppingCriteria):
    """Called by generate after each token: moves the bar, and remembers when."""

    bar: tqdm
    times: list[float] = field(default_factory=list)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.bar.update()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def per_token(self) -> float:
        """Seconds of a decode step: the median, without the first, which follows the prefill."""
        return statistics.median(b - a for a, b in zip(self.times[1:], self.times[2:], strict=False))


def generate(model: torch.nn.Module, inputs: dict, title: str, **kwargs: object) -> tuple[object, Stopwatch]:
    """Greedy, static cache, always ``NEW_TOKENS`` long, so that each run has the same shapes."""
    with (
        tqdm(total=NEW_TOKENS, desc=title, file=sys.stdout, leave=False, mininterval=PAUSE / 10) as bar,
        torch.inference_mode(),
    ):
        watch = Stopwatch(bar)
        out = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=-1,  # no token: each run has the same length, and the texts are cut at the true one
            cache_implementation="static",
            stopping_criteria=StoppingCriteriaList([watch]),
            output_logits=True,
            return_dict_in_generate=True,
            **kwargs,
        )
    return out, watch


def first_difference(mine: list[int], theirs: list[int], logits: torch.Tensor, eos: int) -> str:
    """ "same tokens", or where the rows part and how near PEFT's own two best logits are there.

    logits: PEFT's, ``[tokens, vocabulary]``
    """
    for step, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if a != b:
            best = logits[step].topk(2).values
            gap = float(best[0] - best[1])
            return f"{'tie' if gap < TIE else 'DIFFERENT'} at token {step}: PEFT's two best logits are {gap:.1e} apart"
        if a == eos:
            break
    return "same tokens as this row alone with plain PEFT"


def compile_decode(model: PreTrainedModel) -> None:
    """The base model's rival: plain ``torch.compile``, of the decode step only, which is all that is timed."""
    compiled = torch.compile(model._call_impl, dynamic=False)

    def call(*args: object, **kwargs: object) -> object:
        ids = kwargs.get("input_ids")
        return (compiled if ids is not None and ids.shape[1] == 1 else model._call_impl)(*args, **kwargs)

    model._compiled_call_impl = call


def run(prompt: str) -> int:
    started = time.perf_counter()
    print(f"lorafx demo: {NAME}, rows {', '.join(name or 'base model' for name in ROWS)}\nprompt: {prompt}\n")
    base, tokenizer = load()
    chat = [[{"role": "user", "content": prompt}]] * len(ROWS)
    inputs = dict(
        tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
    )
    alone = {key: value[:1] for key, value in inputs.items()}
    length = inputs["input_ids"].shape[1]
    eos = tokenizer.eos_token_id
    paths = {name: str(ADAPTERS / name) for name in CHECKS}

    with clock("loading the adapters with PEFT"):
        first, *others = paths
        peft = PeftModel.from_pretrained(copy.deepcopy(base), paths[first], adapter_name=first).eval()
        for name in others:
            peft.load_adapter(paths[name], adapter_name=name)
    expected = []
    for name in ROWS:
        if name is None:
            with peft.disable_adapter():
                out, _ = generate(peft, alone, "plain PEFT, base model alone")
        else:
            peft.set_adapter(name)
            out, _ = generate(peft, alone, f"plain PEFT, {name} alone")
        expected.append((out.sequences[0, length:].tolist(), torch.stack(out.logits)[:, 0]))

    with clock("lorafx.compile: reading and packing four adapters"):
        model = lorafx.compile(copy.deepcopy(base), paths, dynamic=False)
    with clock("compiling prefill and decode, 30 layers each, and generating"):
        out, _ = generate(model, inputs, "five rows", adapter_names=ROWS)
    answers = out.sequences[:, length:].tolist()

    compile_decode(base)
    with clock("compiling the base model's decode without LoRA, to compare"):
        generate(base, inputs, "base model")
    names = [name or "__base__" for name in ROWS]
    contenders: dict[str, Callable[[], Stopwatch]] = {
        "base model, compiled, no LoRA": lambda: generate(base, inputs, "base model")[1],
        "plain PEFT, eager, mixed batch": lambda: generate(peft, inputs, "plain PEFT", adapter_names=names)[1],
        "lorafx, compiled, mixed batch": lambda: generate(model, inputs, "lorafx", adapter_names=ROWS)[1],
        "lorafx, compiled, no adapter in use": lambda: generate(model, inputs, "lorafx", adapter_names=[None] * 5)[1],
    }
    measured: dict[str, list[float]] = {title: [] for title in contenders}
    for _ in range(ROUNDS):
        for title, contender in contenders.items():
            measured[title].append(contender().per_token())

    print("\nWhat each row answered\n")
    failures = 0
    for name, tokens, (reference, logits) in zip(ROWS, answers, expected, strict=True):
        text = tokenizer.decode(tokens[: tokens.index(eos)] if eos in tokens else tokens).strip()
        verdict = first_difference(tokens, reference, logits, eos)
        styled = "" if name is None else (", style check passed" if CHECKS[name](text) else ", style check FAILED")
        failures += "DIFFERENT" in verdict
        print(f"  {name or 'base model':10} | {text}\n  {'':10} |   {verdict}{styled}\n")

    report = lorafx.explain(model)
    decode = report.graphs[-1].passes
    print("What the compiler did\n")
    print("\n".join(f"  {line}" for line in str(report).splitlines()))
    branches = sum(len(group.branches) for group in decode.groups)
    print(
        f"\n  LoRA ops called per token: {decode.after['lorafx.routed_lora']} fused ops for {branches} adapted layers"
        f" (separate branches: {branches} shrinks and {branches} expands for each adapter in the batch)"
    )
    print(f"  compile seconds: {', '.join(f'{graph.seconds:.0f}' for graph in report.graphs)}\n")

    print(
        f"Time per token (a decode step of the whole batch of {len(ROWS)} rows; median of {ROUNDS} alternating runs)\n"
    )
    medians = {title: statistics.median(values) for title, values in measured.items()}
    reference_time = next(iter(medians.values()))
    for title, seconds in medians.items():
        print(f"  {title:36} {seconds * 1e3:7.1f} ms   {seconds / reference_time:5.2f} x base")
    print(f"\nCPU, {torch.get_num_threads()} threads, float32. {time.perf_counter() - started:.0f} s in all.")
    return 1 if failures else 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--prompt", default=PROMPT, help=f"default: {PROMPT!r}")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    sys.exit(run(args.prompt or PROMPT))


if __name__ == "__main__":
    main()
