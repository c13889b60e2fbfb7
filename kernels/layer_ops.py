"""The ops for adapted layers that are not linear: a marker, and what it becomes.

``lorafx::layer_site``    a marker, made by an adapted embedding or convolution: adds what the routing says to ``y``
``lorafx::routed_layer``  the same with weights from the bank, adapters chosen row by row

``kind`` is ``"embedding"`` (``x``: ids, ``window``: empty, ``factor``: what the layer multiplies its own output by) or
``"conv2d"`` (``window``: height and width of kernel, stride and padding). Both become plain PyTorch on every device
(``layer_kinds.py``), which Inductor fuses, or the float64 reference. The other arguments are those of
``lorafx::routed_lora`` (``ops.py``) for one sibling: a ``[capacity, in]``, b ``[capacity + biases, out]``, with a
convolution's A flattened to one row for each rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorafx.kernels import aten, layer_kinds

_library = torch.library.Library("lorafx", "FRAGMENT")
_library.define("layer_site(Tensor y, Tensor x, Tensor? factor, str kind, int[] window, int bank, int site) -> Tensor")
_library.define(
    "routed_layer(Tensor y, Tensor x, Tensor? factor, str kind, int[] window, Tensor a, Tensor b, Tensor slots,"
    " Tensor weights, Tensor count, Tensor owner, Tensor scale, Tensor windows, Tensor? spread, str lowering) -> Tensor"
)


def choose_lowering(lowering: str) -> tuple[str, str]:
    """What ``routed_layer`` becomes, and the reason in a few words."""
    if lowering == "reference":
        return lowering, "asked for"
    return "aten", "plain PyTorch for embeddings and convolutions"


def unbatched(kind: str, x: Tensor) -> bool:
    """Whether ``x`` has no dimension of rows: it is one row."""
    return x.dim() == (3 if kind == "conv2d" else 1) or x.dim() == 0


def rows_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a linear layer's input with the same rows has; of ids in one dimension nobody knows whether they
    are rows or the positions of one, so they count as one row."""
    if kind == "conv2d":
        return shape[:2] if len(shape) == 4 else (1,)
    return (*shape, 1) if len(shape) > 1 else (1,)


def _routed_layer(
    y: Tensor,
    x: Tensor,
    factor: Tensor | None,
    kind: str,
    window: list[int],
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    weights: Tensor,
    count: Tensor,
    owner: Tensor,
    scale: Tensor,
    windows: Tensor,
    spread: Tensor | None,
    lowering: str,
) -> Tensor:
    if unbatched(kind, x):
        tables = (a, b, slots, weights, count, owner, scale, windows)
        return _routed_layer(y[None], x[None], factor, kind, window, *tables, None, lowering)[0]
    if b.shape[0] == 0:  # room for no rank yet; a convolution without filters is refused
        return y.clone()
    if choose_lowering(lowering)[0] == "reference":
        as_y, as_x = layer_kinds.as_linear(kind, y, x, window, a.shape[1])
        if factor is not None:
            scale = scale.double() * factor.double()
        tables = ([a], [b], [a.shape[0]], slots, weights, count, scale, windows)
        return layer_kinds.from_linear(kind, torch.ops.lorafx.routed_reference([as_y], as_x, *tables)[0], y)
    if spread is None:
        spread = aten.row_weights(x, slots, weights, count, windows)
    if kind == "embedding":
        return layer_kinds.routed_embedding(y, x, factor, a, b, owner, scale, spread)
    return layer_kinds.routed_conv2d(y, x, window, a, b, owner, scale, spread)


_library.impl("routed_layer", torch.compiler.disable(_routed_layer), "CompositeImplicitAutograd")

Forward = Callable[[Tensor, Tensor, "Tensor | None", str, list[int], int, int], Tensor]
_forward: Forward | None = None


def set_layer_site_forward(forward: Forward) -> None:
    """Tell the marker how to compute itself eagerly; the bank's side calls this once, at import."""
    global _forward
    _forward = forward


def _eager(y: Tensor, x: Tensor, factor: Tensor | None, kind: str, window: list[int], bank: int, site: int) -> Tensor:
    out = _forward(y, x, factor, kind, window, bank, site)
    return out.clone() if out is y else out  # an op may not return its input


def _setup_context(ctx, inputs, output) -> None:
    y, x, factor, *ctx.rest = inputs
    ctx.save_for_backward(y, x, factor)


def _backward(ctx, grad: Tensor):
    y, x, factor = ctx.saved_tensors
    y = y.detach().requires_grad_()
    x = x.detach().requires_grad_() if x.is_floating_point() else x
    with torch.enable_grad():
        out = _forward(y, x, factor, *ctx.rest)
    wanted = [y, x] if x.requires_grad else [y]
    grads = torch.autograd.grad(out, wanted, grad, allow_unused=True)
    return grads[0], grads[1] if x.requires_grad else None, None, None, None, None, None


_library.impl("layer_site", _eager, "CompositeExplicitAutograd")
torch.library.register_fake(
    "lorafx::layer_site", lambda y, x, factor, kind, window, bank, site: torch.empty_like(y), lib=_library
)
torch.library.register_autograd("lorafx::layer_site", _backward, setup_context=_setup_context, lib=_library)
