"""LoRA on the experts of a mixture: ``lorafx::expert_site``, behind the product of each token with its own expert.

One row of ``x`` is one pair of a token and an expert that it was sent to, sorted by expert:

    y[s] + gate[s] * (x[s] @ A[e].T) @ B[e].T        e = ids[s],  gate: scale * weight of the token's batch row

Opaque: what is in use, and where it stands in the bank, is found when it runs, so no change of either is seen by what
was compiled. The delta weight ``B[e] @ A[e]`` is never there. Up to one pair for each expert, the experts' rows are
gathered (no more than the adapter itself, and nothing waits for the device); beyond that there are two small products
for each expert that has tokens, and their number is read from the device once.

``lorafx::expert_lora`` is the same for one adapter whose weights are trained: they are its inputs, and it has a
backward.

A and B stand as PEFT has them (``peft/tuners/lora/layer.py``, ``ParamWrapper.get_delta_weight``): the rank rows of A
expert by expert, those of B rank by rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorafx.kernels.aten import accumulator

REASON = "experts, in plain PyTorch"

_library = torch.library.Library("lorafx", "FRAGMENT")
_library.define(
    "expert_site(Tensor y, Tensor x, Tensor ids, Tensor tokens, SymInt total, int bank, int site) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # what it reads depends on the routing of the call
)
_library.define(
    "expert_lora(Tensor y, Tensor x, Tensor ids, Tensor a, Tensor b, float scale, int experts, str name) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # how many tokens an expert has is read from the device
)
_library.define(
    "expert_lora_backward(Tensor grad, Tensor x, Tensor ids, Tensor a, Tensor b, float scale, int experts)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.cudagraph_unsafe,),
)


def expert_delta(x: Tensor, ids: Tensor, gates: Tensor, a: Tensor, b: Tensor, experts: int) -> Tensor:
    """What one adapter adds: ``[pairs, out]`` in float32 (float64 for double precision), zero where ``gates`` is.

    x: ``[pairs, in]``; ids: ``[pairs]``, ascending; gates: ``[pairs]``; a: ``[experts * rank, in]``, expert by expert;
    b: ``[rank * experts, out]``, rank by rank
    """
    down, up = _by_expert(a, b, experts)
    x, gates = x.to(accumulator(x, a)), gates.to(accumulator(x, a))[:, None]
    delta = (_gathered if len(ids) <= experts else _looped)(x, ids, gates, down, up)
    return torch.where(gates != 0, delta, 0)  # rows without it stay as they are, whatever stands in x


def _by_expert(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """``[experts, rank, in]`` and ``[experts, rank, out]``: views."""
    return a.unflatten(0, (experts, -1)), b.unflatten(0, (-1, experts)).transpose(0, 1)


def _gathered(x: Tensor, ids: Tensor, gates: Tensor, down: Tensor, up: Tensor) -> Tensor:
    shrunk = torch.bmm(down[ids].to(x.dtype), x[:, :, None])[:, :, 0] * gates
    return torch.bmm(shrunk[:, None], up[ids].to(x.dtype))[:, 0]


def _looped(x: Tensor, ids: Tensor, gates: Tensor, down: Tensor, up: Tensor) -> Tensor:
    counts = torch.bincount(ids, minlength=len(down)).tolist()
    parts = zip(x.split(counts), gates.split(counts), down, up, strict=True)
    pieces = [((rows @ d.to(x.dtype).t()) * gate) @ u.to(x.dtype) for rows, gate, d, u in parts if len(rows)]
    return torch.cat(pieces)


Forward = Callable[[Tensor, Tensor, Tensor, Tensor, int, int, int], Tensor]
_forward: Forward | None = None


def set_expert_site_forward(forward: Forward) -> None:
    """Tell the op how to compute itself; the bank's side calls this once, at import."""
    global _forward
    _forward = forward


def _eager(y: Tensor, x: Tensor, ids: Tensor, tokens: Tensor, total: int, bank: int, site: int) -> Tensor:
    out = _forward(y, x, ids, tokens, total, bank, site)
    return out.clone(memory_format=torch.contiguous_format) if out is y else out  # an op may not return its input


def _setup_context(ctx, inputs, output) -> None:
    y, x, ids, tokens, *ctx.rest = inputs
    ctx.save_for_backward(y, x, ids, tokens)


def _backward(ctx, grad: Tensor):
    y, x, ids, tokens = ctx.saved_tensors
    y, x = (t.detach().requires_grad_() for t in (y, x))
    with torch.enable_grad():
        out = _forward(y, x, ids, tokens, *ctx.rest)
    grads = torch.autograd.grad(out, (y, x), grad, allow_unused=True)
    return *grads, None, None, None, None, None


_library.impl("expert_site", _eager, "CompositeExplicitAutograd")
torch.library.register_fake(
    "lorafx::expert_site",
    lambda y, x, ids, tokens, total, bank, site: torch.empty_like(y, memory_format=torch.contiguous_format),
    lib=_library,
)
torch.library.register_autograd("lorafx::expert_site", _backward, setup_context=_setup_context, lib=_library)


def _lora(y: Tensor, x: Tensor, ids: Tensor, a: Tensor, b: Tensor, scale: float, experts: int, name: str) -> Tensor:
    """``[pairs, out]``, of y's dtype. a: as above; b: ``[out, rank * experts]``; name: of the weight, for a reader"""
    delta = expert_delta(x, ids, torch.full_like(ids, scale, dtype=a.dtype), a, b.t(), experts)
    return (y.to(delta.dtype) + delta).to(y.dtype)


def _lora_backward(
    grad: Tensor, x: Tensor, ids: Tensor, a: Tensor, b: Tensor, scale: float, experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, a and b, each shaped as it is. For the pairs of one expert: with s = x @ A.T and d = grad @ B * scale, that
    is d @ A, d.T @ x and (s * scale).T @ grad."""
    down, up = _by_expert(a, b.t(), experts)
    wide = accumulator(x, a)
    counts = torch.bincount(ids, minlength=experts).tolist()
    of_x, of_down, of_up = [], torch.zeros_like(down, dtype=wide), torch.zeros(up.shape, dtype=wide, device=up.device)
    for e, (rows, g) in enumerate(zip(x.to(wide).split(counts), grad.to(wide).split(counts), strict=True)):
        if len(rows):
            d, u = down[e].to(wide), up[e].to(wide)
            inner = (g @ u.t()) * scale
            of_x.append(inner @ d)
            of_down[e] = inner.t() @ rows
            of_up[e] = ((rows @ d.t()) * scale).t() @ g
    of_b = of_up.transpose(0, 1).flatten(0, 1).t()
    return torch.cat(of_x).to(x.dtype), of_down.flatten(0, 1).to(a.dtype), of_b.to(b.dtype).contiguous()


def _lora_setup(ctx, inputs, output) -> None:
    _, x, ids, a, b, ctx.scale, ctx.experts, _ = inputs
    ctx.save_for_backward(x, ids, a, b)


def _lora_grads(ctx, grad: Tensor):
    x, ids, a, b = ctx.saved_tensors
    grads = torch.ops.lorafx.expert_lora_backward(grad.contiguous(), x, ids, a, b, ctx.scale, ctx.experts)
    of_x, of_a, of_b = grads
    return grad, of_x, None, of_a, of_b, None, None, None


_library.impl("expert_lora", _lora, "CompositeExplicitAutograd")
_library.impl("expert_lora_backward", _lora_backward, "CompositeExplicitAutograd")
torch.library.register_fake(
    "lorafx::expert_lora",
    lambda y, *_: torch.empty_like(y, memory_format=torch.contiguous_format),
    lib=_library,
)
torch.library.register_fake(
    "lorafx::expert_lora_backward",
    lambda grad, x, ids, a, b, *_: tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, a, b)),
    lib=_library,
)
torch.library.register_autograd("lorafx::expert_lora", _lora_grads, setup_context=_lora_setup, lib=_library)
