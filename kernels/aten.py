"""The CPU lowering: plain PyTorch that Inductor's C++ fuses, and that autograd differentiates.

All-slots masking: the activation of every rank row is computed by one GEMM for the whole group, the lanes that are not
a row's own adapter are set to zero, and one GEMM for each sibling adds the rest. Shapes are those of the bank, never of
an adapter, so nothing recompiles when adapters change. Lanes that are set to zero still meet the rows of B that they
belong to, so B must be finite everywhere (the bank refuses what is not, and keeps free rows at zero).

Sums are float32 (float64 for double precision); the base output is added there and rounded once.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype in which sums are kept: float64 as soon as one operand is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def row_weights(x: Tensor, slots: Tensor, weights: Tensor, count: Tensor, windows: Tensor) -> Tensor:
    """How much of each slot each row of ``x`` takes: ``[rows, slots + 1]`` float32, the last column (no slot) zero.

    x: ``[rows, ...]``, its sizes alone count; slots, weights: ``[entries, pairs]``; count: ``[]``; windows:
    ``[slots, ...]``, its first size alone counts
    """
    rows = x.shape[0] if x.dim() > 1 else 1
    entry = torch.arange(rows, device=slots.device) * count // rows  # [rows]
    columns = torch.arange(windows.shape[0] + 1, device=slots.device)
    taken = slots[entry].unsqueeze(-1) == columns  # [rows, pairs, slots + 1]; -1, no adapter, equals none
    return torch.where(taken, weights[entry].unsqueeze(-1), 0.0).sum(1)


def lane_gates(spread: Tensor, owner: Tensor, scale: Tensor, lanes: list[int], sums: torch.dtype) -> Tensor:
    """What each rank row counts for each row of the batch: ``[rows, sum of lanes]`` in the dtype ``sums``, zero where
    it is not in use.

    spread: from ``row_weights``; owner: ``[sum of lanes]``; scale: ``[slots, siblings]``; lanes: of each sibling
    """
    slot = owner.to(torch.int64)
    free = slot < 0
    position = torch.arange(sum(lanes), device=owner.device)
    sibling = torch.zeros_like(position)
    for end in itertools.accumulate(lanes[:-1]):
        sibling = sibling + (position >= end)
    factor = scale[slot.clamp(min=0), sibling]  # [lanes]
    taken = spread[:, torch.where(free, spread.shape[1] - 1, slot)]
    return taken.to(sums) * torch.where(free, 0.0, factor).to(sums)


def routed_lora(
    ys: list[Tensor],
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    caps: list[int],
    owner: Tensor,
    scale: Tensor,
    spread: Tensor,
) -> list[Tensor]:
    """See ``ops.py`` for every argument. Returns what is to replace ``ys``, same shapes and dtypes."""
    if x.dim() == 1:  # no batch dimension: one row
        outs = routed_lora([y[None] for y in ys], x[None], a, b, caps, owner, scale, spread)
        return [out[0] for out in outs]
    sums = accumulator(x, *ys, *a)
    lanes = [t.shape[0] for t in b]
    gates = lane_gates(spread, owner, scale, lanes, sums)  # [rows, lanes]
    gates = gates.reshape(x.shape[0], *[1] * (x.dim() - 2), sum(lanes))
    hidden = x.to(sums)
    if len(a) == 1 and lanes == caps:  # one GEMM and one mask for all siblings
        shrunk = _mask(F.linear(hidden, a[0].to(sums)), gates).split(caps, -1)
    else:
        parts = F.linear(hidden, a[0].to(sums)).split(caps, -1) if len(a) == 1 else [None] * len(a)
        shrunk = []
        for part, a_i, gate, cap in zip(parts, a * (len(caps) // len(a)), gates.split(lanes, -1), caps, strict=True):
            s = _mask(F.linear(hidden, a_i.to(sums)) if part is None else part, gate[..., :cap])
            # biases are rank rows whose activation is 1
            extra = gate[..., cap:].expand(*s.shape[:-1], gate.shape[-1] - cap)
            shrunk.append(torch.cat([s, extra], -1) if extra.shape[-1] else s)
    return [_add_product(y, s, rows_b.to(sums)) for y, s, rows_b in zip(ys, shrunk, b, strict=True)]


def _mask(s: Tensor, gates: Tensor) -> Tensor:
    """``s * gates``, and zero where the gate is, whatever ``s`` holds there."""
    return torch.where(gates != 0, s * gates, 0.0)


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
