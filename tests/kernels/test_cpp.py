"""The C++ lowering against the reference: NaN wherever it must not read, every dtype, layers folded or not, and bits
that depend on nothing but the row."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lorafx.errors import UnsupportedModelError
from lorafx.kernels import cpp
from lorafx.kernels.ops import resolve_lowering
from tests.kernels.cases import BASE, RANKS, SIXTEEN_BITS, Case, assert_delta, fold, make_case, run_folded

BUILT = cpp.is_built()
needs_compiler = pytest.mark.skipif(not BUILT, reason="no C++20 compiler")


def assert_folded(case: Case, layers: list[torch.Tensor], biases: list[torch.Tensor | None]) -> None:
    """Base and adapters together are as near to float64 as one rounding and float32 sums allow."""
    for out, expected in zip(run_folded(case, layers, biases, "cpp"), case.expected(), strict=True):
        assert out.dtype == case.x.dtype
        allowed = torch.finfo(out.dtype).eps / 2 + (1e-5 if len(case.x) * case.x.shape[1] <= 16 else 3e-3)
        if out.dtype == torch.float32:
            allowed = 1e-5
        assert (out.double() - expected).norm() <= allowed * expected.norm()


@needs_compiler
@pytest.mark.parametrize("tokens", [(), (5,), (2, 3), (200,)], ids=["decode", "prefill", "two dimensions", "long"])
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS.keys())
def test_ranks(ranks, tokens):
    case = make_case(ranks, tokens=tokens)
    assert_delta(case, case.run("cpp"))


@needs_compiler
@pytest.mark.parametrize("tokens", [(), (5,), (70,)])
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_dtypes(dtype, adapter_dtype, bias, tokens):
    case = make_case((8, 0, 3), dtype=dtype, adapter_dtype=adapter_dtype, bias=bias, tokens=tokens)
    assert_delta(case, case.run("cpp"))


@needs_compiler
@pytest.mark.parametrize("widths", [(2049, 1, 17), (1, 64, 300), (16, 128, 129)])
@pytest.mark.parametrize("k", [1, 16, 70, 577])
@pytest.mark.parametrize("separate_a", [False, True])
def test_widths(widths, k, separate_a):
    case = make_case(widths=widths, k=k, separate_a=separate_a)
    assert_delta(case, case.run("cpp"))
    assert_folded(*fold(case, biases=True))


ENTRIES = {
    "several pairs": [[(0, 0.7), (1, 0.3)], [(3, -1.5)], BASE, [(0, 0.5), (0, 0.5)]],
    "last slot": [[(3, 1.0)]] * 2,
    "base only": [BASE, BASE],
    "one adapter, rows apart": [[(0, 1.0)], BASE, [(1, 1.0)], [(0, 2.0)], [(0, 1.0)]],
}


@needs_compiler
@pytest.mark.parametrize("tokens", [(), (33,)], ids=["decode", "prefill"])
@pytest.mark.parametrize("entries", ENTRIES.values(), ids=ENTRIES.keys())
@pytest.mark.parametrize("repeats", [1, 4])
def test_routing(entries, tokens, repeats):
    case = make_case(entries=entries, tokens=tokens, repeats=repeats)
    assert_delta(case, case.run("cpp"))


@needs_compiler
@pytest.mark.parametrize("zero", ["weight", "scale"])
def test_what_counts_nothing_is_not_read(zero):
    """An adapter with weight 0 on a row, or with scale 0 at a layer, may hold NaN."""
    case = make_case(entries=[[(0, 1.0)], [(3, 1.0)]], bias=True)
    for tensor in (*case.a, *case.b):
        tensor.fill_(torch.nan)
    getattr(case, f"{zero}s" if zero == "weight" else zero).zero_()
    assert all(map(torch.equal, case.run("cpp"), case.ys))


@needs_compiler
@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (8, 1), (16, 1), (17, 1), (3, 5), (2, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS])
@pytest.mark.parametrize("biases", [False, True])
def test_folded(rows, dtype, biases):
    batch, tokens = rows
    entries = [[(0, 1.0)], BASE, [(1, -0.5), (3, 1.0)]][:batch]
    repeats = -(-batch // len(entries))
    case = make_case(entries=entries, repeats=repeats, tokens=(tokens,), dtype=dtype, adapter_dtype=torch.float32)
    assert_folded(*fold(case, biases))


@needs_compiler
def test_folded_base_rows_are_those_of_an_idle_call():
    case, layers, none = fold(make_case(tokens=(1,)), biases=False)
    idle = run_folded(replace(case, slots=torch.full_like(case.slots, -1)), layers, none, "cpp")
    for out, base in zip(run_folded(case, layers, none, "cpp"), idle, strict=True):
        assert torch.equal(out[1], base[1])
        assert not torch.equal(out[2], base[2])


@needs_compiler
@pytest.mark.parametrize("folded", [False, True])
def test_bits_of_a_row_depend_on_the_row_alone(folded):
    """Neither on what the others hold, nor on how many there are, nor on the threads."""
    case = make_case(
        (33, 7, 64), widths=(300, 64, 129), k=577, entries=[[(0, 1.0)], BASE, [(1, 1.0), (3, 0.5)]], tokens=()
    )
    folded_case, layers, biases = fold(case, biases=True)
    case = replace(folded_case, ys=case.ys)

    def run(case):
        return run_folded(case, layers, biases, "cpp") if folded else case.run("cpp")

    whole = run(case)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, whole, run(case)))
    finally:
        torch.set_num_threads(threads)
    for row in range(3):
        x = torch.full_like(case.x, torch.nan)
        x[row] = case.x[row]
        entry = slice(row, row + 1)
        alone = replace(
            case,
            x=case.x[entry],
            ys=[y[entry] for y in case.ys],
            slots=case.slots[entry],
            weights=case.weights[entry],
            count=torch.tensor(1),
        )
        for out, nan, single in zip(whole, run(replace(case, x=x)), run(alone), strict=True):
            assert torch.equal(out[row], nan[row])
            assert torch.equal(out[row], single[0])


@needs_compiler
def test_empty_batch():
    case = make_case(tokens=(0,))
    assert [tuple(out.shape) for out in case.run("cpp")] == [tuple(y.shape) for y in case.ys]


@needs_compiler
def test_refuses_what_it_can_not_read():
    case = make_case()
    arguments = (case.caps, case.slots, case.weights, case.count, case.scale, case.windows)
    with pytest.raises(RuntimeError, match="contiguous"):
        torch.ops.lorafx.routed_cpp(case.ys, [], [], case.x.mT, case.a, case.b, *arguments)
    with pytest.raises(RuntimeError, match="of one dtype"):
        torch.ops.lorafx.routed_cpp(case.ys, [], [], case.x, case.a, [b.bfloat16() for b in case.b], *arguments)
    ys, a, b = ([t.double() for t in tensors] for tensors in (case.ys, case.a, case.b))
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        torch.ops.lorafx.routed_cpp(ys, [], [], case.x.double(), a, b, *arguments)


@needs_compiler
def test_double_precision_goes_to_aten():
    case = make_case(dtype=torch.float64, poison="free_a")
    assert resolve_lowering("auto", case.x) == resolve_lowering("cpp", case.x) == "aten"
    assert_delta(case, case.run("cpp"), 1e-12)


@needs_compiler
def test_gradients_go_to_aten():
    case = make_case(poison="none", tokens=(2,))
    case, layers, none = fold(case, biases=False)
    x = case.x.clone().requires_grad_()
    sum(out.sum() for out in run_folded(replace(case, x=x), layers, none, "cpp")).backward()
    other = case.x.double().requires_grad_()
    sum(
        out.sum() for out in replace(case, x=other, ys=[F.linear(other, w.double()) for w in layers]).run("aten")
    ).backward()
    torch.testing.assert_close(x.grad.double(), other.grad, rtol=1e-4, atol=1e-4)


class TestBuilding:
    """Without a compiler there is the ATen lowering, and a warning that says so."""

    @pytest.fixture(autouse=True)
    def _fresh(self, monkeypatch, tmp_path):
        monkeypatch.setattr(cpp, "_outcome", None)
        monkeypatch.setenv("LORAFX_CACHE_DIR", str(tmp_path))

    def test_no_compiler(self, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.warns(UserWarning, match="no-such-compiler.*ATen.*g\\+\\+ 11"):
            assert resolve_lowering("auto", torch.zeros(1)) == "aten"
        assert resolve_lowering("auto", torch.zeros(1)) == "aten"
        with pytest.raises(UnsupportedModelError, match="no-such-compiler"):
            resolve_lowering("cpp", torch.zeros(1))

    @pytest.mark.skipif(shutil.which("false") is None, reason="no such program")
    def test_a_compiler_that_fails(self, monkeypatch):
        monkeypatch.setenv("CXX", "false")
        with pytest.warns(UserWarning, match="can't be compiled"):
            assert not cpp.is_built()

    @needs_compiler
    def test_source_that_does_not_compile(self, monkeypatch, tmp_path):
        broken = tmp_path / "broken.cpp"
        broken.write_text("int main() { return nothing_of_that_name; }\n")
        monkeypatch.setattr(cpp, "SOURCE", broken)
        with pytest.warns(UserWarning, match="error: .nothing_of_that_name"):
            assert not cpp.is_built()
        assert not list(tmp_path.glob("*.so"))
        assert not list(tmp_path.glob("tmp*"))

    @needs_compiler
    def test_compiled_once_for_all_processes(self, monkeypatch, tmp_path, caplog):
        simple = tmp_path / "simple.cpp"
        simple.write_text("// nothing to register\n")
        monkeypatch.setattr(cpp, "SOURCE", simple)
        with caplog.at_level(logging.INFO, "lorafx.kernels"):
            first = cpp._library()
            assert cpp._library() == first
            assert sum("compiling" in message for message in caplog.messages) == 1
            simple.write_text("// another one\n")
            assert cpp._library() != first


@needs_compiler
def test_other_devices_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"for CPUs.*cuda"):
        cpp.check(torch.device("cuda"))
