"""Adapters that are active on the last positions of a row only: aLoRA, https://huggingface.co/papers/2504.12397.

PEFT counts an aLoRA's positions from the end (``ALoraLinearVariant`` in ``peft/tuners/lora/variants.py``): with T
positions in a layer's input and an offset of n, those from T - n on get the adapter, the others the base output. So
one number for each row serves a whole prompt, and each token decoded behind a KV cache, where T is 1. With another T
(chunks of a prompt, no cache, prompt lookup) the place moves, in PEFT as here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_base(outs: list[Tensor], ys: list[Tensor], last: Tensor, count: Tensor) -> list[Tensor]:
    """``outs`` where the row's adapter is active, ``ys`` before that.

    outs, ys: of each sibling, ``[rows, positions, ..., out_i]``, or ``[rows * positions, out_i]``; last: ``[entries]``,
    how many of a row's last positions are active; count: as in ``ops.py``
    """
    if outs[0].dim() == 1:  # no batch dimension: one row of one position
        return [torch.where(last[0] > 0, out, y) for out, y in zip(outs, ys, strict=True)]
    active = is_active(outs[0], last, count)
    return [torch.where(active, out, y) for out, y in zip(outs, ys, strict=True)]


def is_active(y: Tensor, last: Tensor, count: Tensor) -> Tensor:
    """``[rows, positions, 1, ...]`` or, of ``y`` in two dimensions, ``[rows * positions, 1]``: where ``y``'s row has
    its adapter."""
    rows = y.shape[0]
    row = torch.arange(rows, device=last.device)
    entry = row * count // rows
    if y.dim() == 2:  # one position a row, or, in a flattened batch, all of one row's, then the next row's
        positions = torch.clamp(rows // count, min=1)
        return (row % positions >= positions - last[entry]).unsqueeze(-1)
    positions = y.shape[1]
    active = torch.arange(positions, device=last.device) >= positions - last[entry].unsqueeze(-1)
    return active.reshape(rows, positions, *[1] * (y.dim() - 2))
