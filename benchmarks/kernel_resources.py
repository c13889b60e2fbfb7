"""What every variant of the Triton kernels compiles to: `python -m benchmarks.kernel_resources [--write]` (2 minutes).

These are outputs of compilers, not timings: nothing here was run, and no GPU is needed. Registers are of a thread,
spilled bytes too, shared memory is of a program; programs are how many of them fit on one multiprocessor at once.
Instructions are counted in the code, so once however often a loop runs them. --write puts the table in docs/kernels.md.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from tests.kernels.ahead import TARGETS, VARIANTS, Launch, Variant, launches_of, resources_of

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- begin: benchmarks.kernel_resources -->", "<!-- end: benchmarks.kernel_resources -->"
HEAD = (
    "variant", "kernel", "target", "warps", "registers", "spilled", "shared", "programs", "matrix instructions",
    "loads", "128-bit loads",
)  # fmt: skip


def row_of(variant: Variant, launch: Launch, target: str) -> tuple[object, ...]:
    name = launch.kernel.__name__.removesuffix("_kernel")
    try:
        found = resources_of(target, launch.compile(target))
    except Exception as error:  # one variant that does not compile is a row, not the end of the table
        return (variant, name, target, f"{type(error).__name__}: {error}".splitlines()[0], *[""] * (len(HEAD) - 4))
    numbers = (found.warps, found.registers, found.spilled, found.shared, found.programs)
    return (variant, name, target, *numbers, counted(found.matrix), found.loads, counted(found.wide_loads))


def counted(names: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(names.items())) or "-"


def table() -> str:
    lines = [HEAD, ["---"] * len(HEAD)]
    for variant in VARIANTS:
        for target in TARGETS:
            lines += [row_of(variant, launch, target) for launch in launches_of(variant.call, target)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write(text: str) -> None:
    """Between the markers, which a page that lacks them gets at its end."""
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# The Triton kernels\n"
    if BEGIN not in page:
        page += f"\n{BEGIN}\n{END}\n"
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"put the table in docs/{PAGE.name}")
    wanted = parser.parse_args()
    text = table()
    print(text)
    if wanted.write:
        write(text)


if __name__ == "__main__":
    main()
