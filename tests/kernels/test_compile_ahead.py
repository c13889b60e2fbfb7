"""The kernels compile for GPUs, with the very arguments that the launcher passes, and fit them; this needs no GPU.

The interpreter accepts what the compiler refuses (a dot of the wrong dtype, say), so its tests are not enough.
"""

from __future__ import annotations

import pytest
import torch

from lorafx.errors import UnsupportedModelError
from lorafx.kernels import sgmv
from tests.kernels.ahead import RESERVED, SHARED, TARGETS, VARIANTS, launches_of, resources_of
from tests.kernels.cases import make_case

pytestmark = pytest.mark.skipif(sgmv.INTERPRETED, reason="TRITON_INTERPRET=1: there is no compiler then")

# Programs that a multiprocessor must hold at once, by their registers, shared memory and threads: with one alone it
# would idle whenever that one waits for its loads. At 4 warps this is 256 registers, all that a thread can have, and
# 81 KiB of shared memory on sm_80 (113 KiB on sm_90); at 8 warps it is 128 registers.
PROGRAMS = 2
# What falls short of that: on gfx942, whose 64 KiB of shared memory a prefill's four stages fill, one program.
ONE_PROGRAM = {("gfx942", "shrink_kernel")}


def meta(value):
    if isinstance(value, list):
        return [meta(v) for v in value]
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def assert_fits(target, launch):
    limit = SHARED[target] - RESERVED[TARGETS[target].backend]  # more than this does not start at all
    assert 0 < launch.compile(target).metadata.shared <= limit


@pytest.mark.parametrize(
    ("target", "dtype", "adapter_dtype", "rows", "tokens"),
    [
        ("sm_90", torch.bfloat16, torch.bfloat16, 1, ()),
        ("sm_90", torch.bfloat16, torch.bfloat16, 1, (512,)),
        ("sm_80", torch.bfloat16, torch.float32, 1, (512,)),
        ("sm_80", torch.float16, torch.float16, 3, (5,)),
        ("sm_80", torch.float32, torch.float32, 1, (512,)),
        ("sm_90", torch.float32, torch.float32, 8, ()),
    ],
)
def test_routed(target, dtype, adapter_dtype, rows, tokens):
    case = make_case((16, 16, 64), widths=(1024, 256, 256), k=1024, tokens=tokens, repeats=rows, dtype=dtype,
                     adapter_dtype=adapter_dtype)  # fmt: skip
    args = [meta(v) for v in case.args()]
    del args[8]  # owner, which the kernels do without
    launches = launches_of(lambda: sgmv._sgmv(*args, [], [], [], []), target)
    assert [launch.kernel.__name__ for launch in launches] == ["shrink_kernel", "expand_kernel"]
    for launch in launches:
        assert_fits(target, launch)


def test_without_routing():
    x = torch.empty(1, 1, 512, dtype=torch.bfloat16, device="meta")
    ys = [torch.empty(1, 1, n, dtype=torch.bfloat16, device="meta") for n in (512, 256)]
    a = [torch.empty(r, 512, dtype=torch.bfloat16, device="meta") for r in (8, 16)]
    b = [torch.empty(r + 1, n, dtype=torch.bfloat16, device="meta") for r, n in ((8, 512), (16, 256))]
    args = (ys, x, a, b, [8, 16], None, None, None, torch.empty(2, device="meta"), None, [8, -1], [1.0, 0.5], [], [])
    for launch in launches_of(lambda: sgmv._sgmv(*args), "sm_80"):
        assert_fits("sm_80", launch)


@pytest.mark.parametrize(
    ("target", "variant"),
    [pytest.param(target, variant, id=f"{target}: {variant}") for target in TARGETS for variant in VARIANTS],
)
def test_resources(target, variant):
    """Nothing spills, several programs fit on a multiprocessor, NVIDIA's loads are wide, 16-bit prefills use matrix
    units, those in bfloat16 not as TF32, which takes three products and more."""
    for launch in launches_of(variant.call, target):
        found = resources_of(target, launch.compile(target))
        name = launch.kernel.__name__
        assert found.spilled == 0, f"{name} spills: {found}"
        least = 1 if (target, name) in ONE_PROGRAM else PROGRAMS
        assert found.programs >= least, f"{name} is too large: {found}"
        if target.startswith("sm_"):
            assert found.wide_loads, f"{name} has no 128-bit loads: {found}"
        if variant.wants_matrix_instructions and (variant.tokens > 1 or name == "shrink_kernel"):
            assert found.matrix, f"{name} has no matrix instructions: {found}"
            if variant.dtype == torch.bfloat16 and target.startswith("sm_"):
                assert not any("TF32" in kind for kind in found.matrix), f"{name}: {found}"


def test_cpu_tensors_need_the_interpreter():
    with pytest.raises(UnsupportedModelError, match="TRITON_INTERPRET=1"):
        make_case().run("triton")
    with pytest.raises(UnsupportedModelError, match=r'lowering="aten"'):
        make_case().run("triton")


def test_more_rows_than_a_grid_has_columns():
    """Of a grid's axes only the first takes more than 65,535."""
    case = make_case((4,), widths=(32,), k=32, tokens=(2,), poison="none")
    args = [meta(v) for v in case.args()]
    del args[8]
    args[0] = [torch.empty(70_000, 2, 32, device="meta")]
    args[1] = torch.empty(70_000, 2, 32, device="meta")
    for launch in launches_of(lambda: sgmv._sgmv(*args, [], [], [], []), "sm_90"):
        assert launch.grid[0] >= 70_000
        assert all(size <= 65_535 for size in launch.grid[1:])
