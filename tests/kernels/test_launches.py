"""What Inductor makes for an NVIDIA GPU of a graph with the fused ops: few launches, nothing copied, no input written.

The layer has Llama-3-8B's real shape, and nothing runs. An input that Inductor takes for written is not only slow: it
copies the bank's tables before each launch, which gave wrong results on a real GPU.
"""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import triton
from torch._higher_order_ops.triton_kernel_wrap import identify_accessed_tensors
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from benchmarks.launches import ALL, MIXED, QKV, compiled, fused
from lorafx.kernels import sgmv
from tests.fake_cuda import CudaCode, count_launches, cuda_code

pytestmark = pytest.mark.skipif(
    sgmv.INTERPRETED, reason="TRITON_INTERPRET=1: the kernels are hidden from Inductor then"
)

BASE = 14  # launches of the layer without adapters
TARGETS = {"q k v": QKV, "all seven": ALL}
MOST = {("q k v", False): 16, ("all seven", False): 22, ("q k v", True): 13, ("all seven", True): 15}  # launches
TABLES = {  # what each kernel takes of the graph's inputs, but for the layers' own weights
    "shrink_kernel": ("weights of the bank", "slots", "windows", "count"),
    "expand_kernel": ("weights of the bank", "slots", "weights", "windows", "scale", "count"),
}
GROUPS = {"q k v": [3], "all seven": [3, 1, 2, 1]}  # q k v; o; gate and up; down
FOLD = pytest.mark.parametrize("fold", [False, True], ids=["apart", "folded"])


@pytest.fixture(autouse=True)
def _not_tried(monkeypatch):
    monkeypatch.setenv("LORAFX_VALIDATE", "0")  # nothing runs here: fake tensors prove nothing


code_for = functools.cache(lambda which, fold, mixed=False: fused(TARGETS[which], MIXED if mixed else None, fold))


@pytest.mark.parametrize(
    ("kind", "work"),
    [
        ("copies", lambda x: x.t().contiguous()),
        ("memsets", lambda x: torch.zeros(x.shape, device=x.device)),
        ("fused", lambda x: x.float()),
        ("gemms", lambda x: x @ x),
        ("host_syncs", lambda x: (x + 1).cpu()),
    ],
)
def test_the_counting_counts(kind: str, work) -> None:
    x = torch.zeros(64, 64, dtype=torch.bfloat16)
    assert len(getattr(count_launches(cuda_code(lambda: torch.compile(work)(x))), kind)) == 1


def test_base_model() -> None:
    """Seven GEMMs, attention, two norms, rotary q and k, silu * up, a sum."""
    launches = count_launches(compiled())
    assert len(launches.gemms) == 7
    assert launches.others == ["aten._scaled_dot_product_flash_attention"]
    assert launches.total == BASE


@FOLD
@pytest.mark.parametrize("which", TARGETS)
def test_launches(which: str, fold: bool) -> None:
    launches = count_launches(code_for(which, fold))
    groups = GROUPS[which]
    assert len(launches.gemms) == (7 - sum(groups) if fold else 7)
    assert launches.user_kernels("shrink_kernel") == len(groups)
    assert launches.user_kernels("expand_kernel") == len(groups)
    assert len(launches.user) == 2 * len(groups)
    assert (launches.copies, launches.memsets, launches.host_syncs) == ([], [], [])
    assert launches.total <= MOST[which, fold]


@FOLD
@pytest.mark.parametrize("which", TARGETS)
def test_no_input_is_written(which: str, fold: bool) -> None:
    code = code_for(which, fold)
    assert code.written_inputs == ()
    assert not re.search(r"\.copy_\(|\.clone\(", code.body)


@FOLD
@pytest.mark.parametrize("which", TARGETS)
def test_tables_are_read_where_they_lie(which: str, fold: bool) -> None:
    """The bank and the routing reach the kernels as the inputs they are."""
    siblings = iter(GROUPS[which])
    for kernel, given in launched(code_for(which, fold)):
        inputs = {name for name in given if name.startswith("arg")}
        weights = next(siblings) if fold and kernel == "shrink_kernel" else 0
        assert len(inputs) == len(TABLES[kernel]) + weights, f"{kernel} takes {sorted(inputs)} of the graph's inputs"


@FOLD
@pytest.mark.parametrize("which", TARGETS)
def test_normalised_input_is_stored_once(which: str, fold: bool) -> None:
    """Read by the GEMMs and by the shrink alike, out of one buffer."""
    kernels = code_for(which, fold).kernels
    norms = [source for name, source in kernels.items() if "rsqrt" in name]
    assert [source.count("tl.store(") for source in norms] == [1, 1]


@FOLD
@pytest.mark.parametrize("which", TARGETS)
def test_a_mixed_batch_has_the_same_code(which: str, fold: bool) -> None:
    mixed, one = code_for(which, fold, mixed=True), code_for(which, fold)
    assert mixed.kernels.keys() == one.kernels.keys()
    # whether, not where: pytest would compare thousands of lines for minutes
    same = mixed.body == one.body and mixed.kernels == one.kernels
    assert same


def launched(code: CudaCode) -> list[tuple[str, list[str]]]:
    """(name, buffers and inputs it is given) of every hand-written kernel, in order."""
    found = re.findall(r"^((?:shrink|expand)_kernel)_\d+\.run\((.*)\)$", code.body, re.MULTILINE)
    return [(name, re.findall(r"\b(?:arg|buf)\d+(?:_1)?\b", arguments)) for name, arguments in found]


# ------------------------------------------------------------------------------------------ Inductor's analysis alone


@pytest.mark.parametrize(("rows", "tokens"), [(8, 1), (1, 64), (3, 5)])
@pytest.mark.parametrize("kind", ["routed", "one adapter", "folded"])
def test_what_the_kernels_write(rows: int, tokens: int, kind: str) -> None:
    """The shrink its scratch, and what layers give; the expand its outputs; Inductor finds this in Triton's code."""
    shrink, expand = written(lambda: call_op(rows, tokens, kind))
    layers = ["y0_ptr", "y1_ptr", "y2_ptr"] if kind == "folded" else []
    assert shrink == ("shrink_kernel", ["s_ptr", *layers])
    assert expand == ("expand_kernel", ["out0_ptr", "out1_ptr", "out2_ptr"])


def call_op(rows: int, tokens: int, kind: str) -> None:
    """Three siblings, four slots."""
    dtype, widths, k, cap = torch.bfloat16, (256, 64, 64), 256, 32
    x = torch.empty(rows, tokens, k, dtype=dtype)
    ys = [torch.empty(rows, tokens, width, dtype=dtype) for width in widths]
    a = [torch.empty(3 * cap, k, dtype=dtype)]
    b = [torch.empty(cap, width, dtype=dtype) for width in widths]
    tables = (
        torch.empty(256, 4, dtype=torch.int32),  # slots
        torch.empty(256, 4),  # weights
        torch.empty((), dtype=torch.int64),  # count
        torch.empty(4, 7)[:, :3],  # scale
        torch.empty(4, 7, 3, dtype=torch.int32)[:, :3],  # windows
    )
    if kind == "one adapter":
        sgmv._sgmv(ys, x, a, b, [cap] * 3, *[None] * 5, [-1] * 3, [1.0] * 3, [], [])
    elif kind == "routed":
        sgmv._sgmv(ys, x, a, b, [cap] * 3, *tables, [], [], [], [])
    else:
        layers = [torch.empty(width, k, dtype=dtype) for width in widths]
        biases = [torch.empty(width, dtype=dtype) for width in widths]
        sgmv._sgmv([], x, a, b, [cap] * 3, *tables, [], [], layers, biases)


def written(call) -> list[tuple[str, list[str]]]:
    """(kernel, arguments that Inductor takes for written) of every launch, none of which happens."""
    found = []

    class Analysed:
        def __init__(self, kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **kwargs) -> None:
                given = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
                accesses = identify_accessed_tensors(self.kernel, given, {})
                names = (dependency.name for dependency in accesses.read_writes.writes)
                found.append((self.kernel.__name__, sorted(names)))

            return launch

    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    with (
        mock.patch.object(sgmv, "wrap_triton", Analysed),
        mock.patch.object(triton.runtime.driver, "_active", driver),
        FakeTensorMode(),
    ):
        call()
    return found
