"""What the Triton kernels compile to for GPUs that this machine need not have: launches are recorded, then compiled.

The recorded arguments are those of ``kernels/sgmv.py``, on meta tensors, and they go the way of a real launch, so that
what Triton specialises (a size that is 1 or a multiple of 16, an aligned pointer) is specialised here too.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from lorafx.kernels import sgmv
from lorafx.routing import MAX_PAIRS, MAX_ROWS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
REGISTERS = {"cuda": 64 * 1024, "hip": 128 * 1024}  # 32-bit, of a multiprocessor; the same on all these GPUs
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024, "gfx942": 64 * 1024}  # bytes of it
RESERVED = {"cuda": 1024, "hip": 0}  # bytes of it that go to each program unasked
THREADS = 2048

MATRIX = re.compile(r"\b(?:HMMA|HGMMA|UTC[A-Z]*MMA|v_mfma_)[\w.]*")
LOAD = re.compile(r"\b(LDG|LDGSTS|global_load|buffer_load)([._]\w[\w.]*)")
WIDE = re.compile(r"\.128\b|dwordx4$")

LAYERS = {  # of Llama-3-8B: width of x, widths of the outputs
    "qkv": (4096, (4096, 1024, 1024)),
    "gate/up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
SLOTS, SITES = 4, 224  # adapters in the bank; seven linear layers in each of 32


@dataclass(frozen=True)
class Variant:
    """One call of the op. ``routed=False``: one adapter for every row, as it stands in a graph; ``folded``: with the
    siblings' own layers."""

    rows: int
    tokens: int  # of each row
    layer: str
    rank: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    routed: bool = True
    folded: bool = False

    def __str__(self) -> str:
        what = f"decode {self.rows}" if self.tokens == 1 else f"prefill {self.rows}x{self.tokens}"
        x, a = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.adapter_dtype))
        kind = ", folded" if self.folded else "" if self.routed else ", no routing"
        return f"{what}, {self.layer}, r{self.rank}, {x} x {a}{kind}"

    @property
    def wants_matrix_instructions(self) -> bool:
        """Tokens enough for a tile, and operands that every one of these GPUs multiplies as matrices."""
        many = self.tokens > 1 or (self.folded and self.rows > 1)
        return many and self.dtype.itemsize == self.adapter_dtype.itemsize == 2

    def call(self) -> list[Tensor]:
        """``sgmv._sgmv`` on tensors without storage."""
        with torch.device("meta"):
            k, widths = LAYERS[self.layer]
            cap = self.rank * (SLOTS if self.routed else 1)
            x = torch.empty(self.rows, self.tokens, k, dtype=self.dtype)
            ys = [torch.empty(self.rows, self.tokens, n, dtype=self.dtype) for n in widths]
            a = [torch.empty(cap * len(widths), k, dtype=self.adapter_dtype)]
            b = [torch.empty(cap, n, dtype=self.adapter_dtype) for n in widths]
            caps = [cap] * len(widths)
            if not self.routed:
                rest = ([-1] * len(b), [1.0] * len(b), [], [])
                return sgmv._sgmv(ys, x, a, b, caps, None, None, None, None, None, *rest)
            slots = torch.empty(MAX_ROWS, MAX_PAIRS, dtype=torch.int32)
            weights = torch.empty(MAX_ROWS, MAX_PAIRS)
            count = torch.empty((), dtype=torch.int64)
            scale = torch.empty(SLOTS, SITES)[:, : len(b)]
            windows = torch.empty(SLOTS, SITES, 3, dtype=torch.int32)[:, : len(b)]
            layers = [torch.empty(n, k, dtype=self.dtype) for n in widths] if self.folded else []
            ys, none = ([], [None] * len(widths)) if self.folded else (ys, [])
            return sgmv._sgmv(ys, x, a, b, caps, slots, weights, count, scale, windows, [], [], layers, none)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
VARIANTS = [
    Variant(1, 1, "qkv", 16, BF16, BF16),
    Variant(1, 1, "down", 64, BF16, BF16),
    Variant(64, 1, "qkv", 16, BF16, BF16),
    Variant(64, 1, "gate/up", 64, BF16, FP32),
    Variant(64, 1, "qkv", 16, FP32, FP32),
    Variant(1, 512, "qkv", 16, BF16, BF16),
    Variant(1, 512, "qkv", 16, BF16, BF16, routed=False),
    Variant(1, 512, "down", 64, FP16, FP16),
    Variant(8, 512, "qkv", 16, BF16, BF16),
    Variant(8, 512, "gate/up", 64, BF16, BF16),
    Variant(8, 512, "qkv", 64, BF16, FP32),
    Variant(8, 512, "qkv", 16, FP32, FP32),
    Variant(1, 1, "qkv", 16, BF16, BF16, folded=True),
    Variant(1, 1, "down", 16, BF16, FP32, folded=True),
    Variant(8, 1, "qkv", 16, BF16, BF16, folded=True),
    Variant(8, 1, "down", 64, FP16, FP16, folded=True),
    Variant(64, 1, "qkv", 16, BF16, BF16, folded=True),
    Variant(64, 1, "gate/up", 64, BF16, FP32, folded=True),
    Variant(1, 32, "qkv", 16, BF16, BF16, folded=True),
]


@dataclass(frozen=True)
class Launch:
    """``kernel[grid](*args, **kwargs)``, not run."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    args: tuple
    kwargs: dict

    def compile(self, target: str) -> triton.compiler.CompiledKernel:
        """What Triton's launcher would make of it; it asks only its driver which GPU there is."""
        driver = SimpleNamespace(
            get_current_device=lambda: target,  # a key of Triton's cache
            get_current_stream=lambda device: None,
            get_current_target=lambda: TARGETS[target],
        )
        with mock.patch.object(triton.runtime.driver, "_active", driver):
            return self.kernel.warmup(*self.args, grid=self.grid, **self.kwargs)


def launches_of(call, target: str) -> list[Launch]:
    """What a call of the op launches, its meta tensors counting as the target's."""
    launches, precision = [], sgmv.dot_precision

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            assert 1 <= len(grid) <= 3
            assert all(size > 0 for size in grid)
            return lambda *args, **kwargs: launches.append(Launch(self.kernel, grid, args, kwargs))

    def on_target(device, *dtypes):
        return precision(torch.device("cuda") if TARGETS[target].backend == "cuda" else device, *dtypes)

    shared = SHARED[target] - RESERVED[TARGETS[target].backend]
    capability = int(target.removeprefix("sm_")) if target.startswith("sm_") else 0
    told = {"shared_memory": lambda device: shared, "capability": lambda device: capability}
    with mock.patch.multiple(sgmv, wrap_triton=Recorder, dot_precision=on_target, **told):
        call()
    return launches


@dataclass(frozen=True)
class Resources:
    """Facts about one compiled kernel. ``spilled``: bytes of a thread's memory that are not registers."""

    target: str
    warps: int
    registers: int  # of a thread; gfx942: vector registers, accumulators included
    spilled: int
    shared: int  # bytes of a program
    matrix: Counter  # matrix instructions in the code, by name
    loads: int  # from global memory, in the code
    wide_loads: Counter  # those of 128 bits, by name

    @property
    def programs(self) -> int:
        """How many fit on one multiprocessor at once. Registers are handed out to warps, by eights for each thread."""
        gpu = TARGETS[self.target]
        threads = self.warps * gpu.warp_size
        return min(
            THREADS // threads,
            REGISTERS[gpu.backend] // (-(-self.registers // 8) * 8 * threads),
            SHARED[self.target] // max(1, self.shared + RESERVED[gpu.backend]),
        )


def resources_of(target: str, binary: triton.compiler.CompiledKernel) -> Resources:
    """Read from the machine code: of all this ``binary.metadata`` holds warps and shared memory alone."""
    meta = binary.metadata
    if meta.target.backend == "hip":
        code = binary.asm["amdgcn"]
        field = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", code))
        registers, spilled = int(field["vgpr_count"]), int(field["private_segment_fixed_size"])
    else:
        usage, code = (_cuobjdump(binary.asm["cubin"], flag) for flag in ("--dump-resource-usage", "--dump-sass"))
        field = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
        registers, spilled = int(field["REG"]), int(field["STACK"]) + int(field["LOCAL"])
    loads = LOAD.findall(code)
    return Resources(
        target=target,
        warps=meta.num_warps,
        registers=registers,
        spilled=spilled,
        shared=meta.shared,
        matrix=Counter(MATRIX.findall(code)),
        loads=len(loads),
        wide_loads=Counter(name for name, suffix in loads if WIDE.search(suffix)),
    )


def _cuobjdump(cubin: bytes, flag: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
