"""Writes the tables of docs/coverage.md from the lists that the tests run through. `python -m tests.coverage_page`

`--measure` runs every family first, some minutes (`--measure llama t5`: these alone), and keeps what it measured in
docs/coverage.json; without it the tables are made of what is kept there.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

from tests import coverage_data
from tests.integration import (
    test_convolutions,
    test_embeddings,
    test_errors,
    test_experts,
    test_family_roads,
    test_generate,
    test_left_to_peft,
    test_peft_verbs,
)
from tests.integration.families import FAMILIES
from tests.integration.groups import FIRST
from tests.kernels import cases, test_layer_ops
from tests.passes import test_left_alone, test_spellings

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
PART = re.compile(r"<!-- begin: (\w+) -->\n.*?<!-- end: \1 -->", re.DOTALL)


def families() -> str:
    """One row for each family and choice of targets: which groups of its model become one op."""
    head = ("family", "model", "targets", "layers", "groups, each one op", "branches fused", "left to PEFT")
    always = ", ".join(FIRST)
    others = [
        f"- a PeftModel in place, q, k and v: {', '.join(FAMILIES)}",
        f'- `backend="lorafx"` on plain PEFT, all-linear, float32 and bf16: {", ".join(test_family_roads.SMALL)}',
        f"- run with every change, the others with `make slow`, but for q, k, v and all-linear in float32: {always}",
    ]
    return "\n".join([table(head, coverage_data.fused()), "", *others])


def errors() -> str:
    """One row for each case: how far from float64, lorafx beside PEFT."""
    head = ("family", "targets", "base", "one adapter", "PEFT's", "mixed batch", "PEFT's")
    return table(head, coverage_data.errors())


def spellings() -> str:
    """Every spelling of a branch that is found, with its code."""
    rows = [(name, "any graph", code) for name, code in code_of(test_spellings, "SPELLINGS")]
    rows += [(name, "a graph with shapes", code) for name, code in code_of(test_spellings, "SHAPED")]
    return table(("spelling", "found in", "as code"), rows)


def look_alikes() -> str:
    """What is left as it is, with the reason that is told."""
    reasons = {name: f"`...{reason}...`" for name, (_, reason) in test_left_alone.LOOK_ALIKES.items()}
    rows = [(name, reasons[name], code) for name, code in code_of(test_left_alone, "LOOK_ALIKES")]
    rows += [
        (name, "no look-alike: left without a word", code) for name, code in code_of(test_left_alone, "OTHER_THINGS")
    ]
    return table(("what", "reason told", "as code"), rows)


def calls() -> str:
    """PEFT's verbs, generate's ways, kinds of layers that stay with PEFT, ranks of a group."""
    verbs = (verb.__name__.replace("_", " ") for verb in test_peft_verbs.TRACE_NOTHING)
    return table(
        ("what", "tested"),
        [
            ("done to a compiled PeftModel, without a new trace, each as plain PEFT does it", listed(verbs)),
            ("hotswap_adapter, by", listed(test_peft_verbs.SWAPS)),
            ("generate with names row by row, token for token as PEFT", listed(test_generate.WAYS)),
            ("LoRA on embeddings, one adapter and row by row", listed(test_embeddings.CASES)),
            ("LoRA on positions, one adapter for the batch", listed(test_embeddings.POSITIONS)),
            ("LoRA on convolutions, as the ops", listed(test_layer_ops.WINDOWS)),
            ("LoRA on experts, row by row as PEFT alone, from files and on PeftModels", listed(test_experts.NAMES)),
            ("left to PEFT, bit for bit, and reported", listed(test_errors.KINDS)),
            (
                "left to PEFT, and refused by name from a file",
                listed({**test_convolutions.LEFT, **test_left_to_peft.KINDS}),
            ),
            ("ranks of the siblings of a group, in each lowering", listed(cases.RANKS)),
        ],
    )


PARTS = {"families": families, "errors": errors, "calls": calls, "spellings": spellings, "look_alikes": look_alikes}


def code_of(module: ModuleType, name: str) -> Iterable[tuple[str, str]]:
    """(key, code) of a dict of functions, or of tuples that begin with one, that stands in ``module``."""
    body = ast.parse(inspect.getsource(module)).body
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    found = next(n.value for n in body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == name)
    for key, value in zip(found.keys, found.values, strict=True):
        value = value.elts[0] if isinstance(value, ast.Tuple) else value
        if isinstance(value, ast.Lambda):
            code = ast.unparse(value.body)
        elif value.id in functions:
            code = "; ".join(map(ast.unparse, functions[value.id].body))
        else:  # of tests/passes/toys.py
            code = re.sub(r"\s+", " ", inspect.getsource(getattr(module, value.id)).rpartition("return ")[2]).strip()
        yield key.value, f"`{code}`"


def listed(names: Iterable[str]) -> str:
    return "; ".join(names)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def written(page: str) -> str:
    """``page`` with its parts made anew. KeyError: a part that there is no function for."""
    made = {name: part() for name, part in PARTS.items()}
    return PART.sub(lambda found: f"<!-- begin: {found[1]} -->\n\n{made[found[1]]}\n\n<!-- end: {found[1]} -->", page)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", nargs="*", metavar="FAMILY", help="run the families first, all or these")
    chosen = parser.parse_args().measure
    if chosen is not None:
        coverage_data.measure(chosen)
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)
