"""The kernels compile for NVIDIA GPUs, with the very arguments that the launcher passes; this needs no GPU.

The interpreter accepts what the compiler refuses (a dot of the wrong dtype, say), so its tests are not enough.
"""

from __future__ import annotations

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lorafx.errors import UnsupportedModelError
from lorafx.kernels import sgmv
from tests.kernels.cases import make_case

pytestmark = pytest.mark.skipif(sgmv.INTERPRETED, reason="TRITON_INTERPRET=1: there is no compiler then")

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory that one program may have
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages")


class Launches(list):
    """Stands in for ``wrap_triton``: records (kernel, named arguments, options) where a GPU would run."""

    def __call__(self, kernel):
        return _Launch(self, kernel)


class _Launch:
    def __init__(self, launches, kernel):
        self.launches, self.kernel = launches, kernel

    def __getitem__(self, grid):
        assert len(grid) == 3
        assert all(size > 0 for size in grid)

        def launch(*args, **kwargs):
            options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
            named = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            assert set(named) == set(self.kernel.arg_names)
            self.launches.append((self.kernel, named, options))

        return launch


def launches_of(monkeypatch, call) -> Launches:
    """What a call of the op launches, from tensors without storage, which count as NVIDIA's."""
    launches, precision = Launches(), sgmv.dot_precision
    monkeypatch.setattr(sgmv, "wrap_triton", launches)
    monkeypatch.setattr(sgmv, "dot_precision", lambda device, *dtypes: precision(torch.device("cuda"), *dtypes))
    call()
    return launches


def compile_for(arch: int, kernel, named: dict, options: dict):
    constants = {p.name for p in kernel.params if p.is_constexpr}
    signature, values, attrs = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = named[name]
        if name in constants or value is None:
            signature[name], values[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attrs[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    return triton.compile(ASTSource(kernel, signature, values, attrs), GPUTarget("cuda", arch, 32), options)


def meta(value):
    if isinstance(value, list):
        return [meta(v) for v in value]
    return value.to("meta") if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(
    ("arch", "dtype", "adapter_dtype", "rows", "tokens"),
    [
        (90, torch.bfloat16, torch.bfloat16, 1, ()),
        (90, torch.bfloat16, torch.bfloat16, 1, (512,)),
        (80, torch.bfloat16, torch.float32, 1, (512,)),
        (80, torch.float16, torch.float16, 3, (5,)),
        (80, torch.float32, torch.float32, 1, (512,)),
        (90, torch.float32, torch.float32, 8, ()),
    ],
)
def test_routed(monkeypatch, arch, dtype, adapter_dtype, rows, tokens):
    case = make_case((16, 16, 64), widths=(1024, 256, 256), k=1024, tokens=tokens, repeats=rows, dtype=dtype,
                     adapter_dtype=adapter_dtype)  # fmt: skip
    args = [meta(v) for v in case.args()]
    del args[8]  # owner, which the kernels do without
    launches = launches_of(monkeypatch, lambda: sgmv._sgmv(*args, [], []))
    assert [kernel.__name__ for kernel, *_ in launches] == ["shrink_kernel", "expand_kernel"]
    for launch in launches:
        binary = compile_for(arch, *launch)
        assert 0 < binary.metadata.shared <= SHARED[arch]


def test_without_routing(monkeypatch):
    x = torch.empty(1, 1, 512, dtype=torch.bfloat16, device="meta")
    ys = [torch.empty(1, 1, n, dtype=torch.bfloat16, device="meta") for n in (512, 256)]
    a = [torch.empty(r, 512, dtype=torch.bfloat16, device="meta") for r in (8, 16)]
    b = [torch.empty(r + 1, n, dtype=torch.bfloat16, device="meta") for r, n in ((8, 512), (16, 256))]
    args = (ys, x, a, b, [8, 16], None, None, None, torch.empty(2, device="meta"), None, [8, -1], [1.0, 0.5])
    for launch in launches_of(monkeypatch, lambda: sgmv._sgmv(*args)):
        assert 0 < compile_for(80, *launch).metadata.shared <= SHARED[80]


def test_cpu_tensors_need_the_interpreter():
    with pytest.raises(UnsupportedModelError, match="TRITON_INTERPRET=1"):
        make_case().run("triton")
    with pytest.raises(UnsupportedModelError, match=r'lowering="aten"'):
        make_case().run("triton")
