"""The C++ lowering for CPUs: one op for a whole group, which reads only the rank rows that are in use.

``_sgmv.cpp`` is compiled when it is first needed, with the compiler that Inductor needs as well, against torch's
stable ABI, and kept for later processes in ``$LORAFX_CACHE_DIR`` (``~/.cache/lorafx``). Where that can't be done,
``"auto"`` is the ATen lowering, and a warning says why, once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor

from lorafx.errors import UnsupportedModelError

log = logging.getLogger("lorafx.kernels")

SOURCE = Path(__file__).with_name("_sgmv.cpp")
COMPILERS = ("c++", "g++", "clang++")
# FMA for every product and sum; nothing that would let NaN or the order of a sum be another one
FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
LINK = ("-shared", "-fPIC", "-ltorch_cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TIME_LIMIT = 300  # seconds for the compiler

_building = threading.Lock()
_outcome: str | None = None  # once tried: "" or why it failed


def routed_lora(
    ys: list[Tensor],
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    caps: list[int],
    slots: Tensor,
    weights: Tensor,
    count: Tensor,
    scale: Tensor,
    windows: Tensor,
    layers: list[Tensor],
    biases: list[Tensor | None],
) -> list[Tensor]:
    """See ``ops.py`` for every argument.

    Sums are float32 and rounded once. The bits of a row depend on nothing but the row, its adapters and the layer; with
    ``layers`` that holds for up to 16 tokens, beyond that the layers' own products are ATen's.
    """
    if x.dim() == 1:  # no batch dimension: one row
        ys, x = [y[None] for y in ys], x[None]
        outs = routed_lora(ys, x, a, b, caps, slots, weights, count, scale, windows, layers, biases)
        return [out[0] for out in outs]
    ys, a, b = ([t.contiguous() for t in tensors] for tensors in (ys, a, b))
    return torch.ops.lorafx.routed_cpp(
        ys, layers, biases, x.contiguous(), a, b, caps, slots, weights, count, scale, windows
    )


def takes(x: Tensor, *others: Tensor) -> bool:
    """Whether the op is for these tensors: on a CPU, and none of them in double precision."""
    return all(t.device.type == "cpu" and t.dtype in DTYPES for t in (x, *others))


def is_built() -> bool:
    """Whether the op can be called; the first question compiles it.

    A failure is said in a warning, once, and remembered for the process.
    """
    global _outcome
    with _building:
        if _outcome is None:
            try:
                torch.ops.load_library(str(_library()))
                _outcome = ""
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # no compiler, no home, no room, ...
                _outcome = _reason(error)
                warnings.warn(
                    f"lorafx: the C++ kernel can't be compiled ({_outcome}), so the slower ATen lowering is used. It"
                    " needs a C++20 compiler, such as g++ 11 or newer; the environment variable CXX names one.",
                    stacklevel=2,
                )
    return not _outcome


def check(device: torch.device) -> None:
    """UnsupportedModelError: asked for by name, it can't be had."""
    if device.type not in ("cpu", "meta"):
        raise UnsupportedModelError(f'lowering="cpp" is for CPUs, and the model is on {device}: leave it out')
    if not is_built():
        raise UnsupportedModelError(
            f'lowering="cpp" needs a C++20 compiler: {_outcome}. Install g++ 11 or newer (the environment variable CXX'
            ' names one), or choose lowering="aten".'
        )


def _library() -> Path:
    """The compiled kernel for this source, torch, compiler and processor; made where it is not there yet."""
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=TIME_LIMIT).stdout
    made_of = (SOURCE.read_bytes(), version, torch.__version__, _processor(), " ".join(FLAGS + LINK))
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    library = _folder() / f"sgmv-{key}.so"
    if library.is_file():
        return library
    log.info("compiling %s", SOURCE)
    started = time.perf_counter()
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        paths = (f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}")
        command = [compiler, *FLAGS, *paths, str(SOURCE), "-o", str(made), *LINK]
        subprocess.run(command, capture_output=True, check=True, timeout=TIME_LIMIT)
        made.replace(library)  # whole or not at all, also with other processes at it
    log.info("compiled in %.1f s", time.perf_counter() - started)
    return library


def _compiler() -> str:
    named = os.environ.get("CXX")
    for name in [named] if named else COMPILERS:
        if found := shutil.which(name):
            return found
    raise FileNotFoundError(f"no C++ compiler found: {named or ', '.join(COMPILERS)}")


def _folder() -> Path:
    named = os.environ.get("LORAFX_CACHE_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(named) if named else cache / "lorafx"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _processor() -> str:
    """What ``-march=native`` looks at: a folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))


def _reason(error: Exception) -> str:
    """The compiler's own first complaint, where there is one."""
    said = (getattr(error, "stderr", None) or b"").decode(errors="replace").splitlines()
    return next((line for line in said if "error" in line), str(error))
