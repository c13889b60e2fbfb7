"""One group of layers on a GPU: its base GEMMs, and the same with LoRA; see ``gpu.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cuda_timing import captured, medians
from lorafx.kernels import ops, sgmv  # noqa: F401  (ops: defines the op)

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
        self.nobody = torch.full_like(self.slots, -1)
        self.shares = torch.zeros(ENTRIES, PAIRS, device=device)
        self.shares[: case.rows, 0] = 1
        self.count = torch.tensor(case.rows, device=device)
        slot = [row for row, rank in enumerate(case.ranks) for _ in range(rank)]
        self.owner = torch.tensor(slot * len(widths), dtype=torch.int32, device=device)

    def base(self, copy: int) -> list[Tensor]:
        return [F.linear(self.x, weight) for weight in self.weights[copy][0]]

    @property
    def folds(self) -> bool:
        """Whether a pass would have the layers computed by the op."""
        k, widths = GROUPS[self.case.group]
        tokens = self.case.rows * self.case.tokens
        return self.device == "cuda" and sgmv.folds(tokens, k, widths, self.case.dtype, self.x.device)

    def lorafx(self, copy: int, in_use: bool = True) -> list[Tensor]:
        """As ``lorafx.compile`` has it; ``in_use=False``: no row uses an adapter."""
        return self.folded(copy, in_use) if self.folds else self.apart(copy)

    def folded(self, copy: int, in_use: bool = True) -> list[Tensor]:
        """The layers computed by the op."""
        layers = self.weights[copy][0]
        return self._op(copy, [], in_use, layers, [None] * len(layers))

    def apart(self, copy: int, ys: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The op behind the layers' own GEMMs."""
        return self._op(copy, self.base(copy) if ys is None else list(ys))

    def _op(self, copy: int, ys: list[Tensor], in_use: bool = True, *layers: object) -> list[Tensor]:
        _, a, b = self.weights[copy]
        return torch.ops.lorafx.routed_lora(
            ys, self.x, [a], b, self.caps, self.slots if in_use else self.nobody, self.shares,
            self.count, self.owner, self.scale, self.windows, None, "auto", *layers,
        )  # fmt: skip

    def branches(self, copy: int) -> list[Tensor]:
        """As PEFT computes one adapter: two GEMMs, a product and a sum for each layer, in the adapter's dtype."""
        _, a, b = self.weights[copy]
        x = self.x.to(a.dtype)
        return [
            (y + (F.linear(F.linear(x, a_i), b_i.t()) * SCALE)).to(y.dtype)
            for y, a_i, b_i in zip(self.base(copy), a.split(self.caps), b, strict=True)
        ]

    def errors(self) -> tuple[float, float]:
        """The worst row's rel-L2 error to float64, beyond one rounding of the output's dtype: of the delta, and of the
        layers' outputs where they are folded.

        The delta is added to zeros where it can be, so that nothing is rounded away, else to what an idle call gives.
        """
        base, a, b = self.weights[0]
        idle = self.folded(0, in_use=False) if self.folds else [torch.zeros_like(y) for y in self.base(0)]
        outs = self.folded(0) if self.folds else self.apart(0, idle)
        delta, layers = 0.0, 0.0
        for out, y, weight, a_i, b_i in zip(outs, idle, base, a.split(self.caps), b, strict=True):
            for row in range(self.case.rows):
                start, rank, _ = self.windows[row % len(self.case.ranks), 0].tolist()
                live = slice(start, start + rank)
                x = self.x[row].double()
                exact = SCALE * (x @ a_i[live].double().T) @ b_i[live].double()
                rounding = torch.finfo(out.dtype).eps / 2
                off = (out[row].double() - y[row].double() - exact).norm() - rounding * out[row].double().norm()
                delta = max(delta, (off / exact.norm()).item())
                if self.folds:
                    exact = x @ weight.double().T
                    layers = max(layers, ((y[row].double() - exact).norm() / exact.norm()).item() - rounding)
        return delta, layers


def measure(case: Case, rounds: int = 20) -> dict[str, float]:
    """Microseconds of the base GEMMs ("base"), and of them with LoRA ("lorafx"; "apart": not folded, where that is;
    "branches" where there is one adapter), from CUDA graphs that take turns; "error", "layers_error": what
    ``Data.errors`` says.

    AssertionError: the result is wrong
    """
    data = Data(case, "cuda")
    error, layers_error = data.errors()
    assert max(error, layers_error) <= 1e-4, f"{case}: rel-L2 {error:.1e}, of the layers {layers_error:.1e}"
    calls = {"base": data.base, "lorafx": data.lorafx}
    if data.folds:
        calls["apart"] = data.apart
    if len(case.ranks) == 1:
        calls["branches"] = data.branches
    graphs = {
        name: captured(lambda call=call: [call(copy) for copy in range(COPIES)]).replay for name, call in calls.items()
    }
    times = {name: 1000 * time / COPIES for name, time in medians(graphs, rounds).items()}
    return {**times, "error": error, "layers_error": layers_error}
