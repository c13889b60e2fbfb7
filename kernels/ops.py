"""The ops of lorafx: the two kinds of marker, and what a group of each is fused into.

``lorafx::site``         a marker, made by an adapted layer of ``lorafx.compile``: adds what the routing says to ``y``
``lorafx::branch``       a marker, put by a pass where it found a branch: ``y + scale * ((x @ A.T) @ B.T + bias)``
``lorafx::routed_lora``  one group of sites, weights from the bank, adapters chosen row by row
``lorafx::fused_lora``   one group of branches found in a graph, weights taken as they stand there, one adapter

The two fused ops are composite: tracing decomposes them into the lowering that was chosen, so Inductor fuses what it
can, and gradients come from the pieces. ``lowering`` is ``"auto"`` (by device), ``"cpp"``, ``"aten"``, ``"triton"`` or
``"reference"``.

One running example: hidden size 8, q (8 wide) and v (4 wide) adapted, slot 0 holds ranks (q 2, v 1), slot 1 holds
ranks (q 3, no v), room for 6 rank rows in q and 2 in v:

    caps     [6, 2]                    rank rows of each sibling
    a        [[8, 8]]                  all rank rows of A, q's six, then v's two (or one tensor for each sibling)
    b        [[6, 8], [2, 4]]          rank rows of B
    owner    [0 0 1 1 1 -1 | 0 -1]     the slot that owns a row, -1: free
    scale    [[s u] [t 0]]             the scale of each slot at each sibling
    windows  [2 slots, 2 siblings, 3]  (first row, rank, bias row or -1): [[0 2 -1] [0 1 -1]] [[2 3 -1] [0 0 -1]]
    slots    [[0] [-1] [1]]            routing of three rows: slot 0, base model, slot 1
    weights  [[1] [0] [1]]
    count    3                         rows in the routing; row i of x takes entry i * count // len(x)

A LoRA bias (PEFT's ``lora_bias``) is a further row at the end of ``b[i]``, whose rank activation is 1 by definition; it
has an entry of its own in ``owner``, which so holds ``sum(len(b[i]))`` entries, sibling after sibling.

``layers`` are the siblings' own weights ``[out, in]``, where a pass has folded them into the op (``biases``: theirs,
each a tensor or None). There is no ``ys`` then: it is ``x @ layers[i].T + biases[i]``.

``spread`` is what ``lorafx::row_weights`` made of the routing, once for all groups of a graph; only the ATen lowering
reads it, and makes it itself where it is not given.

``last`` is there where adapters may begin at a position of their own (``late_rows.py``): of each entry of the routing,
how many of the last positions have it. The others get ``ys``, so no layer is folded then.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafx.kernels import aten, cpp, reference
from lorafx.kernels.late_rows import keep_base

LOWERINGS = ("auto", "cpp", "aten", "triton", "reference")

_library = torch.library.Library("lorafx", "DEF")
_library.define("site(Tensor y, Tensor x, int bank, int site) -> Tensor")
_library.define(
    "branch(Tensor y, Tensor x, Tensor a, Tensor b, Tensor? bias, float scale, Tensor? scale_tensor) -> Tensor"
)
_library.define(
    "routed_lora(Tensor[] ys, Tensor x, Tensor[] a, Tensor[] b, int[] caps, Tensor slots, Tensor weights, Tensor count,"
    " Tensor owner, Tensor scale, Tensor windows, Tensor? spread, str lowering, Tensor[]? layers=None,"
    " Tensor?[]? biases=None, Tensor? last=None) -> Tensor[]"
)
_library.define(
    "routed_cpp(Tensor[] ys, Tensor[] layers, Tensor?[] biases, Tensor x, Tensor[] a, Tensor[] b, int[] caps,"
    " Tensor slots, Tensor weights, Tensor count, Tensor scale, Tensor windows) -> Tensor[]"
)
_library.define("row_weights(Tensor x, Tensor slots, Tensor weights, Tensor count, Tensor windows) -> Tensor")
_library.define(
    "fused_lora(Tensor[] ys, Tensor x, Tensor[] a, Tensor[] b, Tensor?[] biases, float[] scales,"
    " Tensor?[] scale_tensors, str lowering) -> Tensor[]"
)


def resolve_lowering(lowering: str, x: Tensor, *others: Tensor, op: str = "routed_lora") -> str:
    """What is to be done for these tensors: a lowering other than ``"auto"``. ``choose_lowering`` says why, too."""
    return choose_lowering(lowering, x, *others, op=op)[0]


def choose_lowering(lowering: str, x: Tensor, *others: Tensor, op: str = "routed_lora") -> tuple[str, str]:
    """What is to be done for these tensors, and the reason in a few words.

    ``"auto"`` is Triton on a GPU, C++ on a CPU, and ATen elsewhere or where C++ can't be compiled. In double precision
    it is ATen, whatever was asked for: the kernels' sums are float32. C++ is for the op ``"routed_lora"`` alone.

    UnsupportedModelError: ``"cpp"`` was asked for, and can't be compiled, or on another device
    """
    chosen, reason = lowering, "asked for"
    if lowering == "auto":
        chosen, reason = _automatic(x, *others, op=op)
    elif lowering == "cpp" and op != "routed_lora":
        chosen, reason = "aten", "C++ is for adapters of a bank"
    if chosen in ("triton", "cpp") and aten.accumulator(x, *others) == torch.float64:
        return "aten", "double precision"
    if chosen == "cpp":
        cpp.check(x.device)
    return chosen, reason


def _automatic(x: Tensor, *others: Tensor, op: str) -> tuple[str, str]:
    if x.device.type in ("cuda", "xpu"):
        return "triton", "on a GPU"
    if op != "routed_lora":
        return "aten", "weights of the graph itself, on a CPU"
    if aten.accumulator(x, *others) == torch.float64:
        return "aten", "double precision"
    if not cpp.takes(x, *others):
        return "aten", f"{x.device.type}, {x.dtype}".replace("torch.", "")
    return ("cpp", "on a CPU") if cpp.is_built() else ("aten", "no C++20 compiler")


def _routed_lora(
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
    windows: Tensor,
    spread: Tensor | None,
    lowering: str,
    layers: list[Tensor] | None = None,
    biases: list[Tensor | None] | None = None,
    last: Tensor | None = None,
) -> list[Tensor]:
    layers, biases = layers or [], biases or []
    if last is not None:
        tables = (slots, weights, count, owner, scale, windows)
        outs = _routed_lora(ys, x, a, b, caps, *tables, spread, lowering)
        return keep_base(outs, ys, last, count)
    lowering = resolve_lowering(lowering, x, *ys, *a, *b)
    if _needs_grad(x, *ys, *a, *b, *layers, *(c for c in biases if c is not None)):
        lowering = "aten"
    if lowering == "cpp" and all(y.dtype == x.dtype for y in ys):
        return cpp.routed_lora(ys, x, a, b, caps, slots, weights, count, scale, windows, layers, biases)
    if layers and lowering != "triton":
        ys = [F.linear(x, w, c) for w, c in zip(layers, biases, strict=True)]
    if lowering in ("aten", "cpp"):
        if spread is None:
            spread = aten.row_weights(x, slots, weights, count, windows)
        return aten.routed_lora(ys, x, a, b, caps, owner, scale, spread)
    if lowering == "reference":
        return torch.ops.lorafx.routed_reference(ys, x, a, b, caps, slots, weights, count, scale, windows)
    from lorafx.kernels import sgmv  # needs Triton, which is not on every machine

    return sgmv.routed_lora(ys, x, a, b, caps, slots, weights, count, scale, windows, layers, biases)


def _fused_lora(
    ys: list[Tensor],
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    biases: list[Tensor | None],
    scales: list[float],
    scale_tensors: list[Tensor | None],
    lowering: str,
) -> list[Tensor]:
    lowering = resolve_lowering(lowering, x, *ys, *a, *b, op="fused_lora")
    tensors = [t for t in (*biases, *scale_tensors) if t is not None]
    if lowering == "aten" or _needs_grad(x, *ys, *a, *b, *tensors):
        return aten.fused_lora(ys, x, a, b, biases, scales, scale_tensors)
    if lowering == "triton":
        from lorafx.kernels import sgmv  # needs Triton, which is not on every machine

        return sgmv.fused_lora(ys, x, a, b, biases, scales, scale_tensors)
    # The reference: one adapter in slot 0, in use by every row.
    rows = [t.t() if bias is None else torch.cat([t.t(), bias[None]]) for t, bias in zip(b, biases, strict=True)]
    ranks = [t.shape[0] for t in a]
    factors = [
        torch.full((1,), s, dtype=torch.float32, device=x.device) if t is None else (t.reshape(1) * s).to(torch.float32)
        for s, t in zip(scales, scale_tensors, strict=True)
    ]
    owner = torch.zeros(sum(len(r) for r in rows), dtype=torch.int32, device=x.device)
    # No torch.tensor: in a graph that is a copy from the host at every call.
    window = [v for r, bias in zip(ranks, biases, strict=True) for v in (0, r, -1 if bias is None else r)]
    windows = torch.cat([torch.full((1,), v, dtype=torch.int32, device=x.device) for v in window]).view(1, -1, 3)
    slots = torch.zeros((1, 1), dtype=torch.int32, device=x.device)
    weights = torch.ones((1, 1), dtype=torch.float32, device=x.device)
    count = torch.ones((), dtype=torch.int64, device=x.device)
    scale = torch.cat(factors)[None]
    dtype = a[0].dtype
    return _routed_lora(
        ys,
        x,
        [t.to(dtype) for t in a],
        [r.to(dtype) for r in rows],
        ranks,
        slots,
        weights,
        count,
        owner,
        scale,
        windows,
        None,
        lowering,
    )


def _needs_grad(*tensors: Tensor) -> bool:
    """Only the ATen lowering has a backward."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


# Called by a layer that runs eagerly inside a compiled model, these would be compiled by Dynamo too, for each shape.
_library.impl("row_weights", torch.compiler.disable(aten.row_weights), "CompositeImplicitAutograd")
_library.impl("routed_lora", torch.compiler.disable(_routed_lora), "CompositeImplicitAutograd")
_library.impl("fused_lora", torch.compiler.disable(_fused_lora), "CompositeImplicitAutograd")


def _routed_cpp_fake(ys, layers, biases, x, a, b, *rest):
    return [x.new_empty((*x.shape[:-1], rows.shape[1])) for rows in b]


torch.library.register_fake("lorafx::routed_cpp", _routed_cpp_fake, lib=_library)


@torch.library.custom_op("lorafx::routed_reference", mutates_args=())
def routed_reference(
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
    return reference.routed_lora(ys, x, a, b, caps, slots, weights, count, scale, windows)


@routed_reference.register_fake
def _(ys, x, a, b, caps, slots, weights, count, scale, windows):
    return [torch.empty_like(y, memory_format=torch.contiguous_format) for y in ys]


def _branch(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, scale_tensor: Tensor | None
) -> Tensor:
    return aten.fused_lora([y], x, [a], [b], [bias], [scale], [scale_tensor])[0]


_library.impl("branch", _branch, "CompositeImplicitAutograd")

_site_forward: Callable[[Tensor, Tensor, int, int], Tensor] | None = None


def set_site_forward(forward: Callable[[Tensor, Tensor, int, int], Tensor]) -> None:
    """Tell the marker how to compute ``(y, x, bank, site)`` eagerly; the bank's side calls this once, at import."""
    global _site_forward
    _site_forward = forward


def _site_eager(y: Tensor, x: Tensor, bank: int, site: int) -> Tensor:
    out = _site_forward(y, x, bank, site)
    return out.clone() if out is y else out  # an op may not return its input


def _site_setup_context(ctx, inputs, output) -> None:
    y, x, ctx.bank, ctx.site = inputs
    ctx.save_for_backward(y, x)


def _site_backward(ctx, grad: Tensor):
    y, x = (t.detach().requires_grad_() for t in ctx.saved_tensors)
    with torch.enable_grad():
        out = _site_forward(y, x, ctx.bank, ctx.site)
    grad_y, grad_x = torch.autograd.grad(out, (y, x), grad, allow_unused=True)
    return grad_y, grad_x, None, None


_library.impl("site", _site_eager, "CompositeExplicitAutograd")
torch.library.register_fake(
    "lorafx::site", lambda y, x, bank, site: torch.empty_like(y, memory_format=torch.contiguous_format), lib=_library
)
torch.library.register_autograd("lorafx::site", _site_backward, setup_context=_site_setup_context, lib=_library)
