"""Right beside every tensor lies memory that is not the kernels': NaN, or numbers that would pass for a table's."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.cases import CAN_RUN_KERNELS, INTERPRETED, MIXED, Case, assert_delta, make_case

if not CAN_RUN_KERNELS:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from lorafx.kernels import sgmv

MARGIN = 4096  # elements on either side
SLOT, ROWS = 3, 30  # a slot that exists; more rank rows than a window has


def framed(tensor: Tensor, around: float) -> Tensor:
    """A contiguous copy with a margin on either side."""
    storage = tensor.new_full((tensor.numel() + 2 * MARGIN,), around)
    inner = storage[MARGIN:-MARGIN].view(tensor.shape)
    inner.copy_(tensor)
    return inner


def framed_inputs(case: Case) -> Case:
    floats = {name: framed(getattr(case, name), torch.nan) for name in ("x", "weights", "scale")}
    lists = {name: [framed(t, torch.nan) for t in getattr(case, name)] for name in ("ys", "a", "b")}
    return replace(case, **floats, **lists, slots=framed(case.slots, SLOT), windows=framed(case.windows, ROWS))


@pytest.fixture
def taken(monkeypatch):
    """The memory that the op takes, with margins; it holds NaN before the kernels run."""
    tensors = []

    def empty(*shape, **kwargs):
        tensors.append(framed(torch.empty(*shape, **kwargs).fill_(torch.nan), torch.nan))
        return tensors[-1]

    def empty_like(tensor, **_):
        return empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    fake_torch = SimpleNamespace(**{**vars(torch), "empty": empty, "empty_like": empty_like})
    monkeypatch.setattr(sgmv, "torch", fake_torch)
    return tensors


@pytest.fixture
def addresses(monkeypatch):
    """Every address that the kernels load from or store to, where the interpreter runs them."""
    if not INTERPRETED:
        return []
    from triton.runtime import interpreter

    memory, touched = interpreter._interpreter, []

    def load(pointers, mask, *rest):
        touched.append(np.unique(pointers[mask]))
        return memory.load(pointers, mask, *rest)

    def store(pointers, values, mask):
        touched.append(np.unique(pointers[mask]))
        return memory.store(pointers, values, mask)

    monkeypatch.setattr(interpreter, "_interpreter", SimpleNamespace(**{**vars(memory), "load": load, "store": store}))
    return touched


@pytest.mark.parametrize(
    ("tokens", "repeats", "few_rows"),
    [((), 1, 512), ((5,), 1, 512), ((), 9, 16)],
    ids=["decode", "prefill", "flat"],
)
@pytest.mark.parametrize("last", [(3, 1.0), (1, 1.0)], ids=["last slot", "first slots"])
def test_nothing_beside_a_tensor_is_touched(tokens, repeats, few_rows, last, taken, addresses, monkeypatch):
    """Three siblings, of which a program of the shrink takes four; a rank, a width and a k that no block divides."""
    monkeypatch.setattr("lorafx.kernels.schedule.FEW_ROWS", few_rows)
    entries = [*MIXED, [(0, 0.5), last]]
    case = make_case((8, 0, 3), entries=entries, tokens=tokens, repeats=repeats, k=600, bias=True, separate_a=True)
    inputs = framed_inputs(case)
    assert_delta(case, inputs.run("triton"))
    assert len(taken) == 4  # three outputs and the scratch
    for tensor in taken:
        storage = tensor.new_empty(0).set_(tensor.untyped_storage())
        assert storage[:MARGIN].isnan().all()
        assert storage[-MARGIN:].isnan().all()

    given = [t for value in inputs.args() for t in (value if isinstance(value, list) else [value])]
    tensors = [t for t in (*given, *taken) if isinstance(t, Tensor)]
    left = np.unique(np.concatenate([np.zeros(0, dtype=np.uint64), *addresses]))
    assert not INTERPRETED or len(left)
    for tensor in tensors:
        left = left[(left < tensor.data_ptr()) | (left >= tensor.data_ptr() + tensor.nbytes)]
    assert not len(left), f"{len(left)} addresses beside the tensors were touched"


@pytest.mark.parametrize("tokens", [(), (5,)], ids=["decode", "prefill"])
def test_bias_in_the_first_row(tokens):
    """Only a negative row means that there is no bias."""
    case = make_case(entries=[[(0, 1.0)]] * 2, bias=True, tokens=tokens)
    windows = case.windows.clone()
    for i, b in enumerate(case.b):
        b[0] = b[windows[0, i, 2]]
        windows[0, i, 2] = 0
    case = replace(case, windows=windows)
    assert_delta(case, case.run("triton"))
