"""What LoRA costs in llama.cpp on this CPU, over its own base: ``python -m benchmarks.cpu_llama_cpp``. Some minutes.

The same model and adapters as in ``benchmarks.cpu`` (SmolLM2-135M, r 16, one adapter), converted by ``lorafx.formats``.
Two bases: the file as it comes (Q4_1, which llama.cpp is made for), and its weights in float32, which is what
``benchmarks.cpu`` runs. Base and adapted model are two contexts that take turns in one process; what each computes is
held against PEFT first. Needs llama-cpp-python (``pip install llama-cpp-python`` builds it for ten minutes) and gguf.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.cpu import machine
from benchmarks.cpu_contenders import ContenderError, load_base, visible
from benchmarks.cpu_report import duration, with_quartiles
from benchmarks.forward_pass import ALL, QKV, SEEN, Case, with_adapters
from benchmarks.turns import quartiles, ratios, take_turns, timed
from demo import model as demo_model
from lorafx.formats import to_gguf

BASE, ADAPTED = "llama.cpp, no LoRA", "llama.cpp"
CASES = (Case(1, 1, (16,), QKV), Case(1, 1, (16,), ALL), Case(1, 512, (16,), ALL))
# Cosine of the change that the adapter makes to the logits, to PEFT's in float64. Beside Q4_1 llama.cpp rounds what
# goes into a product to 8 bits, which blurs it: hence stronger adapters, and a lower bound.
CLOSE = {"float32": 0.999, "Q4_1": 0.9}
STRENGTH = {"float32": None, "Q4_1": 0.3}  # None: as in benchmarks.cpu


def float32_file(source: Path, target: Path) -> Path:
    """A copy of a GGUF model whose tensors are all float32."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, dequantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, arch=reader.fields["general.architecture"].contents())
    own = {"general.architecture", "GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.file_type"}
    for field in reader.fields.values():
        if field.name not in own:
            kind, *items = field.types
            writer.add_key_value(field.name, field.contents(), kind, items[-1] if kind == GGUFValueType.ARRAY else None)
    writer.add_file_type(LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


class LlamaCpp:
    """One context: ``step`` is a forward pass of ``case``, always of the same tokens."""

    def __init__(self, base: Path, case: Case, threads: int, vocabulary: int, lora: Path | None) -> None:
        from llama_cpp import Llama

        self.llm = Llama(
            str(base),
            n_ctx=1024,
            n_batch=1024,
            n_ubatch=1024,
            n_threads=threads,
            n_threads_batch=threads,
            lora_path=str(lora) if lora else None,
            verbose=False,
        )
        ids = torch.randint(0, vocabulary, (SEEN + case.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
        self.seen, self.ids = (ids[:SEEN], ids[SEEN:]) if case.tokens == 1 else ([], ids[: case.tokens])
        if self.seen:
            self.llm.eval(self.seen)

    def step(self) -> None:
        self.llm.n_tokens = len(self.seen)  # what follows is dropped from the cache
        self.llm.eval(self.ids)

    def logits(self) -> Tensor:
        """Of the last position."""
        self.step()
        rows = self.llm._ctx.get_logits()
        return torch.from_numpy(numpy.ctypeslib.as_array(rows, shape=(self.llm.n_vocab(),)).copy()).double()

    def close(self) -> None:
        self.llm.close()


def exact(model: PreTrainedModel, case: Case) -> tuple[Callable[[list[int]], Tensor], Callable[[list[int]], Tensor]]:
    """The base and PEFT on it in float64: tokens -> logits of the last position."""
    base = copy.deepcopy(model).double()
    adapted = with_adapters(copy.deepcopy(model), case).double()

    def last(which: torch.nn.Module) -> Callable[[list[int]], Tensor]:
        return torch.no_grad()(lambda ids: which(input_ids=torch.tensor([ids])).logits[0, -1])

    return last(base), last(adapted)


def measure(model: PreTrainedModel, base: Path, kind: str, case: Case, options: argparse.Namespace) -> dict:
    """One case on one base file."""
    case = visible(case, model) if STRENGTH[kind] is None else replace(case, strength=STRENGTH[kind])
    with tempfile.TemporaryDirectory() as folder:
        peft = with_adapters(copy.deepcopy(model), case)
        peft.save_pretrained(folder, selected_adapters=["a0"])
        lora = Path(folder) / "a0.gguf"
        to_gguf(Path(folder) / "a0", lora, model=model, dtype="f32")
        vocabulary = model.config.vocab_size
        contexts = {
            name: LlamaCpp(base, case, options.threads, vocabulary, path)
            for name, path in ((BASE, None), (ADAPTED, lora))
        }
        ids = contexts[BASE].seen + contexts[BASE].ids
        want = [logits(ids) for logits in exact(model, case)]
        got = [context.logits() for context in contexts.values()]
        close = torch.nn.functional.cosine_similarity(got[1] - got[0], want[1] - want[0], dim=0).item()
        if not close >= CLOSE[kind]:
            raise ContenderError(
                f"{kind}, {case}: what the adapter changes has cosine {close:.4f} to PEFT's in float64;"
                f" expected at least {CLOSE[kind]}"
            )
        rounds = max(4, options.rounds // 4) if case.tokens > 1 else options.rounds
        seconds = take_turns({n: lambda i, c=c: timed(c.step) for n, c in contexts.items()}, rounds)
        for context in contexts.values():
            context.close()
    rows = [
        {"contender": n, "seconds": vars(quartiles(s)), "ratio": vars(ratios(s, seconds[BASE]))}
        for n, s in seconds.items()
    ]
    return {"base": kind, "case": str(case), "cosine": close, "rows": rows}


def table(results: list[dict]) -> list[str]:
    lines = ["| base | case | base alone | with LoRA | ratio | cosine |", "|---|---|---|---|---|---|"]
    for result in results:
        base, adapted = result["rows"]
        times = f"{duration(base['seconds'])} | {duration(adapted['seconds'])}"
        ratio = with_quartiles(adapted["ratio"], ".3f")
        lines.append(f"| {result['base']} | {result['case']} | {times} | {ratio} | {result['cosine']:.5f} |")
    return lines


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_llama_cpp", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="of a decode step; a prefill has a quarter of them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("cpu-results"), help="folder for llama_cpp.json")
    options = parser.parse_args(arguments)
    options.model, options.layers, options.dtype = "smollm2", None, "float32"
    torch.set_num_threads(options.threads)
    about = machine(options) | {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")}
    model = load_base("smollm2", None, torch.float32)
    source = demo_model.folder() / demo_model.GGUF
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, base in (("float32", float32_file(source, Path(folder) / "base.gguf")), ("Q4_1", source)):
            for case in CASES:
                results.append(measure(model, base, kind, case, options))
                print(table(results[-1:])[-1], flush=True)
    print("\n".join(table(results)))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "llama_cpp.json").write_text(json.dumps({"machine": about, "cases": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
