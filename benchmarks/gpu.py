"""LoRA on a GPU at Llama-3-8B's shapes, with one command: ``python -m benchmarks.gpu``.

First part: one group of layers (q,k,v; o; gate,up; down), its base GEMMs alone and with LoRA. Second part: whole
forward passes of a few layers: the base model compiled, lorafx, PEFT eager, compiled and merged, polylora where it is
installed. What a contender computes is checked before it is timed: kernels against float64, models by their distance
from PEFT in float64. Times are medians of CUDA events around CUDA graphs that take turns; weights are so many that none
is found in the L2 cache. Results go to a folder: a plot, and the numbers as JSON.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import triton

BF16, F32 = torch.bfloat16, torch.float32


def kernel_cases(quick: bool) -> Iterator:
    from benchmarks.gpu_kernels import GROUPS, MIXED, Case

    shapes = [(1, 1, (16,)), (8, 1, MIXED), (64, 1, (16,) * 8), (1, 512, (16,)), (8, 512, MIXED)]
    if not quick:
        shapes += [
            (1, 1, (8,)),
            (1, 1, (128,)),
            (64, 1, (16,) * 64),
            (1, 128, (16,)),
            (1, 2048, (16,)),
            (1, 8192, (16,)),
        ]
    for rows, tokens, ranks in shapes:
        for group in GROUPS:
            for dtype in (BF16, F32):
                yield Case(group, rows, tokens, ranks, dtype)


def model_cases(quick: bool) -> Iterator:
    from benchmarks.forward_pass import ALL, QKV, Case
    from benchmarks.gpu_kernels import MIXED

    yield Case(1, 1, (16,), ALL)
    yield Case(8, 1, MIXED, ALL)
    yield Case(1, 1, (16,), QKV)
    yield Case(8, 1, MIXED, ALL, in_use=0)
    yield Case(1, 512, (16,), ALL)
    if not quick:
        yield Case(1, 1, (16,), ALL, BF16)
        yield Case(8, 1, MIXED, ALL, BF16)
        yield Case(8, 1, MIXED, QKV)
        yield Case(1, 512, (16,), ALL, BF16)
        yield Case(64, 1, (16,) * 8, ALL, BF16)
        yield Case(4, 512, MIXED[:4], ALL)


def machine() -> dict[str, str]:
    """What the numbers were taken on."""
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "peft")}
    return {
        "gpu": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        **versions,
    }


def describe(case) -> dict[str, str]:
    """A kernel case as the results file and the plot have it."""
    return {
        "case": str(case),
        "group": case.group,
        "batch": f"{case.rows} x {case.tokens} tokens, {case.adapters}",
        "adapter_dtype": str(case.adapter_dtype).removeprefix("torch."),
    }


def show_kernels(cases: Iterable) -> Iterator[dict]:
    from benchmarks.gpu_kernels import measure

    print("| group, batch, adapters | base GEMMs | lorafx | not folded | PEFT's ops |\n|---|---|---|---|---|")
    for case in cases:
        times = measure(case)
        torch.cuda.empty_cache()
        base = times["base"]
        others = [times.get(name) for name in ("lorafx", "apart", "branches")]
        cells = ["" if t is None else f"{t:.1f} us ({t / base:.2f})" for t in others]
        print(f"| {case} | {base:.1f} us | {' | '.join(cells)} |", flush=True)
        yield {**describe(case), **times}


def compile_only(kernels: Iterable, models: Iterable, layers: int) -> None:
    """Several processes may do this side by side, before one of them measures."""
    from benchmarks.forward_pass import LLAMA_8B, make_base
    from benchmarks.gpu_kernels import Data
    from benchmarks.gpu_model import contenders

    for case in kernels:
        data = Data(case, "cuda")
        data.lorafx(0)
        data.apart(0)
    torch._dynamo.config.recompile_limit = 64
    base = make_base(layers, LLAMA_8B, "cuda", BF16)
    for case in models:
        torch._dynamo.reset()
        for name, step in contenders(base, case).items():
            if name != "polylora":
                step()


def show_models(cases: Iterable, layers: int) -> Iterator[dict]:
    from benchmarks.forward_pass import LLAMA_8B, make_base
    from benchmarks.gpu_model import measure

    torch._dynamo.config.recompile_limit = 64  # every contender is another model with the same forward
    base = make_base(layers, LLAMA_8B, "cuda", BF16)
    print("\n| forward pass | contender | a layer | ratio | from Python | distance |\n|---|---|---|---|---|---|")
    for case in cases:
        torch._dynamo.reset()
        results = measure(base, case)
        for name, result in results.items():
            graph = result["graph_ms"]
            ratio = "" if graph is None else f"{graph / results['base']['graph_ms']:.3f}"
            layer = "no CUDA graph" if graph is None else f"{1000 * graph / layers:.1f} us"
            print(
                f"| {case} | {name} | {layer} | {ratio} | {result['call_ms']:.2f} ms | {result['distance']:.1e} |",
                flush=True,
            )
        yield {"case": str(case), "layers": layers, "contenders": results}
        torch.cuda.empty_cache()


def plot(results: dict, path: Path) -> None:
    """Ratios to the base: forward passes on the left; on the right groups of layers, with float32 adapters."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(17, 9), layout="constrained")
    colors = {"lorafx": "C0", "PEFT compiled": "0.55", "PEFT": "0.8"}
    passes = results["models"][::-1]
    for offset, name in zip((0.25, 0, -0.25), colors, strict=True):
        found = [(i, model["contenders"]) for i, model in enumerate(passes)]
        timed = [(i, one) for i, one in found if one[name]["graph_ms"] is not None]
        ratios = [one[name]["graph_ms"] / one["base"]["graph_ms"] for _, one in timed]
        bars = left.barh([i + offset for i, _ in timed], ratios, 0.25, label=name, color=colors[name])
        left.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    left.set_yticks(range(len(passes)), [model["case"] for model in passes])
    left.set_title("time of a forward pass / the base model's, compiled; CUDA graphs")

    kernels = [k for k in results["kernels"][::-1] if k["adapter_dtype"] == "float32"]
    batches, groups = list(dict.fromkeys(k["batch"] for k in kernels)), list(dict.fromkeys(k["group"] for k in kernels))
    for j, group in enumerate(groups):
        ours = {k["batch"]: k["lorafx"] / k["base"] for k in kernels if k["group"] == group}
        right.barh([i + 0.2 * j - 0.3 for i in range(len(batches))], [ours[b] for b in batches], 0.2, label=group)
    right.set_yticks(range(len(batches)), batches)
    right.set_title("base GEMMs of a group with lorafx / without")
    for axes in (left, right):
        axes.axvline(1, color="black", linewidth=1)
        axes.legend()
    figure.suptitle(f"{results['machine']['gpu']}, {results['machine']['date']}, Llama-3-8B's layers, bfloat16 base")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of the models (Llama-3-8B has 32)")
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--only", choices=("kernels", "models"), help="one of the two parts")
    parser.add_argument("--match", default="", help="only cases whose description contains this")
    parser.add_argument(
        "--compile-only",
        metavar="N/M",
        help="time nothing: fill the caches for every M-th case, beginning with the N-th",
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for what is found")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("No GPU was found (torch.cuda.is_available() is False): nothing was measured.", file=sys.stderr)
        return 1
    warnings.filterwarnings("ignore")
    options.out.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine(), "kernels": [], "models": []}
    print(", ".join(f"{name}: {value}" for name, value in results["machine"].items()), "\n")
    kernels, models = (
        [case for case in cases(options.quick) if options.match in str(case)] for cases in (kernel_cases, model_cases)
    )
    if options.compile_only is not None:
        first, step = map(int, options.compile_only.split("/"))
        compile_only(kernels[first::step], models[first::step], options.layers)
        return 0
    parts = {
        "kernels": show_kernels(kernels) if options.only != "models" else (),
        "models": show_models(models, options.layers) if options.only != "kernels" else (),
    }
    for part, cases in parts.items():
        for found in cases:
            results[part].append(found)
            (options.out / "gpu.json").write_text(json.dumps(results, indent=1))
    try:
        plot(results, options.out / "gpu.png")
    except ImportError as error:
        print(f"no plot: {error}; pip install 'lorafx[benchmarks]' brings what draws it", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
