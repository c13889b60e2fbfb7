"""What every family measured, kept in docs/coverage.json, and the tables that docs/coverage.md makes of it.

`python -m tests.coverage_page --measure` runs the cases of tests/integration/measuring.py and writes the file;
`--measure llama t5` those of some families, beside what is there.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.integration import measuring
from tests.integration.families import FAMILIES

FILE = Path(__file__).parent.parent / "docs" / "coverage.json"


def read() -> dict[str, dict[str, Any]]:
    """ "family/targets/dtype" -> what ``measuring.measured`` says of it"""
    return json.loads(FILE.read_text(encoding="utf-8"))


def measure(families: Iterable[str] = ()) -> None:
    """Run the cases, one thread each, and write the file anew; of these families alone, where some are named.

    KeyError: no such family
    """
    chosen = {name: FAMILIES[name] for name in families} or FAMILIES
    found = read() if FILE.exists() else {}
    torch.set_num_threads(1)
    for key in measuring.every_key():
        if key[0] in chosen:
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found["/".join(key)] = entry = measuring.measured(measuring.make_case(*key, Path(folder)))
            torch._dynamo.reset()
            print("/".join(key), json.dumps(entry["errors"]), flush=True)
    kept = {"/".join(key): found["/".join(key)] for key in measuring.every_key() if "/".join(key) in found}
    FILE.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def fused() -> list[tuple[str, ...]]:
    """One row for each family and choice of targets: the groups of its model, and what was left, in both dtypes."""
    rows: dict[tuple[str, ...], str] = {}
    for key, entry in read().items():
        name, kind, dtype = key.split("/")
        groups = ", ".join(f"{group} (x{n})" if n > 1 else group for group, n in entry["groups"].items())
        left = "; ".join(f"{n}: {reason}" for reason, n in entry["skipped"].items())
        row = (name, entry["model"], kind, str(entry["layers"]), groups, str(entry["branches"]), left)
        rows[row] = dtype
    return list(rows)


def errors() -> list[tuple[str, ...]]:
    """One row for each case: the worst row's error of one adapter and of a mixed batch, lorafx's beside PEFT's."""
    rows = []
    for key, entry in read().items():
        name, kind, dtype = key.split("/")
        said = [shown(entry["errors"][what][who]) for what in ("one", "mixed") for who in ("lorafx", "peft")]
        rows.append((name, kind, dtype, *said))
    return rows


def shown(error: Sequence[float] | None) -> str:
    return "refused" if error is None else f"{error[0]:.1e}"
