"""Tries lorafx on a tiny model of every type that a library knows. `python -m tests.sweep --out docs/sweep.json`

    --only NAME ...                      these types alone, anew; without it, those that the file does not have yet
    --library transformers|diffusers     transformers where nothing is said

Each type runs in a process of its own, with limits of time and memory; ``tests/sweep_case.py`` says what it does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# of one type: seconds of the processor, and of the clock; addresses, of which torch takes several GiB unused
SECONDS, PATIENCE, MEMORY = 60, 300, 12 << 30


def sweep(names: Sequence[str], out: Path | None, again: bool = False, library: str = "transformers") -> dict[str, Any]:
    """name -> what was found; ``out`` is written anew after each. again: those that it has, too"""
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    os.environ["LORAFX_VALIDATE"] = "1"
    transformers.logging.set_verbosity_error()
    import peft  # noqa: F401

    import lorafx  # noqa: F401
    from tests import sweep_case  # noqa: F401

    found = json.loads(out.read_text(encoding="utf-8")) if out and out.exists() else {}
    for name in names:
        if name in found and not again:
            continue
        started = time.perf_counter()
        found[name] = {"library": library, **in_a_process(name, library)}
        print(f"{name}: {json.dumps(found[name])} ({time.perf_counter() - started:.1f} s)", flush=True)
        if out:
            lines = [f"{json.dumps(key)}: {json.dumps(found[key])}" for key in sorted(found)]
            out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return found


def in_a_process(name: str, library: str) -> dict[str, Any]:
    """What a child finds, which has everything imported already; "stage" is "stopped" where it does not live to say."""
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_child, args=(name, library, there))
    child.start()
    there.close()
    try:
        found = here.recv() if here.poll(PATIENCE) else None
        reason = f"takes more than {PATIENCE} s"
    except EOFError:
        found, reason = None, f"the process ended: a crash, or more than {SECONDS} s of work"
    child.kill()
    child.join()
    return found or {"stage": "stopped", "reason": reason}


def _child(name: str, library: str, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    from tests import sweep_case

    try:
        found = sweep_case.run_case(name, _library(library))
    except Exception as error:
        found = {"stage": "stopped", "reason": sweep_case.told(error)}
    pipe.send(found)


def _library(name: str) -> Any:
    from tests import tiny_diffusers, tiny_models

    return {"transformers": tiny_models, "diffusers": tiny_diffusers}[name]


def names_of(library: str) -> list[str]:
    """All types, those that differ most early, and parts of others at the end."""
    from tests import tiny_models

    if library == "diffusers":
        return _library(library).types()
    parts = re.compile(r"_(text|vision|audio|encoder|decoder|model|qformer|assistant)(_|$)")
    causal = tiny_models.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    whole = [name for name in tiny_models.types() if not parts.search(name)]
    others = [name for name in whole if name not in causal]
    mixed = itertools.zip_longest([name for name in whole if name in causal], others[::2], others[1::2])
    first = [name for names in mixed for name in names if name]
    return [*first, *(name for name in tiny_models.types() if parts.search(name))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", metavar="NAME")
    parser.add_argument("--library", choices=("transformers", "diffusers"), default="transformers")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    sweep(chosen.only or names_of(chosen.library), chosen.out, chosen.only is not None, chosen.library)
