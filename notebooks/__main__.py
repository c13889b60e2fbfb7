"""Runs notebooks and saves them with their outputs: all, or those named: `python -m notebooks 2_inside`."""

from __future__ import annotations

import sys
import time

import nbformat

from notebooks.running import execute, notebooks, problems


def main() -> int:
    wanted = sys.argv[1:]
    failed = False
    for path in notebooks():
        if wanted and not any(path.stem.startswith(name) for name in wanted):
            continue
        started = time.perf_counter()
        notebook = execute(path)
        for problem in problems(notebook):
            failed = True
            print(f"{path.name}: {problem}", file=sys.stderr)
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s, {path.stat().st_size:,} bytes")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
