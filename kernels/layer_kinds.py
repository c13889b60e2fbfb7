"""LoRA on layers that are not linear, in plain PyTorch: how the rank activations of an embedding and of a convolution
are computed, and what is added to their outputs.

    embedding   s[row, token] = A[:, ids[row, token]]       y + factor * ((s * gate) @ B)
    conv2d      s = conv(x, A), as the layer itself slides   y + conv 1x1(s * gate, B.T)

As in ``aten.py`` one gather or one convolution computes every rank row of the bank, and those that are not a row's own
are set to zero. Sums are float32 (float64 for double precision), rounded once. The formulas are those of PEFT's
``peft/tuners/lora/layer.py``, ``Embedding.forward`` and ``_ConvNd.forward``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafx.kernels.aten import accumulator, lane_gates

KINDS = ("embedding", "conv2d")


def routed_embedding(
    y: Tensor, ids: Tensor, factor: Tensor | None, a: Tensor, b: Tensor, owner: Tensor, scale: Tensor, spread: Tensor
) -> Tensor:
    """y: ``[rows, ..., out]``; ids: ``[rows, ...]`` whole numbers; factor: what the layer itself multiplies its output
    by, one number, or None; a: ``[capacity, entries]``; b: ``[capacity, out]``; spread: from ``aten.row_weights``"""
    sums = accumulator(y, a)
    shrunk = F.embedding(ids, a.t()).to(sums)  # [rows, ..., capacity]
    gates = lane_gates(spread, owner, scale, [b.shape[0]], sums)  # [rows, capacity]
    if factor is not None:
        gates = gates * factor.to(sums).reshape(())
    gates = gates.reshape(gates.shape[0], *[1] * (ids.dim() - 1), -1)
    shrunk = torch.where(gates != 0, shrunk * gates, 0.0)
    flat = torch.addmm(y.to(sums).reshape(-1, y.shape[-1]), shrunk.reshape(-1, b.shape[0]), b.to(sums))
    return flat.reshape(y.shape).to(y.dtype)


def routed_conv2d(
    y: Tensor, x: Tensor, window: list[int], a: Tensor, b: Tensor, owner: Tensor, scale: Tensor, spread: Tensor
) -> Tensor:
    """y: ``[rows, out, height', width']``; x: ``[rows, in, height, width]``; window: height and width of the kernel,
    of the stride and of the padding; a: ``[capacity, in * kernel]``; b: ``[capacity + biases, out]``"""
    sums = accumulator(x, y, a)
    kernel, stride, padding = window[:2], window[2:4], window[4:]
    lanes, capacity = b.shape[0], a.shape[0]
    gates = lane_gates(spread, owner, scale, [lanes], sums)[:, :, None, None]  # [rows, lanes, 1, 1]
    filters = a.to(sums).reshape(capacity, x.shape[1], *kernel)
    shrunk = F.conv2d(x.to(sums), filters, None, stride, padding)
    gate = gates[:, :capacity]
    shrunk = torch.where(gate != 0, shrunk * gate, 0.0)
    if lanes > capacity:  # biases are rank rows whose activation is 1
        extra = gates[:, capacity:].expand(x.shape[0], lanes - capacity, *shrunk.shape[2:])
        shrunk = torch.cat([shrunk, extra], 1)
    return (y.to(sums) + F.conv2d(shrunk, b.to(sums).t()[:, :, None, None])).to(y.dtype)


def as_linear(kind: str, y: Tensor, x: Tensor, window: list[int], entries: int) -> tuple[Tensor, Tensor]:
    """The same layer as a linear one, for the reference: ``[rows, ..., out]`` and ``[rows, ..., in]`` in double
    precision, of one-hot vectors, or of the patches that a convolution sees."""
    if kind == "embedding":
        return y.double(), F.one_hot(x.long(), entries).double()
    kernel, stride, padding = window[:2], window[2:4], window[4:]
    patches = F.unfold(x.double(), kernel, 1, padding, stride)  # [rows, in * kernel, places]
    return y.double().flatten(2).transpose(1, 2), patches.transpose(1, 2)


def from_linear(kind: str, out: Tensor, y: Tensor) -> Tensor:
    """What the linear layer gave, in the shape and dtype of ``y``."""
    if kind == "conv2d":
        out = out.transpose(1, 2)
    return out.reshape(y.shape).to(y.dtype)
