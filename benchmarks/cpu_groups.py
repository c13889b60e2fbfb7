"""One group of layers on this CPU, against the floor that memory sets: ``python -m benchmarks.cpu_groups``.

What the group's layers take alone (ATen), what the fused op takes that computes them too, with no adapter in use and
with adapters. Weights are of so many groups in turn that none is found in a cache. The floor is the time that reading
the same bytes takes, at the speed at which this machine sums a long tensor.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.gpu_kernels import MIXED
from benchmarks.turns import take_turns, timed
from lorafx.kernels import cpp

SHAPES = {  # in, out of each sibling
    "smollm2": {"q,k,v": (576, (576, 192, 192)), "gate,up": (576, (1536, 1536)), "down": (1536, (576,))},
    "llama-8b": {"q,k,v": (4096, (4096, 1024, 1024)), "gate,up": (4096, (14336, 14336)), "down": (14336, (4096,))},
}
BYTES = 256 * 2**20  # of weights that take turns: more than the caches hold


class Group:
    """Layers ``[out, in]`` and a bank of adapters of these ranks, float32."""

    def __init__(self, k: int, widths: Sequence[int], ranks: Sequence[int]) -> None:
        lanes = sum(ranks)
        self.layers = [torch.randn(width, k) for width in widths]
        self.a = [torch.randn(lanes * len(widths), k)]
        self.b = [torch.randn(lanes, width) for width in widths]
        self.caps = [lanes] * len(widths)
        self.scale = torch.ones(len(ranks), len(widths))
        self.windows = torch.zeros(len(ranks), len(widths), 3, dtype=torch.int16)
        for slot, rank in enumerate(ranks):
            self.windows[slot] = torch.tensor([sum(ranks[:slot]), rank, -1])

    def aten(self, x: Tensor) -> None:
        for weight in self.layers:
            torch.mm(x, weight.t())

    def fused(self, x: Tensor, routing: tuple[Tensor, Tensor, Tensor]) -> None:
        none = [None] * len(self.layers)
        torch.ops.lorafx.routed_cpp(
            [], self.layers, none, x, self.a, self.b, self.caps, *routing, self.scale, self.windows
        )


def routing_of(slots: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """One adapter for each row, -1: none."""
    return torch.tensor(slots, dtype=torch.int32)[:, None], torch.ones(len(slots), 1), torch.tensor(len(slots))


def bandwidth() -> float:
    """Bytes read in a second."""
    numbers = torch.randn(BYTES // 4)
    return BYTES / statistics.median(timed(numbers.sum) for _ in range(15))


def measure(k: int, widths: Sequence[int], rows: int, ranks: Sequence[int], rounds: int) -> dict[str, float]:
    """Median seconds of one group, by contender; and the bytes that each has to read."""
    size = 4 * sum(widths) * k
    groups = [Group(k, widths, ranks) for _ in range(max(2, BYTES // size))]
    x = torch.randn(rows, k)
    none, used = routing_of([-1] * rows), routing_of([row % len(ranks) for row in range(rows)])

    def each(action) -> float:
        return timed(lambda: [action(group) for group in groups]) / len(groups)

    contenders = {
        "aten": lambda _: each(lambda group: group.aten(x)),
        "idle": lambda _: each(lambda group: group.fused(x, none)),
        "adapters": lambda _: each(lambda group: group.fused(x, used)),
    }
    found = {name: statistics.median(values) for name, values in take_turns(contenders, rounds).items()}
    lora = 4 * sum(ranks[: min(rows, len(ranks))]) * (len(widths) * k + sum(widths))
    return {**found, "bytes": size, "lora_bytes": lora}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_groups", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cpp.check(torch.device("cpu"))
    speed = bandwidth()
    print(f"{options.threads} threads, float32; a sum reads {speed / 1e9:.1f} GB/s\n")
    print(
        "| group, rows, ranks | ATen, layers alone | fused, idle | fused, adapters | to ATen | floor | to the floor |"
    )
    print("|---|---|---|---|---|---|---|")
    for rows, ranks in ((1, (16,)), (2, (16,)), (4, (16,)), (8, (16,)), (8, MIXED), (16, MIXED)):
        for name, (k, widths) in SHAPES[options.model].items():
            found = measure(k, widths, rows, ranks, options.rounds)
            floor = (found["bytes"] + found["lora_bytes"]) / speed
            what = f"r {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} adapters"
            cells = [f"{found[key] * 1e6:.0f} us" for key in ("aten", "idle", "adapters")]
            ratio = f"{found['adapters'] / found['aten']:.2f}"
            cells += [ratio, f"{floor * 1e6:.0f} us", f"{found['adapters'] / floor:.2f}"]
            print(f"| {name}, {rows}, {what} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
