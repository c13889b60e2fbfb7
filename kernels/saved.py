"""``lorafx::saved``, behind a module of which adapters have copies of their own (PEFT's ``modules_to_save``).

``y`` is what the model's own module gives for ``x``; the rows whose adapter has a copy get what the copy gives. Opaque:
what is in use, and who has a copy, is found when it runs, so no change of either is seen by what was compiled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_library = torch.library.Library("lorafx", "FRAGMENT")
_library.define("saved(Tensor y, Tensor x, int bank, int place) -> Tensor")

_forward: Callable[[Tensor, Tensor, int, int], Tensor] | None = None


def set_saved_forward(forward: Callable[[Tensor, Tensor, int, int], Tensor]) -> None:
    """Tell the op how to compute ``(y, x, bank, place)``; the bank's side calls this once, at import."""
    global _forward
    _forward = forward


def _eager(y: Tensor, x: Tensor, bank: int, place: int) -> Tensor:
    return _forward(y, x, bank, place).clone(memory_format=torch.contiguous_format)  # an op may not return its input


def _setup_context(ctx, inputs, output) -> None:
    y, x, ctx.bank, ctx.place = inputs
    ctx.save_for_backward(y, x)


def _backward(ctx, grad: Tensor):
    y, x = (t.detach().requires_grad_(t.is_floating_point()) for t in ctx.saved_tensors)
    with torch.enable_grad():
        out = _forward(y, x, ctx.bank, ctx.place)
    wanted = [t for t in (y, x) if t.requires_grad]
    grads = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True))
    return next(grads), next(grads, None), None, None


_library.impl("saved", _eager, "CompositeExplicitAutograd")
torch.library.register_fake(
    "lorafx::saved", lambda y, x, bank, place: torch.empty_like(y, memory_format=torch.contiguous_format), lib=_library
)
torch.library.register_autograd("lorafx::saved", _backward, setup_context=_setup_context, lib=_library)
