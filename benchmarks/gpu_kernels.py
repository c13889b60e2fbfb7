"""One group of layers on a GPU: its base GEMMs, and the same with LoRA; see ``gpu.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cuda_timing import captured, medians
from lorafx.kernels import ops  # noqa: F401  (defines the op)

GROUPS = {  # Llama-3-8B: width of x, widths of the outputs
    "q,k,v": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate,up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
MIXED = (4, 8, 8, 16, 16, 32, 64, 64)
COPIES = 8  # of all weights, used in turn, so that none of them is in the L2 cache when its turn comes
ENTRIES, PAIRS = 256, 4  # the routing that lorafx hands to every graph
SCALE = 0.5


@dataclass(frozen=True)
class Case:
    """rows: of the batch, dealt to the adapters in turn; tokens: of a row; ranks: of the adapters in the bank"""

    group: str
    rows: int
    tokens: int
    ranks: tuple[int, ...]
    adapter_dtype: torch.dtype
    dtype: torch.dtype = torch.bfloat16

    @property
    def adapters(self) -> str:
        low, high = min(self.ranks), max(self.ranks)
        ranks = f"r {low}" if low == high else f"r {low} to {high}"
        return ranks if len(self.ranks) == 1 else f"{len(self.ranks)} adapters {ranks}"

    def __str__(self) -> str:
        dtypes = " x ".join(str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.adapter_dtype))
        return f"{self.group}, {self.rows} x {self.tokens} tokens, {self.adapters}, {dtypes}"


@dataclass
class Data:
    """Tensors of a case on the GPU: several copies of the weights, one x, one routing."""

    case: Case
    device: str
    weights: list[tuple[list[Tensor], Tensor, list[Tensor]]] = field(default_factory=list)  # W's, A, B's

    def __post_init__(self) -> None:
        case, device = self.case, self.device
        k, widths = GROUPS[case.group]
        generator = torch.Generator(device).manual_seed(0)

        def randn(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype, device=device)

        lanes = sum(case.ranks)
        for _ in range(COPIES if device == "cuda" else 1):
            base = [randn(width, k, dtype=case.dtype) / k**0.5 for width in widths]
            a = randn(lanes * len(widths), k, dtype=case.adapter_dtype) / k**0.5
            self.weights.append((base, a, [randn(lanes, width, dtype=case.adapter_dtype) for width in widths]))
        self.x = randn(case.rows, case.tokens, k, dtype=case.dtype)
        self.caps = [lanes] * len(widths)
        starts = [sum(case.ranks[:i]) for i in range(len(case.ranks))]
        windows = [[[start, rank, -1]] * len(widths) for start, rank in zip(starts, case.ranks, strict=True)]
        self.windows = torch.tensor(windows, dtype=torch.int32, device=device)
        self.scale = torch.full((len(case.ranks), len(widths)), SCALE, device=device)
        self.slots = torch.full((ENTRIES, PAIRS), -1, dtype=torch.int32, device=device)
        self.slots[: case.rows, 0] = torch.arange(case.rows, device=device) % len(case.ranks)
        self.shares = torch.zeros(ENTRIES, PAIRS, device=device)
        self.shares[: case.rows, 0] = 1
        self.count = torch.tensor(case.rows, device=device)
        slot = [row for row, rank in enumerate(case.ranks) for _ in range(rank)]
        self.owner = torch.tensor(slot * len(widths), dtype=torch.int32, device=device)

    def base(self, copy: int) -> list[Tensor]:
        return [F.linear(self.x, weight) for weight in self.weights[copy][0]]

    def lorafx(self, copy: int, ys: Sequence[Tensor] | None = None) -> list[Tensor]:
        _, a, b = self.weights[copy]
        return torch.ops.lorafx.routed_lora(
            self.base(copy) if ys is None else list(ys), self.x, [a], b, self.caps, self.slots, self.shares,
            self.count, self.owner, self.scale, self.windows, None, "auto",
        )  # fmt: skip

    def branches(self, copy: int) -> list[Tensor]:
        """As PEFT computes one adapter: two GEMMs, a product and a sum for each layer, in the adapter's dtype."""
        _, a, b = self.weights[copy]
        x = self.x.to(a.dtype)
        return [
            (y + (F.linear(F.linear(x, a_i), b_i.t()) * SCALE)).to(y.dtype)
            for y, a_i, b_i in zip(self.base(copy), a.split(self.caps), b, strict=True)
        ]

    def error(self) -> float:
        """The worst row's rel-L2 error of the delta to float64, beyond one rounding of the output's dtype.

        The sum is taken with an output of zeros, so that nothing is rounded away.
        """
        _, a, b = self.weights[0]
        outs = self.lorafx(0, [torch.zeros_like(y) for y in self.base(0)])
        worst = 0.0
        for out, a_i, b_i in zip(outs, a.split(self.caps), b, strict=True):
            for row in range(self.case.rows):
                start, rank, _ = self.windows[row % len(self.case.ranks), 0].tolist()
                live = slice(start, start + rank)
                exact = SCALE * (self.x[row].double() @ a_i[live].double().T) @ b_i[live].double()
                rounding = torch.finfo(out.dtype).eps / 2
                worst = max(worst, ((out[row].double() - exact).norm() / exact.norm()).item() - rounding)
        return worst


def measure(case: Case, rounds: int = 20) -> dict[str, float]:
    """Microseconds of the base GEMMs ("base"), and of them with LoRA ("lorafx", "branches" where there is one
    adapter), from CUDA graphs that take turns; "error" is what ``Data.error`` says.

    AssertionError: the result is wrong
    """
    data = Data(case, "cuda")
    error = data.error()
    assert error <= 1e-4, f"{case}: rel-L2 {error:.1e}"
    calls = {"base": data.base, "lorafx": data.lorafx}
    if len(case.ranks) == 1:
        calls["branches"] = data.branches
    graphs = {
        name: captured(lambda call=call: [call(copy) for copy in range(COPIES)]).replay for name, call in calls.items()
    }
    times = {name: 1000 * time / COPIES for name, time in medians(graphs, rounds).items()}
    return {**times, "error": error}
