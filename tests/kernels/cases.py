"""Arguments of ``lorafx::routed_lora``, made to catch what a kernel gets wrong, and how results are judged.

Data are signed. Every rank row that no row of the batch uses holds NaN (``poison="all"``), free rows of A alone
(``poison="free_a"``, for the lowerings that multiply idle lanes by zero) or zero.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafx.kernels import ops, reference  # noqa: F401  (ops: defines what run() calls)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
CAN_RUN_KERNELS = INTERPRETED or KERNEL_DEVICE == "cuda"
SIXTEEN_BITS = [torch.float16, torch.bfloat16]

BOUND = 1e-5  # rel-L2 of the delta: sums are float32 whatever the dtypes

# (slot, weight) pairs of each routing entry
Entries = Sequence[Sequence[tuple[int, float]]]

BASE: list[tuple[int, float]] = []
MIXED: Entries = [[(0, 1.0)], BASE, [(1, 1.0)]]

RANKS = {  # ranks of slot 0; slot 1 has others, so that a batch mixes them
    "3x8": (8, 8, 8),
    "3x16": (16, 16, 16),
    "3x32": (32, 32, 32),
    "3x64": (64, 64, 64),
    "2x8": (8, 8),
    "8+16+64": (8, 16, 64),
    "q only": (8, 0, 0),
    "q and v": (8, 0, 8),
    "one": (8,),
    "rank 1": (1, 1, 1),
    "rank 7": (7, 7, 7),
    "rank 128": (128,),
    "five siblings": (8, 3, 8, 1, 5),
}


@dataclass(frozen=True)
class Case:
    """The arguments of the op, in its order; see ``kernels/ops.py``."""

    ys: list[Tensor]
    x: Tensor
    a: list[Tensor]
    b: list[Tensor]
    caps: list[int]
    slots: Tensor
    weights: Tensor
    count: Tensor
    owner: Tensor
    scale: Tensor
    windows: Tensor

    def args(self) -> tuple:
        return tuple(vars(self).values())

    def on(self, device: str) -> Case:
        """The same tensors elsewhere, with the same strides; on the CPU themselves."""
        if device == "cpu":
            return self

        def moved(value):
            if isinstance(value, list):
                return [moved(t) for t in value]
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)

        return replace(self, **{k: v if k == "caps" else moved(v) for k, v in vars(self).items()})

    def run(self, lowering: str) -> list[Tensor]:
        """On a CPU; the kernels on a GPU, unless the interpreter is to run them. What they return lies on the CPU."""
        args = self.on(KERNEL_DEVICE if lowering == "triton" else "cpu").args()
        return [out.cpu() for out in torch.ops.lorafx.routed_lora(*args, None, lowering)]

    def expected(self) -> list[Tensor]:
        """``y + delta`` in float64, rounded nowhere."""
        arguments = vars(replace(self, ys=[y.double() for y in self.ys]))
        del arguments["owner"]
        return reference.routed_lora(**arguments)


def make_case(
    ranks: Sequence[int] = (8, 8, 8),
    *,
    widths: Sequence[int] | None = None,
    k: int = 70,
    entries: Entries = MIXED,
    repeats: int = 1,
    tokens: tuple[int, ...] = (5,),
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = False,
    separate_a: bool = False,
    poison: str = "all",
) -> Case:
    """A bank of three adapters (slots 0, 1 and 3, the last; slot 2 is empty) and a batch that uses some of them.

    ranks: of slot 0 at each sibling; widths: of the outputs; entries: routing; repeats: rows of x for each entry;
    tokens: dimensions of x between rows and k, () for x ``[rows, k]``
    """
    adapter_dtype = adapter_dtype or dtype
    widths = list(widths or [33, 17, 40, 20, 9][: len(ranks)])
    seed = zlib.crc32(repr((ranks, widths, k, entries, repeats, tokens)).encode())
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    adapters = {0: list(ranks), 1: [max(1, r // 2) if r else 0 for r in ranks], 3: [r + 1 for r in ranks]}
    used = {slot for entry in entries for slot, _ in entry}
    windows = torch.zeros(4, len(ranks), 3, dtype=torch.int32)
    windows[..., 2] = -1
    scale = torch.full((4, len(ranks)), torch.nan if poison == "all" else 0.0)
    a, b, caps, owner = [], [], [], []
    for i, width in enumerate(widths):
        # One free row before each window, and one at the end: a wrong offset meets it.
        cap = sum(adapters[slot][i] + 1 for slot in adapters) + 1
        lanes = cap + (len(adapters) + 1 if bias else 0)
        a_i, b_i = randn(cap, k) / k**0.5, randn(lanes, width)
        own, live = torch.full((lanes,), -1), torch.zeros(lanes, dtype=torch.bool)
        start = 0
        for j, slot in enumerate(adapters):
            start, rank = start + 1, adapters[slot][i]
            rows = list(range(start, start + rank))
            if bias and rank:
                rows.append(cap + j)
            windows[slot, i] = torch.tensor([start, rank, rows[-1] if bias and rank else -1])
            b_i[rows] /= max(rank, 1) ** 0.5
            own[rows], live[rows] = slot, slot in used
            if rank and (slot in used or poison != "all"):
                scale[slot, i] = 0.5 + slot - 0.25 * i
            start += rank
        dead, free = ~live, own < 0
        if poison == "all":
            a_i[dead[:cap]], b_i[dead] = torch.nan, torch.nan
        else:
            a_i[free[:cap]], b_i[free] = torch.nan if poison == "free_a" else 0.0, 0.0
        a.append(a_i.to(adapter_dtype))
        b.append(b_i.to(adapter_dtype))
        caps.append(cap)
        owner.append(own.to(torch.int32))

    pairs = max(1, *(len(entry) for entry in entries))
    # One entry more than count: routing buffers may be larger than the batch.
    slots = torch.full((len(entries) + 1, pairs), -1, dtype=torch.int32)
    weights = torch.full((len(entries) + 1, pairs), 7.0)  # not 0: a base row that reads a slot after all must show
    for e, entry in enumerate(entries):
        for p, (slot, weight) in enumerate(entry):
            slots[e, p], weights[e, p] = slot, weight
    slots[-1], weights[-1] = 2, torch.nan
    rows = len(entries) * repeats
    return Case(
        ys=[randn(rows, *tokens, width).to(dtype) for width in widths],
        x=randn(rows, *tokens, k).to(dtype),
        a=a if separate_a else [torch.cat(a)],
        b=b,
        caps=caps,
        slots=slots,
        weights=weights,
        count=torch.tensor(len(entries)),
        owner=torch.cat(owner),
        scale=scale,
        windows=windows,
    )


def assert_delta(case: Case, outs: list[Tensor], bound: float = BOUND) -> None:
    """What was added to y is right, row by row; rows to which nothing is to be added equal y to the bit.

    Row by row, because a small error in a large row would hide a large one in a small row. One rounding of the sum to
    the dtype of y is allowed for, no more.
    """
    assert len(outs) == len(case.ys)
    for i, (out, y, expected) in enumerate(zip(outs, case.ys, case.expected(), strict=True)):
        assert out.shape == y.shape
        assert out.dtype == y.dtype
        assert out.is_contiguous()
        for row in range(len(y)):
            delta = expected[row] - y[row].double()
            got = out[row].double() - y[row].double()
            if not delta.any():
                assert torch.equal(out[row], y[row]), f"sibling {i}, row {row}: a base row changed"
                continue
            rounding = torch.finfo(y.dtype).eps / 2 * out[row].double().norm()
            error = ((got - delta).norm() / delta.norm()).item()
            allowed = bound + (rounding / delta.norm()).item()
            assert error <= allowed, f"sibling {i}, row {row}: rel-L2 {error:.2e} > {allowed:.2e}"


def fold(case: Case, biases: bool) -> tuple[Case, list[Tensor], list[Tensor | None]]:
    """``case`` with layers of random weights; its ``ys`` are their outputs, to the rounding of the dtype."""
    generator = torch.Generator().manual_seed(0)
    k, dtype = case.x.shape[-1], case.x.dtype
    layers = [(torch.randn(y.shape[-1], k, generator=generator) / k**0.5).to(dtype) for y in case.ys]
    added = (
        [torch.randn(y.shape[-1], generator=generator).to(dtype) for y in case.ys] if biases else [None] * len(layers)
    )
    if biases and len(added) > 1:
        added[1] = None  # as Whisper's k has none
    exact = [
        F.linear(case.x.double(), w.double(), c if c is None else c.double())
        for w, c in zip(layers, added, strict=True)
    ]
    return replace(case, ys=exact), layers, added


def run_folded(case: Case, layers: list[Tensor], biases: list[Tensor | None], lowering: str) -> list[Tensor]:
    """As ``Case.run``, the layers computed in the op."""
    device = KERNEL_DEVICE if lowering == "triton" else "cpu"
    own = [[None if t is None else t.to(device) for t in tensors] for tensors in (layers, biases)]
    outs = torch.ops.lorafx.routed_lora([], *case.on(device).args()[1:], None, lowering, *own)
    return [out.cpu() for out in outs]
