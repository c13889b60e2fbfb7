"""The ops of DoRA: a marker behind the marker of a site, and what the pass makes of it.

``lorafx::magnitude``    a marker, made by an adapted layer: what the DoRA adapters of the routing make of its output
``lorafx::scaled_rows``  the same as arithmetic, ``y + f * (y - bias)`` with one row of factors for each row of ``y``

PEFT's DoRA (``peft/tuners/lora/dora.py``, section 4.3 of https://huggingface.co/papers/2402.09353) gives, with the
layer's own output ``base``, the LoRA delta and ``m = magnitude / norm``,

    base + (m - 1) * (base - bias) + m * delta  =  y + f * (y - bias),    y = base + delta,  f = m - 1

so the fused op does what it does for every adapter, and this comes after it. ``f`` is zero where a row's adapter has
no DoRA, and such a row is left as it is, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorafx.kernels.aten import accumulator

_library = torch.library.Library("lorafx", "FRAGMENT")
_library.define("magnitude(Tensor y, Tensor? bias, int bank, int site) -> Tensor")
_library.define("scaled_rows(Tensor y, Tensor? bias, Tensor factors, Tensor slots, Tensor count) -> Tensor")


def scaled_rows(y: Tensor, bias: Tensor | None, factors: Tensor, slots: Tensor, count: Tensor) -> Tensor:
    """``y + f * (y - bias)``, computed in float32 (float64 for double precision) and rounded once.

    y: ``[rows, ..., out]``; bias: ``[out]`` or None; factors: ``[slots + 1, out]``, the last row (no slot) zero;
    slots, count: the routing, see ``ops.py``. Of a row's adapters the first counts: DoRA stands on a row alone.
    """
    if y.dim() == 1:  # no batch dimension: one row
        return scaled_rows(y[None], bias, factors, slots, count)[0]
    rows = y.shape[0]
    entry = torch.arange(rows, device=slots.device) * count // rows
    slot = slots[entry, 0].to(torch.int64)
    slot = torch.where(slot < 0, factors.shape[0] - 1, slot)
    f = factors[slot].reshape(rows, *[1] * (y.dim() - 2), y.shape[-1])
    sums = accumulator(y, factors)
    whole = y.to(sums)
    own = whole if bias is None else whole - bias.to(sums)
    return torch.where(f != 0, whole + f * own, whole).to(y.dtype)


_library.impl("scaled_rows", torch.compiler.disable(scaled_rows), "CompositeImplicitAutograd")

_forward: Callable[[Tensor, Tensor | None, int, int], Tensor] | None = None


def set_magnitude_forward(forward: Callable[[Tensor, Tensor | None, int, int], Tensor]) -> None:
    """Tell the marker how to compute ``(y, bias, bank, site)`` eagerly; the bank's side calls this once, at import."""
    global _forward
    _forward = forward


def _eager(y: Tensor, bias: Tensor | None, bank: int, site: int) -> Tensor:
    out = _forward(y, bias, bank, site)
    return out.clone() if out is y else out  # an op may not return its input


def _setup_context(ctx, inputs, output) -> None:
    y, bias, ctx.bank, ctx.site = inputs
    ctx.save_for_backward(y, bias)


def _backward(ctx, grad: Tensor):
    y, bias = (None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors)
    with torch.enable_grad():
        out = _forward(y, bias, ctx.bank, ctx.site)
    wanted = [t for t in (y, bias) if t is not None]
    grads = torch.autograd.grad(out, wanted, grad, allow_unused=True)
    return grads[0], grads[1] if bias is not None else None, None, None


_library.impl("magnitude", _eager, "CompositeExplicitAutograd")
torch.library.register_fake(
    "lorafx::magnitude",
    lambda y, bias, bank, site: torch.empty_like(y, memory_format=torch.contiguous_format),
    lib=_library,
)
torch.library.register_autograd("lorafx::magnitude", _backward, setup_context=_setup_context, lib=_library)
