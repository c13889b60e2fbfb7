"""LoRA on embeddings and convolutions: plain PyTorch against the float64 reference, which knows linear layers only.

Free rows of A hold NaN; B is zero there. An embedding is compared as a linear layer of one-hot vectors, a convolution
as one of the patches that it sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import lorafx.kernels.layer_ops
import lorafx.kernels.ops  # noqa: F401
from lorafx.kernels.layer_ops import rows_shape
from lorafx.sites import rows_unknown

RANKS = (3, 5)  # of slots 0 and 1; slot 2 holds nothing; two rows are free
CAPACITY = 10
ENTRIES = [[(0, 0.7), (1, -0.3)], [], [(1, 1.0)], [(0, 1.0)]]
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}
WINDOWS = {  # kernel, stride, padding
    "1 x 1": [1, 1, 1, 1, 0, 0],
    "3 x 3": [3, 3, 1, 1, 1, 1],
    "strided": [3, 3, 2, 2, 1, 1],
    "unequal": [2, 5, 1, 3, 0, 2],
}


@dataclass
class Case:
    kind: str
    y: Tensor
    x: Tensor
    window: list[int]
    a: Tensor
    b: Tensor
    factor: Tensor | None = None
    entries: tuple = tuple(map(tuple, ENTRIES))

    def run(self, lowering: str) -> Tensor:
        slots, weights = torch.full((8, 4), -1, dtype=torch.int32), torch.zeros(8, 4)
        for row, pairs in enumerate(self.entries):
            for column, (slot, weight) in enumerate(pairs):
                slots[row, column], weights[row, column] = slot, weight
        biased = self.b.shape[0] > CAPACITY
        owner = torch.full((self.b.shape[0],), -1, dtype=torch.int16)
        owner[: RANKS[0]], owner[RANKS[0] : sum(RANKS)] = 0, 1
        windows = torch.tensor([[[0, RANKS[0], -1]], [[RANKS[0], RANKS[1], -1]], [[0, 0, -1]]], dtype=torch.int16)
        if biased:
            owner[CAPACITY], windows[1, 0, 2] = 1, CAPACITY
        scale = torch.tensor([[2.0], [0.5], [0.0]])
        tables = (slots, weights, torch.tensor(len(self.entries)), owner, scale, windows)
        op = torch.ops.lorafx.routed_layer
        return op(self.y, self.x, self.factor, self.kind, self.window, self.a, self.b, *tables, None, lowering)

    def delta(self, lowering: str) -> Tensor:
        return self.run(lowering).double() - self.y.double()


def make(kind, window=(), dtype=torch.float32, adapter_dtype=None, bias=False, rows=4, size=(), seed=0, **fields):
    """Signed numbers; what an adapter adds is about as large as the base."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    window = list(window)
    if kind == "embedding":
        entries, out = 40, 12
        x = torch.randint(0, entries, (rows, *(size or (5,))), generator=generator)
        y = draw(*x.shape, out)
    else:
        entries, out = 3 * window[0] * window[1], 6
        x = draw(rows, 3, *(size or (7, 8)))
        height, width = _places(x, window)
        y = draw(rows, out, height, width)
        x = x.to(dtype)
    a, b = draw(CAPACITY, entries) / 2, draw(CAPACITY + bias, out) / 2
    a[sum(RANKS) :], b[sum(RANKS) : CAPACITY] = float("nan"), 0
    adapter_dtype = adapter_dtype or dtype
    return Case(kind, y.to(dtype), x, window, a.to(adapter_dtype), b.to(adapter_dtype), **fields)


def _places(x: Tensor, window: list[int]) -> tuple[int, int]:
    return tuple((x.shape[2 + i] + 2 * window[4 + i] - window[i]) // window[2 + i] + 1 for i in (0, 1))


def assert_delta(case: Case, bound: float | None = None) -> None:
    """Against the reference on the same numbers in double precision; rows on the base model to the bit."""
    got, want = case.run("aten"), case.run("reference")
    exact = Case(**{**vars(case), "y": case.y.double(), "a": case.a.double(), "b": case.b.double()})
    exact.x = case.x.double() if case.x.is_floating_point() else case.x
    delta = exact.delta("reference")
    assert float(delta.norm()) > 0.1 * float(case.y.double().norm())
    bound = bound or BOUNDS[case.y.dtype]
    for each in (got, want):
        assert each.dtype == case.y.dtype
        assert each.shape == case.y.shape
        assert float((each.double() - case.y.double() - delta).norm()) <= bound * float(delta.norm())
    repeats = case.x.shape[0] // len(case.entries)
    for row, pairs in enumerate(case.entries):
        if not pairs:
            rows = slice(row * repeats, (row + 1) * repeats)
            assert torch.equal(got[rows], case.y[rows])


KINDS = [("embedding", []), *(("conv2d", window) for window in WINDOWS.values())]
NAMES = ["embedding", *WINDOWS]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kind", "window"), KINDS, ids=NAMES)
def test_kinds(kind, window, bias):
    assert_delta(make(kind, window, bias=bias and kind == "conv2d"))


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
def test_dtypes(kind, dtype, adapter_dtype):
    window = WINDOWS["strided"] if kind == "conv2d" else ()
    case = make(kind, window, dtype=dtype, adapter_dtype=adapter_dtype)
    assert_delta(case)


@pytest.mark.parametrize("size", [(1,), (2, 3)])
def test_scaled_embedding_of_any_shape(size):
    assert_delta(make("embedding", size=size, factor=torch.tensor([5.5], dtype=torch.bfloat16)))


@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
def test_rows_that_generate_repeats(kind):
    assert_delta(make(kind, WINDOWS["3 x 3"] if kind == "conv2d" else (), rows=12))


@pytest.mark.parametrize("lowering", ["aten", "reference"])
@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
def test_no_batch_dimension(kind, lowering):
    case = make(kind, WINDOWS["3 x 3"] if kind == "conv2d" else (), entries=(((1, 1.0),),))
    whole = case.run(lowering)
    single = Case(**{**vars(case), "x": case.x[2], "y": case.y[2]})
    assert torch.allclose(single.run(lowering), whole[2], atol=1e-6)


def test_channels_last():
    case = make("conv2d", WINDOWS["3 x 3"])
    want = case.run("aten")
    case.x, case.y = (t.contiguous(memory_format=torch.channels_last) for t in (case.x, case.y))
    got = case.run("aten")
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
def test_a_row_with_nan_stays_alone(kind):
    case = make(kind, WINDOWS["3 x 3"] if kind == "conv2d" else ())
    want = case.run("aten")
    case.y = case.y.clone()
    case.y[0] = float("nan")
    if kind == "conv2d":
        case.x[0] = float("nan")
    assert torch.equal(case.run("aten")[1:], want[1:])


@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
def test_gradients(kind):
    case = make(kind, WINDOWS["strided"] if kind == "conv2d" else (), dtype=torch.float64, bias=kind == "conv2d")
    case.a[torch.isnan(case.a)] = 0
    wanted = [case.y, case.a, case.b] + ([case.x] if kind == "conv2d" else [])
    for tensor in wanted:
        tensor.requires_grad_()
    torch.autograd.gradcheck(lambda *_: case.run("aten"), wanted)


def test_which_rows_are_known():
    """Ids in one dimension may be rows or positions; a convolution's channels are no rows."""
    assert rows_unknown(rows_shape("embedding", (4, 9)), 4, 4) is None
    assert rows_unknown(rows_shape("embedding", (1, 9)), 4, 4)
    assert rows_unknown(rows_shape("embedding", (4,)), 4, 4)
    assert rows_unknown(rows_shape("embedding", (9, 4)), 4, 4)
    assert rows_unknown(rows_shape("conv2d", (8, 4, 5, 5)), 4, 4) is None
    assert rows_unknown(rows_shape("conv2d", (4, 5, 5)), 4, 4)
