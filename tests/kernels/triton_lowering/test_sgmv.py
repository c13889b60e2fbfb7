"""The Triton kernels, on a GPU where there is one, else in Triton's interpreter (see ../test_interpreter.py)."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cases import (
    BASE,
    CAN_RUN_KERNELS,
    KERNEL_DEVICE,
    MIXED,
    RANKS,
    SIXTEEN_BITS,
    assert_delta,
    make_case,
)

if not CAN_RUN_KERNELS:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from lorafx.kernels import sgmv

TOKENS = {"decode": (), "one": (1,), "five": (5,), "33": (33,), "two dimensions": (2, 3)}


@pytest.mark.parametrize("tokens", [(), (5,)], ids=["decode", "prefill"])
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS.keys())
def test_ranks(ranks, tokens):
    case = make_case(ranks, tokens=tokens)
    assert_delta(case, case.run("triton"))


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS])
def test_tokens_of_a_row(tokens, dtype):
    case = make_case(tokens=tokens, dtype=dtype)
    assert_delta(case, case.run("triton"))


@pytest.mark.parametrize("tokens", [(), (5,)], ids=["decode", "prefill"])
@pytest.mark.parametrize("widths", [(2049, 1, 17), (1, 64, 300)])
def test_widths(widths, tokens):
    case = make_case(widths=widths, tokens=tokens)
    assert_delta(case, case.run("triton"))


@pytest.mark.parametrize("tokens", [(), (5,)], ids=["decode", "prefill"])
@pytest.mark.parametrize("k", [1, 16, 1030])
def test_k(k, tokens):
    """1030 is cut into several programs along k, none of which gets whole blocks."""
    case = make_case(k=k, tokens=tokens)
    assert_delta(case, case.run("triton"))


@pytest.mark.parametrize("tokens", [(), (5,)], ids=["decode", "prefill"])
def test_several_pairs(tokens):
    entries = [[(0, 0.7), (1, 0.3)], [(3, -1.5)], BASE, [(1, 1.0), (3, 0.25), (0, 2.0)], [(0, 0.5), (0, 0.5)]]
    case = make_case(entries=entries, tokens=tokens)
    assert_delta(case, case.run("triton"))


@pytest.mark.parametrize("tokens", [(), (5,)], ids=["decode", "prefill"])
@pytest.mark.parametrize("separate_a", [False, True])
def test_bias(tokens, separate_a):
    case = make_case((8, 0, 3), bias=True, separate_a=separate_a, tokens=tokens)
    assert_delta(case, case.run("triton"))


@pytest.mark.parametrize("tokens", [(), (5,)], ids=["decode", "prefill"])
def test_last_slot(tokens):
    case = make_case(entries=[[(3, 1.0)]] * 2, tokens=tokens)
    assert_delta(case, case.run("triton"))


@pytest.mark.parametrize("tokens", [(), (33,)], ids=["decode", "prefill"])
def test_base_only(tokens):
    case = make_case(entries=[BASE, BASE], tokens=tokens)
    for out, y in zip(case.run("triton"), case.ys, strict=True):
        assert torch.equal(out, y)


@pytest.mark.parametrize("tokens", [(), (5,)], ids=["decode", "prefill"])
def test_repeated_rows(tokens):
    """Beams repeat each row in place, so the routing is shorter than the batch."""
    case = make_case(repeats=4, tokens=tokens)
    assert_delta(case, case.run("triton"))


@pytest.fixture
def few_rows_are_many(monkeypatch):
    """Tiles of 64 tokens that span rows, as for inputs flattened to [batch * tokens, k], but with few rows."""
    monkeypatch.setattr("lorafx.kernels.schedule.FEW_ROWS", 16)


@pytest.mark.parametrize(("count", "repeats"), [(3, 30), (3, 7), (33, 2), (70, 1)])
def test_tile_spans_rows(count, repeats, few_rows_are_many):
    case = make_case((3,), entries=[MIXED[i % 3] for i in range(count)], repeats=repeats, tokens=(), k=20)
    assert_delta(case, case.run("triton"))


def test_no_batch_dimension():
    case = make_case(entries=[[(1, 1.0)]], tokens=())
    single = replace(case, x=case.x[0], ys=[y[0] for y in case.ys])
    outs = single.run("triton")
    assert [out.shape for out in outs] == [y.shape for y in single.ys]
    assert_delta(case, [out[None] for out in outs])


def test_no_rows():
    case = make_case()
    empty = replace(case, x=case.x[:0], ys=[y[:0] for y in case.ys])
    assert [out.shape for out in empty.run("triton")] == [y.shape for y in empty.ys]


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_float32_adapters_on_16_bit_base(base):
    case = make_case(dtype=base, adapter_dtype=torch.float32, bias=True)
    assert_delta(case, case.run("triton"))


def test_mixed_output_dtypes():
    case = make_case()
    case = replace(case, ys=[case.ys[0].half(), case.ys[1], case.ys[2]])
    assert_delta(case, case.run("triton"))


@pytest.mark.parametrize("tokens", [(), (5,)], ids=["decode", "prefill"])
def test_strides(tokens):
    """A bank's rows are views of one storage; q, k and v may be views of one GEMM; x may be transposed."""
    case = make_case(tokens=tokens)
    width = sum(y.shape[-1] for y in case.ys)
    fused = torch.cat([*case.ys, case.ys[0]], -1)[..., :width]
    b = [case.b[0].t().contiguous().t(), torch.cat([case.b[1]] * 2, 1)[:, : case.b[1].shape[1]], case.b[2]]
    views = replace(
        case,
        x=case.x.transpose(0, -1).contiguous().transpose(0, -1),
        ys=list(fused.split([y.shape[-1] for y in case.ys], -1)),
        a=[case.a[0].t().contiguous().t()],
        b=b,
    )
    assert not views.x.is_contiguous()
    assert_delta(case, views.run("triton"))


@pytest.mark.parametrize("tokens", [(), (5,)], ids=["decode", "prefill"])
def test_same_bits(tokens):
    case = make_case(tokens=tokens, k=520, entries=[*MIXED, [(0, 0.5), (3, 0.5)]])
    for first, second in zip(case.run("triton"), case.run("triton"), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("tokens", "repeats"), [((), 1), ((5,), 2), ((), 30)], ids=["decode", "prefill", "flat"])
def test_neighbours_do_not_matter(tokens, repeats, few_rows_are_many):
    """What the other rows hold, NaN included, and which adapters they use leave a row's bits alone."""
    case = make_case((8, 3), tokens=tokens, repeats=repeats)
    outs = case.run("triton")
    for entry in range(3):
        rows = slice(entry * repeats, (entry + 1) * repeats)
        x, slots = torch.full_like(case.x, torch.nan), torch.zeros_like(case.slots)
        x[rows], slots[entry] = case.x[rows], case.slots[entry]
        weights = torch.full_like(case.weights, torch.nan)
        weights[entry] = case.weights[entry]
        ys = [torch.full_like(y, torch.nan) for y in case.ys]
        for y, own in zip(ys, case.ys, strict=True):
            y[rows] = own[rows]
        others = replace(case, x=x, ys=ys, slots=slots, weights=weights).run("triton")
        for out, other in zip(outs, others, strict=True):
            assert torch.equal(out[rows], other[rows])


def test_nan_adapter_stays_in_its_rows(few_rows_are_many):
    """A tile of a flat batch holds rows of several adapters; one of them is broken."""
    case = make_case((3,), entries=[[(0, 1.0)], [(1, 1.0)]], repeats=20, tokens=(), k=20)
    start, rank, _ = case.windows[1, 0].tolist()
    b = case.b[0].clone()
    b[start : start + rank] = torch.nan
    (out,), (broken,) = case.run("triton"), replace(case, b=[b]).run("triton")
    assert torch.equal(out[:20], broken[:20])
    assert broken[20:].isnan().all()


def test_routing_in_place_is_seen():
    """Nothing of the routing is kept on the host."""
    case = make_case()
    case.run("triton")
    case.slots[0], case.slots[2] = 1, 0
    case.count.fill_(3)
    assert_delta(case, case.run("triton"))


def test_compiled():
    case = make_case()
    compiled = torch.compile(lambda *args: torch.ops.lorafx.routed_lora(*args, None, "triton"), fullgraph=True)
    for out, eager in zip(compiled(*case.on(KERNEL_DEVICE).args()), case.run("triton"), strict=True):
        assert torch.equal(out.cpu(), eager)


@pytest.mark.parametrize("tokens", [(), (5,)], ids=["decode", "prefill"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale_tensors", [False, True])
def test_fused(tokens, bias, scale_tensors):
    """No routing: weights as they stand in a graph, B transposed, scales on the host and perhaps a tensor too."""
    ranks, widths, k, scales = (8, 1, 40, 3, 7), (33, 1, 65, 9, 4), 70, [1.0, -2.0, 0.5, 3.0, 0.25]
    torch.manual_seed(0)
    x = torch.randn(3, *tokens, k)
    ys = [torch.randn(3, *tokens, w) for w in widths]
    a = [torch.randn(r, k) for r in ranks]
    b = [torch.randn(w, r) for w, r in zip(widths, ranks, strict=True)]
    biases = [torch.randn(w) if bias and i % 2 == 0 else None for i, w in enumerate(widths)]
    tensors = [torch.tensor(0.5 + i) if scale_tensors and i % 3 else None for i in range(len(widths))]
    moved = [[t if t is None else t.to(KERNEL_DEVICE) for t in ts] for ts in (ys, a, b, biases, tensors)]
    outs = torch.ops.lorafx.fused_lora(moved[0], x.to(KERNEL_DEVICE), *moved[1:4], scales, moved[4], "triton")
    outs = [out.cpu() for out in outs]
    for out, y, a_i, b_i, bias_i, scale, tensor in zip(outs, ys, a, b, biases, scales, tensors, strict=True):
        delta = x.double() @ a_i.double().T @ b_i.double().T + (0 if bias_i is None else bias_i.double())
        delta *= scale * (1.0 if tensor is None else tensor.item())
        assert (out.double() - y.double() - delta).norm() <= 1e-5 * delta.norm()


def test_double_precision_goes_to_aten():
    case = make_case(dtype=torch.float64, poison="none")
    assert_delta(case, case.run("triton"), bound=1e-6)  # scale and weights are float32, and exact here


def test_more_launches_than_pointers(monkeypatch):
    launches = []
    wrap = sgmv.wrap_triton
    monkeypatch.setattr(sgmv, "wrap_triton", lambda kernel: launches.append(kernel) or wrap(kernel))
    for ranks, expected in ((RANKS["3x8"], 2), (RANKS["five siblings"], 4)):
        launches.clear()
        make_case(ranks).run("triton")
        assert len(launches) == expected


@pytest.mark.parametrize("rows", [1, 4097])
def test_one_row_and_many(rows):
    """4097 rows of one token are cut into tiles, of which the last holds one row."""
    case = make_case((8,), entries=[[(1, 1.0)]], repeats=rows, tokens=(), k=17, widths=(40,))
    assert_delta(case, case.run("triton"))


def test_outputs_are_written_whole(monkeypatch):
    """Memory that the op takes holds NaN before the kernels run."""

    def poisoned(like_or_shape, **kwargs):
        made = torch.empty_like if isinstance(like_or_shape, torch.Tensor) else torch.empty
        return made(like_or_shape, **kwargs).fill_(torch.nan)

    fake_torch = SimpleNamespace(**{**vars(torch), "empty_like": poisoned, "empty": poisoned})
    monkeypatch.setattr(sgmv, "torch", fake_torch)
    for tokens in ((), (5,)):
        case = make_case((8, 0, 3), tokens=tokens, k=600)
        assert_delta(case, case.run("triton"))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    ranks=st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(any),
    widths=st.lists(st.integers(1, 150), min_size=3, max_size=3),
    k=st.integers(1, 300),
    entries=st.lists(
        st.lists(st.tuples(st.sampled_from([0, 1, 3]), st.sampled_from([1.0, -0.5])), max_size=3),
        min_size=1,
        max_size=5,
    ),
    repeats=st.integers(1, 3),
    tokens=st.sampled_from([(), (1,), (2,), (17,), (2, 9)]),
    dtypes=st.sampled_from([(torch.float32, None), (torch.float16, None), (torch.bfloat16, torch.float32)]),
    bias=st.booleans(),
    separate_a=st.booleans(),
)
def test_whatever_comes(ranks, widths, k, entries, repeats, tokens, dtypes, bias, separate_a):
    dtype, adapter_dtype = dtypes
    case = make_case(
        ranks,
        widths=widths[: len(ranks)],
        k=k,
        entries=entries,
        repeats=repeats,
        tokens=tokens,
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        bias=bias,
        separate_a=separate_a,
    )
    assert_delta(case, case.run("triton"), bound=1e-5 if dtype == torch.float32 else 1e-4)
