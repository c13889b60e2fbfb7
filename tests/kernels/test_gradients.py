"""Gradients of the ops: against finite differences in float64, and no worse than the unfused graph's in less."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from tests.kernels.cases import BASE, make_case

RANKS = (2, 1, 3, 1, 2)
WIDTHS = (5, 4, 3, 2, 6)
K = 4


def leaf(*shape: int, strided: bool = False) -> Tensor:
    """A float64 leaf; strided: a view with gaps, its two last dimensions swapped."""
    if strided:
        wide = torch.randn(*shape[:-2], shape[-1], 2 * shape[-2], dtype=torch.float64)
        return wide[..., ::2].transpose(-1, -2).detach().requires_grad_()
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def split(tensors: tuple[Tensor, ...], *sizes: int) -> list[list[Tensor]]:
    parts, at = [], 0
    for size in sizes:
        parts.append(list(tensors[at : at + size]))
        at += size
    return parts


@pytest.mark.parametrize(("rows", "strided"), [(2, False), (2, True), (0, False)])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_fused_lora(count, rows, strided):
    """Mixed ranks and widths; biases and scale tensors on every second sibling."""
    torch.manual_seed(count)
    biased = [i for i in range(count) if i % 2 == 0]
    x = leaf(rows, 1, K, strided=strided)
    ys = [leaf(rows, 1, width, strided=strided) for width in WIDTHS[:count]]
    a = [leaf(rank, K, strided=strided) for rank in RANKS[:count]]
    b = [leaf(width, rank, strided=strided) for width, rank in zip(WIDTHS[:count], RANKS[:count], strict=True)]
    biases, scales = [leaf(WIDTHS[i]) for i in biased], [leaf() for _ in biased]

    def run(x, *rest):
        ys, a, b, given, factors = split(rest, count, count, count, len(biased), len(biased))
        placed = [dict(zip(biased, values, strict=True)) for values in (given, factors)]
        biases, tensors = ([one.get(i) for i in range(count)] for one in placed)
        numbers = [0.5 - i for i in range(count)]
        return tuple(torch.ops.lorafx.fused_lora(ys, x, a, b, biases, numbers, tensors, "auto"))

    inputs = (x, *ys, *a, *b, *biases, *scales)
    assert gradcheck(run, inputs)
    if count == 2 and rows:
        assert gradgradcheck(run, inputs)


@pytest.mark.parametrize("strided", [False, True])
def test_branch(strided):
    torch.manual_seed(0)
    shapes = ((2, 3, 5), (2, 3, K), (2, K), (5, 2))
    inputs = (*(leaf(*shape, strided=strided) for shape in shapes), leaf(5), leaf())

    def run(y, x, a, b, bias, factor):
        return torch.ops.lorafx.branch(y, x, a, b, bias, -1.5, factor)

    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


@pytest.mark.parametrize("layers", [False, True], ids=["base outputs", "the layers themselves"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [(2,), (2, 0, 1)], ids=len)
def test_routed_lora(ranks, bias, layers):
    """Rows with their own adapters and rows on the base model; with ``layers`` also the folded weights'."""
    widths = WIDTHS[: len(ranks)]
    case = make_case(
        ranks,
        widths=widths,
        k=K,
        tokens=(1,),
        entries=[[(0, 0.7), (1, -0.3)], BASE, [(3, 1.0)]],
        dtype=torch.float64,
        bias=bias,
        poison="none",
    )
    own = [leaf(width, K) for width in widths] + [leaf(width) for width in widths[1:]] if layers else case.ys
    inputs = [t.detach().clone().requires_grad_() for t in (case.x, *case.a, *case.b, *own)]

    def run(x, *rest):
        a, b, own = split(rest, len(case.a), len(case.b), len(rest) - len(case.a) - len(case.b))
        arguments = vars(replace(case, x=x, a=a, b=b, ys=[] if layers else own))
        folded = (own[: len(widths)], [None, *own[len(widths) :]]) if layers else ()
        return tuple(torch.ops.lorafx.routed_lora(*arguments.values(), None, "auto", *folded))

    assert gradcheck(run, inputs)
    if ranks == (2,):
        assert gradgradcheck(run, inputs)


def test_base_rows_give_the_adapters_nothing():
    case = make_case((2, 1), widths=(3, 2), k=K, entries=[BASE, [(0, 1.0)]], poison="free_a")
    a, b = case.a[0].requires_grad_(), [t.requires_grad_() for t in case.b]
    base, mine = (case.owner[: case.caps[0]] == slot for slot in (-1, 0))
    outs = case.run("auto")
    (whole,) = torch.autograd.grad(sum(out.sum() for out in outs), a, retain_graph=True)
    on_base = torch.autograd.grad(sum(out[0].sum() for out in outs), (a, *b))
    assert all(not grad.any() for grad in on_base)
    assert whole[: case.caps[0]][mine].abs().sum() > 0
    assert not whole[: case.caps[0]][base].any()  # free rows, which hold NaN


def unfused(ys, x, a, b, biases, scales):
    """The branches as PEFT computes them: cast, A, B, scale, sum, cast back."""
    return [
        (y + F.linear(F.linear(x.to(a_i.dtype), a_i), b_i, bias) * scale).to(y.dtype)
        for y, a_i, b_i, bias, scale in zip(ys, a, b, biases, scales, strict=True)
    ]


@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=["float32", "bf16 base", "bf16"],
)
def test_no_worse_than_the_unfused_graph(dtype, adapter):
    """Each gradient's distance to float64's, beside that of the unfused branches."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    ranks, widths, k = (8, 64, 3), (96, 32, 33), 128
    ys, x = [randn(4, 7, width).to(dtype) for width in widths], (randn(4, 7, k) * k**0.5).to(dtype)
    a = [randn(rank, k).to(adapter) for rank in ranks]
    b = [randn(width, rank).to(adapter) for width, rank in zip(widths, ranks, strict=True)]
    biases, scales = [randn(widths[0]).to(adapter), None, None], [2.0, -0.5, 1.0]
    seeds = [randn(4, 7, width) * width**0.5 for width in widths]

    def gradients(op, wide: bool) -> list[Tensor]:
        def given(tensors):
            return [t if t is None else (t.double() if wide else t).detach().clone().requires_grad_() for t in tensors]

        (own_x,), own_ys, own_a, own_b, own_biases = map(given, ([x], ys, a, b, biases))
        outs = op(own_ys, own_x, own_a, own_b, own_biases, scales)
        sum((out.double() * seed).sum() for out, seed in zip(outs, seeds, strict=True)).backward()
        return [t.grad for t in (own_x, *own_ys, *own_a, *own_b, own_biases[0])]

    def fused(ys, x, a, b, biases, scales):
        return torch.ops.lorafx.fused_lora(ys, x, a, b, biases, scales, [None] * 3, "auto")

    exact, ours, theirs = gradients(unfused, True), gradients(fused, False), gradients(unfused, False)
    for want, mine, plain in zip(exact, ours, theirs, strict=True):
        assert mine.dtype == plain.dtype
        rounding = torch.finfo(mine.dtype).eps
        allowed = 1.1 * (plain.double() - want).norm() + rounding * want.norm()
        assert (mine.double() - want).norm() <= allowed
