"""The siblings' own layers, computed in the shrink's launch: base outputs and deltas apart, each against float64."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cases import (
    BASE,
    CAN_RUN_KERNELS,
    INTERPRETED,
    KERNEL_DEVICE,
    RANKS,
    SIXTEEN_BITS,
    Case,
    assert_delta,
    fold,
    make_case,
    run_folded,
)

if not CAN_RUN_KERNELS:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from lorafx.kernels import sgmv

ENTRIES = [[(0, 1.0)], BASE, [(1, -0.5), (3, 1.0)]]


def assert_folded(case: Case, biases: bool = True, bound: float = 1e-5) -> None:
    """With no adapter in use the outputs are the layers', rounded once; the delta is added to just those, as it is
    without folding."""
    case, layers, added = fold(case, biases)
    idle = replace(case, slots=torch.full_like(case.slots, -1))
    ys = run_folded(idle, layers, added, "triton")
    for y, exact in zip(ys, case.ys, strict=True):
        assert y.dtype == case.x.dtype
        allowed = 1e-5 + (torch.finfo(y.dtype).eps / (1 if INTERPRETED else 2) if y.dtype.itemsize == 2 else 0)
        for row, (one, other) in enumerate(zip(y.double(), exact, strict=True)):
            # of one column, whose sum may cancel, as much as of a column of ordinary size
            assert (one - other).norm() <= allowed * max(other.norm(), 1), f"row {row}"
    outs, apart = run_folded(case, layers, added, "triton"), replace(case, ys=ys)
    for out, other in zip(outs, apart.run("triton"), strict=True):
        assert (out.double() - other.double()).norm() <= 1e-3 * max(other.double().norm(), 1)
    if not INTERPRETED or case.x.dtype != torch.bfloat16:  # the interpreter cuts bfloat16 off
        assert_delta(apart, outs, bound)


@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (17, 1), (1, 5), (3, 5), (2, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS])
def test_rows(rows, dtype):
    batch, tokens = rows
    entries = ENTRIES[:batch]
    case = make_case(entries=entries, repeats=-(-batch // len(entries)), tokens=(tokens,), dtype=dtype)
    assert_folded(case, bound=1e-5 if dtype == torch.float32 else 1e-4)


def test_more_rows_than_a_tile():
    assert_folded(make_case((3,), widths=(40,), k=20, entries=ENTRIES, repeats=24, tokens=(1,)))


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS.keys())
def test_ranks(ranks, tokens):
    assert_folded(make_case(ranks, tokens=(tokens,)))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("widths", [(2049, 1, 17), (1, 64, 300)])
@pytest.mark.parametrize("k", [1, 16, 1030])
def test_widths_and_k(widths, k, rows):
    assert_folded(make_case(widths=widths, k=k, entries=ENTRIES[:rows], tokens=(1,)), biases=rows == 1)


@pytest.mark.parametrize("base", SIXTEEN_BITS)
def test_float32_adapters(base):
    assert_folded(make_case(entries=ENTRIES, tokens=(1,), dtype=base, adapter_dtype=torch.float32, bias=True))


def test_without_batch_dimension():
    case, layers, added = fold(make_case(entries=[[(1, 1.0)]], tokens=()), biases=True)
    outs = run_folded(replace(case, x=case.x[0]), layers, added, "triton")
    for out, whole in zip(outs, run_folded(case, layers, added, "triton"), strict=True):
        assert torch.equal(out, whole[0])


def test_no_rows():
    case, layers, added = fold(make_case(), biases=False)
    outs = run_folded(replace(case, x=case.x[:0]), layers, added, "triton")
    assert [out.shape for out in outs] == [(0, 5, y.shape[-1]) for y in case.ys]


@pytest.mark.parametrize("rows", [1, 3])
def test_weights_are_rows_of_a_wider_matrix(rows):
    """As of a packed projection. What lies between the rows is NaN."""
    case, layers, added = fold(make_case(entries=ENTRIES[:rows], tokens=(1,)), biases=False)
    wide = [torch.cat([w, torch.full_like(w, torch.nan)], 1)[:, : w.shape[1]] for w in layers]
    outs = torch.ops.lorafx.routed_lora(
        [], *case.on(KERNEL_DEVICE).args()[1:], None, "triton", _on_device(wide), [None] * len(wide)
    )
    for out, whole in zip(outs, run_folded(case, layers, added, "triton"), strict=True):
        assert (out.cpu() - whole).norm() <= 1e-6 * whole.norm()


def _on_device(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    return [
        torch.empty_strided(w.shape, w.stride(), dtype=w.dtype, device=KERNEL_DEVICE).copy_(w)
        if KERNEL_DEVICE != "cpu"
        else w
        for w in matrices
    ]


@pytest.mark.parametrize("rows", [1, 3])
def test_two_launches_and_the_same_bits(rows, monkeypatch):
    launches = []
    wrap = sgmv.wrap_triton
    monkeypatch.setattr(sgmv, "wrap_triton", lambda kernel: launches.append(kernel) or wrap(kernel))
    case, layers, added = fold(make_case(entries=ENTRIES[:rows], tokens=(1,), k=520), biases=True)
    first, second = (run_folded(case, layers, added, "triton") for _ in range(2))
    assert len(launches) == 4
    assert all(map(torch.equal, first, second))


def test_neighbours_do_not_matter():
    """A row's bits are its own, whatever the others hold, NaN included."""
    case, layers, added = fold(make_case(entries=ENTRIES, tokens=(1,)), biases=True)
    outs = run_folded(case, layers, added, "triton")
    for row in range(3):
        x = torch.full_like(case.x, torch.nan)
        x[row] = case.x[row]
        for out, other in zip(outs, run_folded(replace(case, x=x), layers, added, "triton"), strict=True):
            assert torch.equal(out[row], other[row])


def test_outputs_are_written_whole(monkeypatch):
    """Memory that the op takes holds NaN before the kernels run."""

    def poisoned(like_or_shape, **kwargs):
        made = torch.empty_like if isinstance(like_or_shape, torch.Tensor) else torch.empty
        return made(like_or_shape, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(sgmv, "torch", SimpleNamespace(**{**vars(torch), "empty_like": poisoned, "empty": poisoned}))
    for rows in (1, 3):
        assert_folded(make_case((8, 0, 3), entries=ENTRIES[:rows], tokens=(1,), k=600))


def test_gradients_take_the_layers_as_they_are():
    """The kernels have no backward, so ATen computes what needs one."""
    case, layers, _ = fold(make_case(tokens=(1,), poison="none"), biases=False)
    x = case.x.clone().requires_grad_()
    sum(out.sum() for out in run_folded(replace(case, x=x), layers, [None] * 3, "triton")).backward()
    assert x.grad.isfinite().all()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    ranks=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    widths=st.lists(st.integers(1, 100), min_size=5, max_size=5),
    k=st.integers(1, 700),
    batch=st.integers(1, 4),
    tokens=st.sampled_from([1, 2, 17]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    biases=st.booleans(),
)
def test_whatever_comes(ranks, widths, k, batch, tokens, dtype, biases):
    entries = [ENTRIES[i % 3] for i in range(batch)]
    case = make_case(ranks, widths=widths[: len(ranks)], k=k, entries=entries, tokens=(tokens,), dtype=dtype)
    assert_folded(case, biases, bound=1e-5 if dtype == torch.float32 else 1e-4)
