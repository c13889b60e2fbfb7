"""What a group costs, counted from its shapes: FLOPs, bytes moved and launches, and the least time a named GPU needs.

A model of the work, not a measurement: caches, occupancy and the time of a launch are left out. Times come from
``python -m benchmarks.gpu`` and ``python -m benchmarks.cpu``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SIBLINGS = 4  # of one launch pair of the Triton kernels, as in sgmv.MAX_SIBLINGS
FLOAT32 = 4  # bytes: what the kernels hand from shrink to expand
FOLDED_TOKENS = 64  # that one program of a folded layer takes at most, as in schedule.MOST_LAYER_TOKENS
LAUNCH = 1.23e-6  # seconds of a kernel that does nothing, in a CUDA graph: measured on an H100 (docs/performance.md)


@dataclass(frozen=True)
class GroupShape:
    """A group, and how many tokens it sees in a call.

    widths: of the siblings' outputs; ranks: of the adapter in use at each sibling; rows: rank rows that the bank holds
    there, all adapters and room together; itemsize, bank_itemsize: bytes of an element of x and of the bank
    """

    tokens: int
    in_features: int
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    rows: tuple[int, ...]
    itemsize: int = 4
    bank_itemsize: int = 4


@dataclass(frozen=True)
class Cost:
    """flops: multiplications and additions; bytes: read and written; launches: kernels, or ops on a CPU"""

    flops: int = 0
    bytes: int = 0
    launches: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.launches + other.launches)


@dataclass(frozen=True)
class Gpu:
    """Peaks from the maker's data sheet: bytes per second of memory, FLOPs per second of dense 16-bit products."""

    name: str
    bandwidth: float
    flops: float
    source: str

    def least_seconds(self, cost: Cost) -> float:
        """The roofline: no kernel moves these bytes and does these FLOPs sooner (Williams, Waterman, Patterson 2009,
        "Roofline: an insightful visual performance model")."""
        return max(cost.bytes / self.bandwidth, cost.flops / self.flops)


GPUS = {
    "a100": Gpu("A100 SXM 80 GB", 2.039e12, 312e12, "NVIDIA A100 data sheet, June 2021"),
    "h100": Gpu("H100 SXM 80 GB", 3.35e12, 989e12, "NVIDIA H100 data sheet: 1,979 TFLOPS with sparsity"),
    "h200": Gpu("H200 SXM 141 GB", 4.8e12, 989e12, "NVIDIA H200 data sheet: 1,979 TFLOPS with sparsity"),
    "l4": Gpu("L4", 300e9, 121e12, "NVIDIA L4 data sheet: 242 TFLOPS with sparsity"),
}


def gpu_named(name: str) -> Gpu:
    """Of the GPUs with known peaks the one that a device calls itself, such as "NVIDIA H100 80GB HBM3"; else an H100,
    whose FLOPs for a byte are much like those of the others."""
    words = re.split(r"[\s-]+", name.lower())
    return next((gpu for key, gpu in GPUS.items() if key in words), GPUS["h100"])


def fold_pays(gpu: Gpu, tokens: int, in_features: int, widths: tuple[int, ...], itemsize: int) -> bool:
    """Whether the layers of a group, computed in the shrink's launch, are modelled to take less time there, which has
    fewer launches. More than ``FOLDED_TOKENS`` tokens read the weights again, and were not measured: never then."""
    if tokens > FOLDED_TOKENS:
        return False
    none = (0,) * len(widths)
    shape = GroupShape(tokens, in_features, widths, none, none, itemsize)
    apart, folded = fused(shape, "triton"), fused(shape, "triton", folded=True)
    return _modelled(gpu, folded) < _modelled(gpu, apart)


def _modelled(gpu: Gpu, cost: Cost) -> float:
    return gpu.least_seconds(cost) + cost.launches * LAUNCH


def layers(shape: GroupShape) -> Cost:
    """The adapted layers' own products, without LoRA: ``y_i = x @ W_i.T``."""
    t, k, e = shape.tokens, shape.in_features, shape.itemsize
    return Cost(
        sum(2 * t * k * n for n in shape.widths),
        sum(e * (t * k + k * n + t * n) for n in shape.widths),
        len(shape.widths),
    )


def separate(shape: GroupShape) -> Cost:
    """The layers, and each branch by itself as PEFT writes it: ``y + lora_B(lora_A(x)) * scale``. Four ops a branch,
    each of which reads and writes memory; the casts of a mixed-precision model are left out."""
    t, k, e, w = shape.tokens, shape.in_features, shape.itemsize, shape.bank_itemsize
    total = layers(shape)
    for n, r in zip(shape.widths, shape.ranks, strict=True):
        shrink = e * t * k + w * (r * k + t * r)
        expand = w * (t * r + r * n + t * n)
        scale_and_add = 3 * w * t * n + 2 * e * t * n
        total += Cost(_flops(t, k, n, r), shrink + expand + scale_and_add, 4)
    return total


def fused(shape: GroupShape, lowering: str, folded: bool = False) -> Cost:
    """The layers and one op for all branches. ``folded``: the layers are computed in that op."""
    t, k, e, w = shape.tokens, shape.in_features, shape.itemsize, shape.bank_itemsize
    # ATen multiplies by every row that the bank holds and masks; the kernels read the adapter's own rows
    ranks = shape.rows if lowering == "aten" else shape.ranks
    siblings = list(zip(shape.widths, ranks, strict=True))
    flops = sum(_flops(t, k, n, r) for n, r in siblings)
    weights = w * sum(r * (k + n) for n, r in siblings)
    outputs = 2 * e * t * sum(shape.widths)
    handed_on = 2 * FLOAT32 * t * sum(ranks)
    if folded and lowering == "triton":
        own = layers(shape)
        again = (-(-t // FOLDED_TOKENS) - 1) * e * k * sum(shape.widths)
        moved = own.bytes - e * t * k * (len(siblings) - 1) + again + weights + outputs + handed_on
        return Cost(own.flops + flops, moved, 2 * -(-len(siblings) // SIBLINGS))
    if folded:  # x is in the cache of the layers' own product, outputs are written once, nothing is handed on
        own = layers(shape)
        return Cost(own.flops + flops, own.bytes - e * t * k * (len(siblings) - 1) + weights, 1)
    if lowering == "cpp":
        launches, handed_on = 1, 0
    elif lowering == "triton":
        launches = 2 * -(-len(siblings) // SIBLINGS)
    else:
        launches = 2 + len(siblings)  # shrink, mask, and a product added to each output
    return layers(shape) + Cost(flops, e * t * k + weights + outputs + handed_on, launches)


def _flops(tokens: int, k: int, n: int, rank: int) -> int:
    """Shrink, expand, scale and sum."""
    return 2 * tokens * rank * (k + n) + (2 * tokens * n if rank else 0)
