"""The ATen lowering against the reference: the same matrix as the Triton kernels', and gradients.

All-slots masking multiplies idle lanes by zero: B is finite everywhere and zero in free rows, free rows of A hold NaN.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.cases import BASE, MIXED, RANKS, assert_delta, make_case


@pytest.mark.parametrize("tokens", [(), (5,), (2, 3)], ids=["decode", "prefill", "two dimensions"])
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS.keys())
def test_ranks(ranks, tokens):
    case = make_case(ranks, tokens=tokens, poison="free_a")
    assert_delta(case, case.run("aten"))


@pytest.mark.parametrize("lowering", ["aten", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_dtypes(lowering, dtype, adapter_dtype, bias):
    case = make_case((8, 0, 3), dtype=dtype, adapter_dtype=adapter_dtype, bias=bias, poison="free_a")
    # In double precision only scale and weights are float32, and these are exact here.
    assert_delta(case, case.run(lowering), **({"bound": 1e-12} if dtype == torch.float64 else {}))


@pytest.mark.parametrize("widths", [(2049, 1, 17), (1, 64, 300)])
@pytest.mark.parametrize("separate_a", [False, True])
def test_widths(widths, separate_a):
    case = make_case(widths=widths, separate_a=separate_a, poison="free_a")
    assert_delta(case, case.run("aten"))


@pytest.mark.parametrize("tokens", [(), (33,)], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    "entries",
    [
        [[(0, 0.7), (1, 0.3)], [(3, -1.5)], BASE, [(0, 0.5), (0, 0.5)]],
        [[(3, 1.0)]] * 2,
        [BASE, BASE],
    ],
    ids=["several pairs", "last slot", "base only"],
)
@pytest.mark.parametrize("repeats", [1, 4])
def test_routing(entries, tokens, repeats):
    case = make_case(entries=entries, tokens=tokens, repeats=repeats, poison="free_a")
    assert_delta(case, case.run("aten"))


@pytest.mark.parametrize("lowering", ["aten", "reference"])
def test_no_batch_dimension(lowering):
    case = make_case(entries=[[(1, 1.0)]], tokens=(), poison="free_a")
    single = replace(case, x=case.x[0], ys=[y[0] for y in case.ys])
    assert_delta(case, [out[None] for out in single.run(lowering)])


def test_reference_reads_live_rows_only_and_leaves_its_inputs():
    case = make_case(dtype=torch.float64, bias=True)
    before = [y.clone() for y in case.ys]
    assert not any(out.isnan().any() for out in case.run("reference"))
    assert all(map(torch.equal, before, case.ys))


def test_neighbours_do_not_matter():
    case = make_case(tokens=(5,), poison="free_a")
    x = torch.full_like(case.x, torch.nan)
    x[0] = case.x[0]
    for out, other in zip(case.run("aten"), replace(case, x=x).run("aten"), strict=True):
        assert torch.equal(out[0], other[0])


def test_compiled_without_recompiling_for_other_routing():
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(
        lambda *args: torch.ops.lorafx.routed_lora(*args, None, "aten"), fullgraph=True, backend=counter
    )
    for entries in (MIXED, MIXED[::-1], [BASE] * 3):
        case = make_case(entries=entries, poison="free_a")
        assert_delta(case, compiled(*case.args()))
    assert counter.frame_count == 1


def test_routed_gradients():
    case = make_case((2, 1), widths=(3, 2), k=4, tokens=(2,), dtype=torch.float64, bias=True, poison="none")
    inputs = [t.clone().requires_grad_() for t in (*case.ys, case.x, *case.a, *case.b)]

    def run(y0, y1, x, a, b0, b1):
        rest = (case.caps, case.slots, case.weights, case.count, case.owner, case.scale, case.windows)
        return torch.ops.lorafx.routed_lora([y0, y1], x, [a], [b0, b1], *rest, None, "aten")

    assert torch.autograd.gradcheck(run, inputs)


def test_fused_gradients():
    torch.manual_seed(0)

    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    inputs = [leaf(2, 3, 5), leaf(2, 3, 4), leaf(2, 3, 6), leaf(2, 6), leaf(1, 6), leaf(5, 2), leaf(4, 1), leaf(5)]

    def run(y0, y1, x, a0, a1, b0, b1, bias, scale):
        return torch.ops.lorafx.fused_lora(
            [y0, y1], x, [a0, a1], [b0, b1], [bias, None], [2.0, -0.5], [None, scale], "aten"
        )

    assert torch.autograd.gradcheck(run, [*inputs, leaf()])


@pytest.mark.parametrize("lowering", ["aten", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [(), (5,)])
def test_fused(lowering, dtype, tokens):
    """float32 adapters, as PEFT makes them, on a base of either dtype."""
    torch.manual_seed(0)
    ranks, widths, k, scales = (8, 1, 40), (33, 1, 65), 70, [1.0, -2.0, 0.5]
    x = torch.randn(3, *tokens, k).to(dtype)
    ys = [torch.randn(3, *tokens, w).to(dtype) for w in widths]
    a, b = [torch.randn(r, k) for r in ranks], [torch.randn(w, r) for w, r in zip(widths, ranks, strict=True)]
    biases, tensors = [torch.randn(33), None, torch.randn(65)], [None, torch.tensor(3.0), torch.tensor(0.5)]
    outs = torch.ops.lorafx.fused_lora(ys, x, a, b, biases, scales, tensors, lowering)
    for out, y, a_i, b_i, bias, scale, tensor in zip(outs, ys, a, b, biases, scales, tensors, strict=True):
        delta = x.double() @ a_i.double().T @ b_i.double().T + (0 if bias is None else bias.double())
        delta *= scale * (1.0 if tensor is None else tensor.item())
        assert out.dtype == dtype
        allowed = 1e-5 * delta.norm() + torch.finfo(dtype).eps / 2 * out.double().norm()
        assert (out.double() - y.double() - delta).norm() <= allowed
