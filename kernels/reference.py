"""The meaning of the fused op, in float64 and in loops over rows: slow, plain, and what every lowering is held to."""

from __future__ import annotations

import torch
from torch import Tensor


def routed_lora(
    ys: list[Tensor],
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    caps: list[int],
    slots: Tensor,
    weights: Tensor,
    count: Tensor,
    scale: Tensor,
    windows: Tensor,
) -> list[Tensor]:
    """``y[row] + sum over (slot, weight) of weight * scale * ((x[row] @ A.T) @ B.T + bias)``, rounded once.

    Reads only the rank rows of the adapters in use: NaN anywhere else can't reach the result. See ``ops.py`` for the
    arguments.
    """
    if x.dim() == 1:  # no batch dimension: one row
        outs = routed_lora([y[None] for y in ys], x[None], a, b, caps, slots, weights, count, scale, windows)
        return [out[0] for out in outs]
    a_of = a if len(a) == len(caps) else a[0].split(caps)
    outs = []
    for i, y in enumerate(ys):
        out = y.to(torch.float64, copy=True)
        for row in range(x.shape[0]):
            entry = row * int(count) // x.shape[0]
            for slot, weight in zip(slots[entry].tolist(), weights[entry].double(), strict=True):
                if slot < 0:
                    continue
                start, rank, bias = windows[slot, i].tolist()
                if rank == 0:
                    continue
                rows = slice(start, start + rank)
                factor = weight * scale[slot, i].double()
                delta = (x[row].double() @ a_of[i][rows].double().T) @ b[i][rows].double()
                if bias >= 0:
                    delta = delta + b[i][bias].double()
                out[row] += factor * delta
        outs.append(out.to(y.dtype))
    return outs
