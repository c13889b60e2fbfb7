"""What Inductor emits for an NVIDIA GPU, shown on a machine that has none, for the graphs that a CPU model compiles.

    code = cuda_code(lambda: model(x))      # model: from torch.compile or lorafx.compile
    count_launches(code).total

The graph is the one that ``compile_fx`` was given, with its inputs put on a GPU that isn't there. Tensors are fake from
there on: nothing runs, nothing is timed, and weights may be ``torch.empty``.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor, fx
from torch._dynamo import device_interface
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import compile_fx, config
from torch._inductor import utils as inductor_utils
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _triton as torch_triton
from triton.backends.compiler import GPUTarget

GPU = torch.device("cuda", 0)
GPUS = {80: ("NVIDIA A100", 108, 164), 90: ("NVIDIA H100", 132, 228)}  # name, SMs, KiB of shared memory on each


@dataclass(frozen=True)
class CudaCode:
    """source: Inductor's Python wrapper with its kernels; written_inputs: inputs that the graph writes back to."""

    source: str
    written_inputs: tuple[str, ...]

    @property
    def body(self) -> str:
        """The statements of the wrapper's call, without comments."""
        lines = self.source.split("async_compile.wait(globals())")[1].split("\ndef get_args")[0].splitlines()
        return "\n".join(line.strip() for line in lines if not line.lstrip().startswith("#"))

    @property
    def kernels(self) -> dict[str, str]:
        """Source of every Triton kernel, by the name that the wrapper calls it."""
        found = re.findall(r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)'''", self.source, re.DOTALL | re.MULTILINE)
        return dict(found)


class _Stop(Exception):
    """There is nothing more to learn from this compilation."""


def cuda_code(run: Callable[[], object], arch: int = 90) -> CudaCode:
    """The code for the one graph that ``run`` compiles, for a GPU of compute capability ``arch``, in inference."""
    gm, inputs, patches = _captured(run)
    _onto_gpu(gm)
    fake = FakeTensorMode()
    with fake:
        inputs = [_like_on_gpu(value) if isinstance(value, Tensor) else value for value in inputs]
    codes: list[CudaCode] = []
    tracing = torch._guards.tracing(torch._guards.TracingContext(fake))
    with _pretended_gpu(arch, codes), fake, tracing, torch.no_grad():
        try:
            compile_fx.compile_fx(gm, inputs, config_patches=patches)
        except InductorError:
            if not codes:
                raise
    (code,) = codes
    return code


def _captured(run: Callable[[], object]) -> tuple[fx.GraphModule, Sequence[Any], dict[str, Any] | None]:
    """What ``run`` asks Inductor to compile: the graph, its inputs, Inductor's settings."""
    found = []

    def keep(gm: fx.GraphModule, inputs: Sequence[Any], config_patches: dict[str, Any] | None = None, **_: Any) -> None:
        found.append((gm, inputs, config_patches))
        raise _Stop

    torch._dynamo.reset()
    with mock.patch.object(compile_fx, "compile_fx", keep), torch.no_grad():
        try:
            run()
        except BackendCompilerFailed:
            if not found:
                raise
    assert found, "nothing was compiled"
    return found[0]


def _like_on_gpu(tensor: Tensor) -> Tensor:
    """Its offset too: Inductor takes inputs that begin at a multiple of 16 bytes for aligned, others not."""
    shape, strides, offset = tensor.shape, tensor.stride(), tensor.storage_offset()
    if offset == 0:
        return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=GPU)
    reach = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return torch.empty(reach, dtype=tensor.dtype, device=GPU).as_strided(shape, strides, offset)


def _onto_gpu(gm: fx.GraphModule) -> None:
    """Devices that were written into the graph, and the choice of an attention kernel, which depends on the device."""

    def moved(value: Any) -> Any:
        return GPU if isinstance(value, torch.device) else value

    for node in gm.graph.nodes:
        node.args, node.kwargs = (fx.node.map_aggregate(given, moved) for given in (node.args, node.kwargs))
        node.meta.pop("example_value", None)  # a fake tensor of the CPU's
        if node.target is torch.nn.functional.scaled_dot_product_attention:
            node.target = _gpu_attention
    gm.recompile()


def _gpu_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The kernel that a GPU picks for 16 bits without a mask. A CPU build has no such choice to ask."""
    assert attn_mask is None, "a mask takes another kernel"
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    return flash(q, k, v, dropout_p, is_causal, scale=scale)[0]


# ------------------------------------------------------------------------------------------ a GPU that isn't there


@contextmanager
def _pretended_gpu(arch: int, codes: list[CudaCode]) -> Iterator[None]:
    """Inductor sees one GPU. What it would load for it is put into ``codes``, and ``_Stop`` raised."""
    name, sms, shared = GPUS[arch]
    properties = SimpleNamespace(
        name=name,
        major=arch // 10,
        minor=arch % 10,
        multi_processor_count=sms,
        warp_size=32,
        gcnArchName="",
        regs_per_multiprocessor=1 << 16,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        total_memory=80 << 30,
        L2_cache_size=50 << 20,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=(shared - 1) << 10,
        shared_memory_per_multiprocessor=shared << 10,
    )

    def keep(graph: GraphLowering) -> None:
        source = graph.codegen()[0].value
        codes.append(CudaCode(source, tuple(graph.mutated_inputs)))
        raise _Stop

    replaced = [
        (torch.cuda, "is_available", lambda: True),  # has_triton
        (torch.cuda, "device_count", lambda: 1),  # of the properties that workers are given
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_properties", lambda device=None: properties),
        (torch.cuda, "_exchange_device", lambda device: 0),  # torch.cuda.device(0), around passes
        (torch.cuda, "_maybe_exchange_device", lambda device: 0),
        (device_interface.CudaInterface, "get_device_properties", staticmethod(lambda device=None: properties)),
        (triton.runtime.driver, "_active", SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", arch, 32))),
        (FakeTensorMode, "avoid_device_init", True),  # patterns call torch.tensor(device=GPU)
        (torch.cuda, "get_rng_state", lambda: torch.zeros(16, dtype=torch.uint8)),  # kept while a graph is traced
        (torch.cuda, "set_rng_state", lambda state: None),
        (GraphLowering, "compile_to_module", keep),
    ]
    settings = {
        "fx_graph_cache": False,  # a hit would generate nothing
        "compile_threads": 1,  # no processes that compile ahead
        "joint_graph_constant_folding": False,  # it runs constructors of the graph, on the device
        "shape_padding": False,  # decided by a benchmark
    }
    with ExitStack() as stack:
        for owner, attribute, value in replaced:
            stack.enter_context(mock.patch.object(owner, attribute, value))
        stack.enter_context(config.patch(settings))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        stack.enter_context(_idle_guard())
        stack.callback(_forget_devices)
        _forget_devices()
        yield


def _forget_devices() -> None:
    """Inductor remembers whether there is a GPU, and which; neither world may see the answers of the other."""
    device_interface.caching_worker_device_properties.pop("cuda", None)
    for holder in (torch_triton, inductor_utils, DeviceProperties):
        for function in list(vars(holder).values()):
            function = getattr(function, "__func__", function)
            if hasattr(function, "cache_clear"):
                function.cache_clear()


@contextmanager
def _idle_guard() -> Iterator[None]:
    """Indexing in Python asks C++ for a guard of the tensor's device, and a CPU build has none for CUDA. The meta
    device's serves: it does nothing."""
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    cuda, meta = 1, 14  # of c10::DeviceType
    guards = (ctypes.c_void_p * (meta + 1)).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    before, guards[cuda] = guards[cuda], guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before


# ------------------------------------------------------------------------------------------ counting


@dataclass
class Launches:
    """What one call of the code sends to the GPU, by kind; names are those in the code."""

    gemms: list[str] = field(default_factory=list)  # cuBLAS
    user: list[str] = field(default_factory=list)  # Triton kernels that were written by hand
    fused: list[str] = field(default_factory=list)  # Triton kernels that Inductor made
    copies: list[str] = field(default_factory=list)  # those of them, and calls, that only move data
    memsets: list[str] = field(default_factory=list)  # and those that only fill it
    others: list[str] = field(default_factory=list)  # ATen's kernels, such as attention
    host_syncs: list[str] = field(default_factory=list)  # statements for which the host waits; no launches
    allocations: int = 0

    @property
    def total(self) -> int:
        kinds = (self.gemms, self.user, self.fused, self.copies, self.memsets, self.others)
        return sum(map(len, kinds))

    def user_kernels(self, name: str) -> int:
        """Launches of the kernel with this name; Inductor appends a number."""
        return sum(re.sub(r"_\d+$", "", called) == name for called in self.user)


SYNC = re.compile(r"\.item\(|\.cpu\(|\.tolist\(|_local_scalar_dense|synchronize\(|empty_strided_cpu\(")
MOVES = re.compile(r"\.(copy_|clone|contiguous)\(|\baten\.(copy_|clone)\b")
FILLS = re.compile(r"\.(zero_|fill_)\(|\baten\.(zero_|fill_|full|zeros)\b")
# what a kernel may do to a value and yet only move it; a cast and a comparison of indices say where from
SELECTS = re.compile(r"tl\.(load|full|where)\(|tmp\d+\.to\(|\([^.]+\)\.to\(tl\.int\d+\)|tmp\d+ [<>=!&|]+ tmp\d+$")


def count_launches(code: CudaCode) -> Launches:
    """The launches in the wrapper's call, one statement a line."""
    kernels, launches = code.kernels, Launches()
    for line in code.body.splitlines():
        if line.startswith("assert_"):  # names the op that made what it checks
            continue
        launches.allocations += line.count("empty_strided_cuda(")
        if SYNC.search(line):
            launches.host_syncs.append(line)
        elif match := re.search(r"\b(\w+)\.run\(", line):
            _kind_of(launches, kernels[match[1]]).append(match[1])
        elif match := re.search(r"\bextern_kernels\.(\w+)\(", line):
            launches.gemms.append(match[1])
        elif MOVES.search(line):
            launches.copies.append(line)
        elif FILLS.search(line):
            launches.memsets.append(line)
        elif match := re.search(r"\btorch\.ops\.(\w+\.\w+)\.", line):
            launches.others.append(match[1])
    return launches


def _kind_of(launches: Launches, kernel: str) -> list[str]:
    """The list that a Triton kernel belongs to, by what its source computes."""
    if "@triton_heuristics.user_autotune" in kernel:
        return launches.user
    values = re.findall(r"^ +_?tmp\d+ = (.*)$", kernel, re.MULTILINE)
    if all(value.startswith("tl.full(") for value in values):
        return launches.memsets
    read, written = (set(re.findall(rf"'{ptr}\d+': '\*(\w+)'", kernel)) for ptr in ("in(?:_out)?_ptr", "out_ptr"))
    # another dtype written than read is a conversion, which is work
    moves = written <= read and all(SELECTS.match(value) for value in values)
    return launches.copies if moves else launches.fused


__all__ = ["CudaCode", "Launches", "count_launches", "cuda_code"]
