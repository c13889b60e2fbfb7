"""The GPU benchmark as far as a machine without a GPU can run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import forward_pass, gpu, gpu_kernels, gpu_model
from benchmarks.gpu_kernels import Case, Data


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "results")]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "No GPU was found" in run.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "tokens", "ranks"), [(1, 1, (4,)), (5, 3, (2, 8))])
def test_contenders_compute_the_same(rows, tokens, ranks, adapter_dtype, monkeypatch):
    monkeypatch.setitem(gpu_kernels.GROUPS, "q,k,v", (64, (64, 32, 32)))
    data = Data(Case("q,k,v", rows, tokens, ranks, adapter_dtype), "cpu")
    assert max(data.errors()) <= 1e-4
    if len(ranks) == 1:
        for ours, theirs, base in zip(data.lorafx(0), data.branches(0), data.base(0), strict=True):
            added = (theirs - base).norm()
            assert added > 0
            assert (ours - theirs).norm() <= 0.02 * added


def test_a_wrong_result_is_seen(monkeypatch):
    monkeypatch.setitem(gpu_kernels.GROUPS, "q,k,v", (64, (64, 32, 32)))
    data = Data(Case("q,k,v", 2, 3, (4, 8), torch.float32), "cpu")
    data.slots[1, 0] = 0  # the second row takes the first adapter
    assert data.errors()[0] > 0.1


def test_cases_are_told_apart():
    cases = [str(case) for quick in (False, True) for case in gpu.kernel_cases(quick)]
    assert len(set(cases)) == len(list(gpu.kernel_cases(False)))
    models = [str(case) for case in gpu.model_cases(False)]
    assert len(set(models)) == len(models)


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=64)
def test_models_of_the_benchmark():
    """A tiny model on a CPU: every contender runs, and each is as near to PEFT in float64 as PEFT is."""
    torch._dynamo.reset()
    base = forward_pass.make_base(2, forward_pass.TINY, "cpu", torch.bfloat16)
    for case in (
        forward_pass.Case(4, 1, (4, 8, 16), forward_pass.ALL),
        forward_pass.Case(2, 7, (8,), forward_pass.QKV, torch.bfloat16),
    ):
        steps = gpu_model.contenders(base, case)
        found = gpu_model.errors(base, case, {name: step().clone() for name, step in steps.items()})
        assert found["base"] > 5 * found["lorafx"], "LoRA adds too little to be seen"
        assert max(error for name, error in found.items() if name != "base") <= 0.02
