"""The products of experts with LoRA on them, against loops in double precision, and the backward of the trained one."""

from __future__ import annotations

import pytest
import torch

from lorafx.kernels.experts import expert_delta

EXPERTS, RANK, WIDTH, OUT = 4, 3, 5, 6
SCALE = 1.5


def values(ids, seed=0):
    """y, x, a and b, in double precision; ``ids`` ascending."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (len(ids), OUT), (len(ids), WIDTH), (EXPERTS * RANK, WIDTH), (OUT, RANK * EXPERTS)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def in_loops(x, ids, a, b):
    """As ParamWrapper.get_delta_weight makes the weight that it adds to each expert's: the rank rows of A expert by
    expert, those of B rank by rank."""
    out = torch.zeros(len(ids), OUT, dtype=torch.float64)
    for pair, expert in enumerate(ids.tolist()):
        weight = torch.zeros(OUT, WIDTH, dtype=torch.float64)
        for rank in range(RANK):
            weight += torch.outer(b[:, rank * EXPERTS + expert], a[expert * RANK + rank])
        out[pair] = weight @ x[pair] * SCALE
    return out


FEW, MANY = torch.tensor([0, 2, 2]), torch.tensor([0, 0, 1, 1, 1, 3, 3])  # an expert without tokens in both


@pytest.mark.parametrize("ids", [FEW, MANY], ids=["few", "many"])
def test_what_is_added(ids):
    y, x, a, b = values(ids)
    want = in_loops(x, ids, a, b)
    gates = torch.full((len(ids),), SCALE, dtype=torch.float64)
    assert torch.allclose(expert_delta(x, ids, gates, a, b.t(), EXPERTS), want)
    got = torch.ops.lorafx.expert_lora(y, x, ids, a, b, SCALE, EXPERTS, "")
    assert torch.allclose(got, y + want)
    rounded = torch.ops.lorafx.expert_lora(y.bfloat16(), x.bfloat16(), ids, a.float(), b.float(), SCALE, EXPERTS, "")
    assert rounded.dtype == torch.bfloat16
    assert (rounded.double() - got).norm() <= 1e-2 * got.norm()


@pytest.mark.parametrize("ids", [FEW, MANY], ids=["few", "many"])
def test_gradients_in_double_precision(ids):
    inputs = [value.requires_grad_() for value in values(ids)]
    assert torch.autograd.gradcheck(
        lambda y, x, a, b: torch.ops.lorafx.expert_lora(y, x, ids, a, b, SCALE, EXPERTS, ""), inputs
    )


def test_as_an_op():
    y, x, a, b = (value.requires_grad_() for value in values(MANY))
    torch.library.opcheck(torch.ops.lorafx.expert_lora.default, (y, x, MANY, a, b, SCALE, EXPERTS, "experts.down_proj"))


def test_each_gradient_has_the_dtype_of_its_input():
    y, x, a, b = values(MANY)
    inputs = [y.bfloat16(), x.bfloat16(), a.float(), b.float()]
    for value in inputs:
        value.requires_grad_()
    out = torch.ops.lorafx.expert_lora(*inputs[:2], MANY, *inputs[2:], SCALE, EXPERTS, "")
    out.float().square().sum().backward()
    for value in inputs:
        assert (value.grad.dtype, value.grad.shape) == (value.dtype, value.shape)
        assert value.grad.norm() > 0
