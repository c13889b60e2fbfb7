"""What LoRA costs on this CPU, with one command: ``python -m benchmarks.cpu``. About half an hour.

Whole forward passes of SmolLM2-135M (a decode step behind a static cache, and a prefill) as ratios to the base model
compiled by Inductor without LoRA. The contenders of a case share the base's weights in one process and take turns, in
another order every round; what each computes is held against PEFT in float64 before it is timed. ``--model llama-8b``
does the same with one layer of Llama-3-8B's shape.

Each case runs in a process of its own: none inherits what Dynamo knows or what memory another has taken. polylora takes
part where it is installed (``pip install --no-deps polylora``); on a CPU it runs eagerly, row by row. llama.cpp has a
command of its own, ``python -m benchmarks.cpu_llama_cpp``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from benchmarks import cpu_cases, cpu_compiling, cpu_report, cpu_timing
from benchmarks.cpu_contenders import ContenderError, available, load_base

ROOT = Path(__file__).parent.parent


def machine(options: argparse.Namespace) -> dict[str, str]:
    """What the numbers were taken on, and of which state of the code."""
    info = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    names = {name.strip(): value.strip() for name, value in fields.items()}
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": f"{names.get('model name', 'unknown')}, family {names.get('cpu family')}, model {names.get('model')}",
        "threads": str(options.threads),
        "date": datetime.date.today().isoformat(),
        "model": options.model,
        "layers": str(options.layers or "all"),
        "dtype": options.dtype,
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        "commit": commit or "unknown",
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def measure(number: int, options: argparse.Namespace) -> dict:
    """One case, in this process."""
    torch.set_num_threads(options.threads)
    layers, inductor = options.layers, not options.without_inductor
    if number == cpu_cases.RECOMPILES:
        layers = 1  # the number of graphs is that of any depth, and PEFT compiles eight of them
    base = load_base(options.model, layers, getattr(torch, options.dtype))
    if number == cpu_cases.RECOMPILES:
        return cpu_compiling.recompiles(base, inductor)
    if number == cpu_cases.COMPILE_SECONDS:
        return cpu_compiling.compile_seconds(base)
    torch._dynamo.config.recompile_limit = 64  # contenders may share a forward
    case = cpu_cases.TIMED[number]
    prefill = case.entries[0].forward.tokens > 1
    rounds = max(4, options.rounds // 4) if prefill else options.rounds
    return cpu_timing.measure(case, base, rounds, inductor, options.slow)


def in_own_process(number: int, arguments: list[str]) -> dict | None:
    """None: it failed, and has said why."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "benchmarks.cpu", *arguments, "--case", str(number), "--json", file.name]
        quiet = os.environ | {"TQDM_DISABLE": "1"}  # a bar for each tensor of the model's file
        if subprocess.run(command, cwd=ROOT, env=quiet, check=False).returncode:
            return None
        return json.loads(Path(file.name).read_text())


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=lambda text: [int(part) for part in text.split(",")], help="such as 1,2")
    parser.add_argument("--model", choices=("smollm2", "llama-8b", "tiny"), default="smollm2")
    parser.add_argument("--layers", type=int, help="only the model's first so many, for a quick try")
    parser.add_argument("--rounds", type=int, default=40, help="of a decode step; a prefill has a quarter of them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base model")
    parser.add_argument("--out", type=Path, default=Path("cpu-results"), help="folder for the numbers and the plot")
    parser.add_argument("--slow", action="store_true", help="compile PEFT's mixed batches too, however deep the model")
    parser.add_argument("--case", type=int, help="measure this case alone, in this process")
    parser.add_argument("--json", default="-", help="where --case writes what it found; -: stdout")
    parser.add_argument("--without-inductor", action="store_true", help="run the traced graphs as they are: for tests")
    options = parser.parse_args(arguments)
    there = cpu_cases.numbers()
    options.cases = options.cases or ([options.case] if options.case else there)
    if unknown := set(options.cases) - set(there):
        parser.error(f"no case {min(unknown)}; there are {', '.join(map(str, there))}")
    return options


def run_case(options: argparse.Namespace) -> int:
    try:
        result = measure(options.case, options)
    except ContenderError as error:
        print(f"case {options.case} was not timed: {error}", file=sys.stderr)
        return 1
    text = json.dumps({"title": cpu_cases.title(options.case), **result})
    if options.json == "-":
        print(text)
    else:
        Path(options.json).write_text(text)
    return 0


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    warnings.filterwarnings("ignore")
    if options.case:
        return run_case(options)
    options.out.mkdir(parents=True, exist_ok=True)
    about, results, failed = machine(options), {}, []
    print(", ".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    if float(about["load"]) > 0.5:
        print(
            f"other work runs here (load {about['load']}): threads that wait for it make times useless", file=sys.stderr
        )
    if not available(cpu_cases.POLYLORA):
        print("polylora takes no part: pip install --no-deps polylora brings it", file=sys.stderr)
    for number in options.cases:
        print(f"case {number}: {cpu_cases.title(number)}", file=sys.stderr, flush=True)
        result = in_own_process(number, arguments)
        if result is None:
            failed.append(number)
            continue
        results[number] = result
        print("\n".join(cpu_report.time_table(number, result)), flush=True)
        (options.out / "cpu.json").write_text(json.dumps({"machine": about, "cases": results}, indent=1))
    print("\n".join(cpu_report.memory_table(results)))
    try:
        what = f"{about['model']}, {about['layers']} layers, {about['dtype']}, {about['threads']} threads"
        cpu_report.plot(results, f"{what}; {about['cpu']}; {about['date']}", options.out / "cpu.png")
    except ImportError as error:
        print(f"no plot: {error}; pip install 'lorafx[benchmarks]' brings what draws it", file=sys.stderr)
    if failed:
        print(f"not measured: case {', '.join(map(str, failed))} (why: see above)", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
