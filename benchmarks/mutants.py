"""Wrong kernels, and the tests that catch them: `python -m benchmarks.mutants`. Needs no GPU; takes ten minutes.

    before    live = r < rank
    after     live = r <= rank        test_ranks[3x8-decode] must fail

Every mutant is one change at one place of a kernel, in a temporary copy of the package whose tests run in Triton's
interpreter. It is caught where a test fails, crashes or hangs. One that survives either shows a test that is missing
or changes no result; the latter stand in ``EQUIVALENT`` with the reason. Exit status 1: a survivor does not.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).parents[1]
KERNELS = ("_shrink.py", "_expand.py", "_layers.py")
TESTS = "tests/kernels/triton_lowering/"
FILES = (TESTS + "test_layers.py", TESTS + "test_sgmv.py", TESTS + "test_edges.py")
# A few broad ones go first: with -x they are the last to run for most mutants.
FIRST = (
    "test_k[1030-decode] test_k[1030-prefill] test_several_pairs[decode] test_several_pairs[prefill] "
    "test_bias[False-decode] test_bias[False-prefill] test_tile_spans_rows[3-7] "
    "test_float32_adapters_on_16_bit_base[base0] test_widths_and_k[1030-widths0-1] test_widths_and_k[1030-widths1-3]"
).split()

COMPARE = {ast.Lt: "< <=", ast.LtE: "<= <", ast.Gt: "> >=", ast.GtE: ">= >", ast.Eq: "== !="}
ARITHMETIC = {ast.Add: "+ -", ast.Sub: "- +", ast.Mult: "* +", ast.FloorDiv: "// *", ast.Mod: "% //"}
CALLS = {"tl.max": "tl.min", "tl.minimum": "tl.maximum", "low_part": "high_part", "high_part": "low_part"}

POINTER = re.compile(r"_(ptr|rows|columns|lanes)\b")  # an address without its pointer fails at once, and shows nothing

# Mutated statement -> why no test can tell it from the kernel.
EQUIVALENT = {
    "first_entry = entry_of(first * row_tokens if SPANS else row, rows, count_ptr)": (
        "a tile spans rows only where a row is one token, so row_tokens is 1"
    ),
    "rank = tl.where(sibling <= SIBLINGS, pick(sibling, RANKS, tl.int32), 0)": (
        "past the last sibling a lane has the first one's pointer, lanes and rank: the same numbers are stored twice"
    ),
    "if ALIGNED and TOGETHER > 1 and SIBLINGS >= 1:": (
        "a promise to the compiler, as true of one pointer as of several"
    ),
    "mine = mine": (
        "what is summed besides are lanes of this adapter for tokens of other ones, which read no lanes but theirs"
    ),
    "if BLOCK_M == 2:": (
        "the other branch takes a tile of one token too, where tl.dot does: in the interpreter, on no GPU"
    ),
}

# Every run of the tests checks first that they import the copy and not the checkout; then it puts FIRST in front.
CONFTEST = f"""
from pathlib import Path
import lorafx, lorafx.kernels, lorafx.kernels.sgmv, tests
from lorafx.kernels import _expand, _layers, _routing, _shrink
here = Path(__file__).parent
for module in (lorafx, lorafx.kernels, lorafx.kernels.sgmv, _shrink, _expand, _layers, _routing, tests):
    if not Path(module.__file__).is_relative_to(here):
        raise RuntimeError(f"{{module.__name__}} comes from {{module.__file__}}, not from {{here}}")

def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.name not in {FIRST})
"""


@dataclass(frozen=True)
class Mutant:
    """``source[start:end]`` replaced; before and after are the statement's lines around it, for the table."""

    kind: str
    line: int
    source: str
    before: str
    after: str


def mutants(source: str) -> Iterator[Mutant]:
    """Every mutant of the one kernel in a file; signature, docstring and comments are left alone."""
    starts = list(accumulate((len(line) for line in source.splitlines(keepends=True)), initial=0))
    kernel = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))

    def begin(node: ast.expr) -> int:
        return starts[node.lineno - 1] + node.col_offset

    def end(node: ast.expr) -> int:
        return starts[node.end_lineno - 1] + node.end_col_offset

    for statement in kernel.body[1:]:
        for node in ast.walk(statement):
            for kind, first, last, new in _changes(node, source, begin, end):
                last_line = (node.iter if isinstance(node, ast.For) else node).end_lineno
                around = source[starts[node.lineno - 1] : first], source[last : starts[last_line]]
                before, after = (
                    " ".join(middle.join(around).split("#")[0].split()) for middle in (source[first:last], new)
                )
                yield Mutant(kind, node.lineno, source[:first] + new + source[last:], before, after)


def _changes(node: ast.AST, source: str, begin, end) -> Iterator[tuple[str, int, int, str]]:
    """(kind, start, end, new text) of what may be changed at a node of the syntax tree."""

    def text(kept: ast.expr) -> str:
        found = source[begin(kept) : end(kept)]
        return f"({found})" if isinstance(kept, (ast.BinOp, ast.Compare, ast.IfExp)) else found

    def between(left: ast.expr, right: ast.expr, old: str, new: str) -> tuple[int, int, str]:
        gap = source[end(left) : begin(right)]
        assert gap.count(old) == 1, gap
        return end(left), begin(right), gap.replace(old, new)

    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
        yield "compare", *between(node.left, node.comparators[0], *COMPARE[type(node.ops[0])].split())
    elif isinstance(node, ast.BinOp):
        if type(node.op) in ARITHMETIC:
            yield "arithmetic", *between(node.left, node.right, *ARITHMETIC[type(node.op)].split())
        if isinstance(node.op, (ast.BitAnd, ast.Add, ast.Mult)):
            for kept, dropped in ((node.left, node.right), (node.right, node.left)):
                if not POINTER.search(text(dropped)):
                    yield "mask" if isinstance(node.op, ast.BitAnd) else "term", begin(node), end(node), text(kept)
    elif isinstance(node, ast.AugAssign):
        if type(node.op) in ARITHMETIC:
            old, new = ARITHMETIC[type(node.op)].split()
            yield "arithmetic", *between(node.target, node.value, old + "=", new + "=")
        if isinstance(node.op, (ast.BitAnd, ast.Add)):
            kind, old = ("mask", "&=") if isinstance(node.op, ast.BitAnd) else ("term", "+=")
            yield kind, *between(node.target, node.value, old, "=")
            yield kind, end(node.target), end(node.value), f" = {text(node.target)}"
    elif isinstance(node, ast.Constant) and type(node.value) is int and node.value in (0, 1):
        yield "constant", begin(node), end(node), str(node.value + 1)
    elif isinstance(node, ast.keyword) and node.arg == "mask" and not isinstance(node.value, ast.BinOp):
        yield "mask", begin(node.value), end(node.value), f"{text(node.value)} | True"
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
        yield "call", begin(node.func), end(node.func), CALLS[ast.unparse(node.func)]
    elif isinstance(node, ast.For):
        bounds = node.iter.args
        step = text(bounds[2]) if len(bounds) == 3 else "1"
        stop = bounds[0] if len(bounds) == 1 else bounds[1]
        yield "loop", begin(stop), end(stop), f"{text(stop)} - {step}"
        if len(bounds) > 1:
            yield "loop", begin(bounds[0]), end(bounds[0]), f"{text(bounds[0])} + {step}"
        if len(bounds) == 3:
            yield "loop", begin(bounds[2]), end(bounds[2]), f"2 * {step}"


def sample(source: str, count: int, seed: int) -> list[Mutant]:
    """``count`` mutants, in turn from every kind, by line."""
    generator, kinds = random.Random(seed), {}
    for mutant in mutants(source):
        kinds.setdefault(mutant.kind, []).append(mutant)
    for same in kinds.values():
        generator.shuffle(same)
    chosen = []
    while len(chosen) < count and any(kinds.values()):
        chosen += [same.pop() for same in kinds.values() if same]
    return sorted(chosen[:count], key=lambda mutant: mutant.line)


def copy_package(folder: Path) -> None:
    """lorafx as it is when installed, its tests beside it, and the check that these are what Python imports."""
    ignore = shutil.ignore_patterns("__pycache__")
    for source, target in (("lorafx", "lorafx"), ("passes", "lorafx/passes"), ("kernels", "lorafx/kernels")):
        shutil.copytree(ROOT / source, folder / target, ignore=ignore)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "conftest.py").write_text(CONFTEST)


def caught_by(folder: Path, timeout: float | None) -> str | None:
    """The first test to fail, or how the run ended instead; None: all pass."""
    files = [name for name in FILES if (folder / name).exists()]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", *files]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return "hang"
    if done.returncode < 0:
        return f"crash (signal {-done.returncode})"
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest could not run the tests:\n{done.stdout}{done.stderr}")
    failed = re.search(r"^(?:FAILED|ERROR) \S+::(.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return failed[1] if failed else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="mutants of each kernel")
    parser.add_argument("--seed", type=int, default=0, help="which of the possible mutants")
    parser.add_argument("--kernel", choices=KERNELS, help="of this one alone")
    args = parser.parse_args()

    missed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy_package(folder)
        start = time.monotonic()
        if failed := caught_by(folder, timeout=None):
            raise RuntimeError(f"{failed} fails without any mutant")
        timeout = 60 + 3 * (time.monotonic() - start)
        for file in [args.kernel] if args.kernel else KERNELS:
            path = folder / "lorafx" / "kernels" / file
            original = path.read_text()
            for mutant in sample(original, args.count, args.seed):
                path.write_text(mutant.source)
                verdict = caught_by(folder, timeout)
                if verdict is None:
                    reason = EQUIVALENT.get(mutant.after)
                    verdict = f"equivalent: {reason}" if reason else "SURVIVED"
                    missed += reason is None
                print(f"{file}:{mutant.line}  {mutant.kind}  {verdict}", flush=True)
                print(f"    {mutant.before}\n    {mutant.after}", flush=True)
            path.write_text(original)
    print(f"\n{missed} survived")
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
