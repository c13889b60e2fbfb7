"""The CPU lowering: plain PyTorch that Inductor's C++ fuses, and that autograd differentiates.

All-slots masking: the activation of every rank row is computed by one GEMM for the whole group, the lanes that are not
a row's own adapter are set to zero, and one GEMM for each sibling adds the rest. Shapes are those of the bank, never of
an adapter, so nothing recompiles when adapters change. Lanes that are set to zero still meet the rows of B that they
belong to, so B must be finite everywhere (the bank refuses what is not, and keeps free rows at zero).

Sums are float32 (float64 for double precision); the base output is added there and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype in which sums are kept: float64 as soon as one operand is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def row_gates(rows: int, slots: Tensor, weights: Tensor, count: Tensor, owner: Tensor, scale: Tensor) -> Tensor:
    """What each rank row counts for each row of the batch: ``[rows, lanes]``, float32, zero where it is not in use.

    rows: leading size of x; slots, weights: ``[routing rows, pairs]``; count: ``[]``; owner, scale: ``[lanes]``
    """
    entry = torch.arange(rows, device=slots.device) * count // rows  # [rows]
    own = slots[entry].unsqueeze(-1) == owner.masked_fill(owner < 0, -2)  # [rows, pairs, lanes]; -1 is "no adapter"
    return (own * weights[entry].unsqueeze(-1)).sum(1) * scale


def routed_lora(
    ys: list[Tensor],
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    caps: list[int],
    slots: Tensor,
    weights: Tensor,
    count: Tensor,
    owner: Tensor,
    scale: Tensor,
) -> list[Tensor]:
    """See ``ops.py`` for every argument. Returns what is to replace ``ys``, same shapes and dtypes."""
    sums = accumulator(x, *ys, *a)
    if x.dim() == 1:  # no batch dimension: one row
        outs = routed_lora([y[None] for y in ys], x[None], a, b, caps, slots, weights, count, owner, scale)
        return [out[0] for out in outs]
    gates = row_gates(x.shape[0], slots, weights, count, owner, scale).to(sums)  # [rows, lanes]
    gates = gates.reshape(x.shape[0], *[1] * (x.dim() - 2), gates.shape[-1])
    hidden = x.to(sums)
    shrunk = F.linear(hidden, a[0].to(sums)) if len(a) == 1 else None  # [rows, ..., sum of caps]
    outs, rank_row, lane = [], 0, 0
    for i, (y, rows_b, cap) in enumerate(zip(ys, b, caps, strict=True)):
        s = F.linear(hidden, a[i].to(sums)) if shrunk is None else shrunk[..., rank_row : rank_row + cap]
        lanes = rows_b.shape[0]
        gate = gates[..., lane : lane + lanes]
        s = torch.where(gate[..., :cap] != 0, s * gate[..., :cap], 0.0)
        if lanes > cap:  # biases: rank rows whose activation is 1
            s = torch.cat([s, gate[..., cap:].expand(*s.shape[:-1], lanes - cap)], -1)
        outs.append(_add_product(y, s, rows_b.to(sums)))
        rank_row, lane = rank_row + cap, lane + lanes
    return outs


def fused_lora(
    ys: list[Tensor],
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    biases: list[Tensor | None],
    scales: list[float],
    scale_tensors: list[Tensor | None],
) -> list[Tensor]:
    """``y + scale * ((x @ A.T) @ B.T + bias)`` for each sibling.

    ys[i]: ``[..., out_i]``; x: ``[..., in]``; a[i]: ``[r_i, in]``; b[i]: ``[out_i, r_i]``; biases[i]: ``[out_i]`` or
    None; scales: floats, each multiplied by its 0-dimensional scale_tensors[i] if there is one
    """
    sums = accumulator(x, *ys, *a)
    hidden = x.to(sums)
    outs = []
    for y, a_i, b_i, bias, scale, scale_tensor in zip(ys, a, b, biases, scales, scale_tensors, strict=True):
        factor = scale if scale_tensor is None else scale * scale_tensor.to(sums)
        s = F.linear(hidden, a_i.to(sums)) * factor
        base = y if bias is None else y.to(sums) + bias.to(sums) * factor
        outs.append(_add_product(base, s, b_i.to(sums).t()).to(y.dtype))
    return outs


def _add_product(y: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """``y + s @ b``, summed in the dtype of ``s``, rounded once; y: ``[..., out]``, s: ``[..., r]``, b: ``[r, out]``"""
    flat = torch.addmm(y.to(s.dtype).reshape(-1, y.shape[-1]), s.reshape(-1, s.shape[-1]), b)
    return flat.reshape(y.shape).to(y.dtype)
