"""The Triton lowering: two launches for a whole group, whatever the ranks and the adapters of the batch.

    shrink    S[token, lane] = x[token] @ A[lane]                          lanes of the windows in use, no others
              y = x @ W.T + bias                                           where the siblings' own layers are folded
    expand    out = y + sum over pairs of weight * scale * (S @ B + bias)  every sibling, every column

S is float32 and lives in ``torch.empty``: a lane that the shrink did not write is not read by the expand, because both
take the same windows. It has one lane for each rank row of the bank, so a row of the batch may use several adapters.
Sums are float32 and their order is fixed (no atomics): same inputs, same bits.

Under ``torch.compile`` on a GPU the op is a ``triton_op``, whose kernels Inductor sees. Triton's interpreter
(``TRITON_INTERPRET=1``, CPU tensors) does not survive that, so there it is an opaque ``custom_op``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from lorafx.errors import UnsupportedModelError
from lorafx.kernels import cost
from lorafx.kernels._expand import expand_kernel
from lorafx.kernels._shrink import shrink_kernel
from lorafx.kernels.schedule import LayerSchedule, layer_schedule, power_of_two, schedule

MAX_SIBLINGS = 4  # pointers of one launch; larger groups take further launches
INTERPRETED = triton.knobs.runtime.interpret  # triton reads it when it decorates a kernel, so at import
GPUS = ("cuda", "xpu")


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
    layers: Sequence[Tensor] = (),
    layer_biases: Sequence[Tensor | None] = (),
) -> list[Tensor]:
    """See ``ops.py`` for every argument. Returns what is to replace ``ys``, same shapes and dtypes.

    float64 is not for these kernels, whose sums are float32: ``ops.py`` sends it to ATen.
    """
    layers, layer_biases = list(layers), list(layer_biases)
    return _on_rows(ys, x, a, b, caps, slots, weights, count, scale, windows, [], [], layers, layer_biases)


def folds(tokens: int, k: int, widths: Sequence[int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether layers of these sizes are computed sooner in the shrink's launch than by products of their own: what
    ``cost.fold_pays`` says for this GPU, and only for 16-bit numbers, which tensor cores take as they are."""
    if dtype.itemsize != 2:
        return False
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else ""
    return cost.fold_pays(cost.gpu_named(name), tokens, k, tuple(widths), dtype.itemsize)


def fused_lora(
    ys: list[Tensor],
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    biases: list[Tensor | None],
    scales: list[float],
    scale_tensors: list[Tensor | None],
) -> list[Tensor]:
    """One adapter for every row, taken as it stands in a graph: the same kernels, and no routing to build.

    ys[i]: ``[..., out_i]``; x: ``[..., in]``; a[i]: ``[r_i, in]``; b[i]: ``[out_i, r_i]``; biases[i]: ``[out_i]`` or
    None; scales: floats, each multiplied by its 0-dimensional scale_tensors[i] if there is one
    """
    ranks = [t.shape[0] for t in a]
    # Where b has a bias it is copied at every call; without one this is a view.
    rows = [t.t() if bias is None else torch.cat([t.t(), bias[None]]) for t, bias in zip(b, biases, strict=True)]
    bias_rows = [-1 if bias is None else rank for rank, bias in zip(ranks, biases, strict=True)]
    scale = None
    if any(t is not None for t in scale_tensors):
        one = torch.ones((), dtype=torch.float32, device=x.device)
        scale = torch.stack([one if t is None else t.reshape(()).to(torch.float32) for t in scale_tensors])
    return _on_rows(ys, x, a, rows, ranks, None, None, None, scale, None, bias_rows, scales, [], [])


def _on_rows(ys: list[Tensor], x: Tensor, *rest: object) -> list[Tensor]:
    """Call the op, on a device that can run it and with a batch dimension."""
    check_device(x.device)
    if x.dim() == 1:
        return [out[0] for out in torch.ops.lorafx.sgmv([y[None] for y in ys], x[None], *rest)]
    return torch.ops.lorafx.sgmv(ys, x, *rest)


def check_device(device: torch.device) -> None:
    """UnsupportedModelError: the kernels can't run there."""
    if device.type not in GPUS and not INTERPRETED:
        raise UnsupportedModelError(
            f'lowering="triton" needs a GPU, and the model is on {device}: choose lowering="aten", or set '
            "TRITON_INTERPRET=1 in the environment before Python starts to run the kernels in Triton's interpreter"
        )


def _sgmv(
    ys: list[Tensor],
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    caps: list[int],
    slots: Tensor | None,
    weights: Tensor | None,
    count: Tensor | None,
    scale: Tensor | None,
    windows: Tensor | None,
    bias_rows: list[int],
    factors: list[float],
    layers: list[Tensor],
    layer_biases: list[Tensor | None],
) -> list[Tensor]:
    """The op ``lorafx::sgmv``, for x ``[rows, ..., in]``: ``routed_lora``, or without routing (slots, weights, count
    and windows None) adapter rows ``[0, caps[i])`` for everyone, ``bias_rows[i]`` and ``factors[i]`` with them.
    Instead of ``ys``, ``layers`` and their biases."""
    if layers:
        ys = [torch.empty((*x.shape[:-1], w.shape[0]), dtype=x.dtype, device=x.device) for w in layers]
    # The expand adds to what the layers' programs have written, in place.
    outs = ys if layers else [torch.empty_like(y, memory_format=torch.contiguous_format) for y in ys]
    k, rows, row_tokens = x.shape[-1], x.shape[0], math.prod(x.shape[1:-1])
    tokens = rows * row_tokens
    if tokens == 0:
        return outs
    x = x.reshape(tokens, k).contiguous()
    if len(a) == 1 and len(caps) > 1:
        a = list(a[0].split(caps))
    pairs = 1
    if slots is not None:
        slots, weights = slots.contiguous(), weights.contiguous()
        # the bank's tables come as columns of wider ones: a stride, not a copy
        windows = windows if windows.stride()[1:] == (3, 1) else windows.contiguous()
        scale = scale if scale.stride(1) == 1 else scale.contiguous()
        pairs = slots.shape[1]

    for group in launch_groups(ys, a, b):
        size = len(group)
        own_a, own_b, own_y = [a[i].contiguous() for i in group], [b[i] for i in group], [ys[i] for i in group]
        ranks = tuple(caps[i] for i in group)
        *first_lanes, lanes = accumulate(ranks, initial=0)
        widths = tuple(y.shape[-1] for y in own_y)
        one_dtype = x.dtype == own_a[0].dtype
        plan = schedule(
            _known(rows),
            _known(row_tokens),
            k,
            widths,
            max(ranks),
            itemsize=x.dtype.itemsize if one_dtype else 4,
            folded=bool(layers),
            capability=capability(x.device),
        )
        # rows on the first axis of the grid, the only one that takes more than 65,535
        tiled, tile_rows = (tokens, 1) if plan.spans else (row_tokens, rows)
        scratch = torch.empty((plan.split_k, tokens, lanes), dtype=torch.float32, device=x.device)
        absent = [None] * (MAX_SIBLINGS - size)
        ys_here = [y.contiguous() for y in own_y]
        *first_tiles, column_tiles = accumulate((-(-width // plan.block_n) for width in widths), initial=0)
        sizes = (tokens, row_tokens, rows, pairs)
        shared = {
            "PAIRS": power_of_two(pairs),
            "DOT": tl.float32 if INTERPRETED else tl.bfloat16,  # the interpreter's dot is wrong in bfloat16
            "RANKS": ranks,
            "FIRST_LANES": tuple(first_lanes),
            "LANES": lanes,
            "FIRST_SIBLING": group[0],
            "WINDOW_STRIDE": 0 if slots is None else windows.stride(0),
            "SPANS": plan.spans,
        }
        own_layers, own_biases = (
            [tensors[i] for i in group] if layers else [None] * size for tensors in (layers, layer_biases)
        )
        shrink_programs = -(-tiled // plan.shrink_m) * tile_rows
        shrink_programs *= -(-size // plan.together) * plan.rank_blocks * plan.split_k
        layer_programs, layer_options = _layer_plan(x, own_layers if layers else [], tokens)
        wrap_triton(shrink_kernel)[(layer_programs + shrink_programs,)](
            x, *own_a, *absent,
            # Behind the base GEMMs: before them, Inductor stores the x that both read twice.
            None if layers else ys_here[-1],
            *own_layers, *absent, *own_biases, *absent, *(ys_here if layers else own_layers), *absent,
            scratch, slots, windows, count, *sizes, layer_programs,
            **layer_options,
            K=k,
            BLOCK_M=plan.shrink_m,
            BLOCK_R=plan.block_r,
            BLOCK_K=plan.block_k,
            CHUNK=plan.chunk,
            TOGETHER=plan.together,
            RANK_BLOCKS=plan.rank_blocks,
            ALIGNED=all(_aligned(t) for t in own_a),
            UPCAST=not one_dtype or (INTERPRETED and x.dtype == torch.bfloat16),
            TERMS=2 if (x.dtype, own_a[0].dtype) == (torch.bfloat16, torch.float32) else 1,
            PRECISION=dot_precision(x.device, own_y[0].dtype),
            num_warps=plan.shrink_warps,
            num_stages=plan.shrink_stages,
            **shared,
        )  # fmt: skip
        wrap_triton(expand_kernel)[(-(-tiled // plan.expand_m) * tile_rows, column_tiles)](
            *[None if layers else y for y in ys_here], *absent, *own_b, *absent, *(outs[i] for i in group), *absent,
            scratch, slots, weights, windows, scale, count, *sizes,
            WIDTHS=widths,
            FIRST_TILES=tuple(first_tiles),
            B_STRIDES_R=tuple(t.stride(0) for t in own_b),
            B_STRIDES_N=tuple(t.stride(1) for t in own_b),
            BIAS_ROWS=tuple(bias_rows[i] for i in group) if bias_rows else (),
            FACTORS=tuple(factors[i] for i in group) if factors else (),
            SCALE_STRIDE=0 if slots is None else scale.stride(0),
            BLOCK_M=plan.expand_m,
            BLOCK_R=plan.expand_r,
            BLOCK_N=plan.block_n,
            SPLIT_K=plan.split_k,
            SPLITS=power_of_two(plan.split_k),
            TERMS=expand_terms(own_y[0].dtype, own_b[0].dtype),
            PRECISION=dot_precision(x.device, own_y[0].dtype),
            num_warps=plan.expand_warps,
            num_stages=1,  # most windows are one block of ranks: nothing to overlap
            **shared,
        )  # fmt: skip
    return outs


def _layer_plan(x: Tensor, layers: list[Tensor], tokens: int | torch.SymInt) -> tuple[int | torch.SymInt, dict]:
    """How many programs compute the layers of one launch, and what the kernel has to know of them.

    x: ``[tokens, k]``; layers: rows of all equally far apart (``passes/fold_layers.py`` folds no others)
    """
    widths = tuple(weight.shape[0] for weight in layers)
    if not layers:
        plan, first_tiles, column_tiles, stride = LayerSchedule(1, 1, 1, 1, True), (), 0, 0
    else:
        itemsize = 4 if INTERPRETED else x.dtype.itemsize
        plan = layer_schedule(_known(tokens), x.shape[-1], widths, itemsize, shared_memory(x.device))
        *first_tiles, column_tiles = accumulate((-(-width // plan.tile_n) for width in widths), initial=0)
        stride = layers[0].stride(0)
    return -(-tokens // plan.tile_m) * column_tiles, {
        "WIDTHS": widths,
        "FIRST_TILES": tuple(first_tiles),
        "COLUMN_TILES": column_tiles,
        "W_STRIDE": stride,
        "W_ALIGNED": all(_aligned(weight) for weight in layers),
        "LAYER_M": plan.tile_m,
        "LAYER_N": plan.tile_n,
        "LAYER_K": plan.block_k,
        "LAYER_STAGES": plan.stages,
        "LAYERS_FIRST": plan.first,
    }


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take there."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return 64 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def capability(device: torch.device) -> int:
    """Of an NVIDIA GPU, 90 for 9.0; 0 elsewhere."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch_groups(ys: list[Tensor], a: list[Tensor], b: list[Tensor]) -> list[list[int]]:
    """Which siblings go together: neighbours of one dtype, at most ``MAX_SIBLINGS``."""
    groups: list[list[int]] = []
    previous = None
    for i in range(len(ys)):
        dtypes = (ys[i].dtype, a[i].dtype, b[i].dtype)
        if dtypes != previous or len(groups[-1]) == MAX_SIBLINGS:
            groups.append([])
        groups[-1].append(i)
        previous = dtypes
    return groups


def expand_terms(y: torch.dtype, b: torch.dtype) -> int:
    """How many bfloat16 products make one of S (float32) and B: exact to 2^-17 where B is bfloat16, and to 2^-16 where
    it is float32, which a 16-bit base output has no use for; 1: a float32 product instead."""
    if b == torch.bfloat16:
        return 2
    return 3 if b == torch.float32 and y.itemsize == 2 else 1


def dot_precision(device: torch.device, base: torch.dtype) -> str:
    """How ``tl.dot`` takes float32 operands: beside a 16-bit base output, on NVIDIA's tensor cores, as the sum of two
    TF32 numbers each. Beside a float32 one as they are: in sums that cancel, the other way shows (2e-5 on an H100)."""
    return "tf32x3" if device.type == "cuda" and torch.version.hip is None and base.itemsize == 2 else "ieee"


def _aligned(matrix: Tensor) -> bool:
    """Every row begins at a multiple of 16 bytes, given that storages do (allocators see to that)."""
    return all(
        isinstance(elements, int) and elements * matrix.element_size() % 16 == 0
        for elements in (matrix.storage_offset(), matrix.stride(0))
    )


def _known(size: int | torch.SymInt) -> int | None:
    """A size as the schedule takes it: a symbol would become a guard, and a guard a recompile."""
    return None if isinstance(size, torch.SymInt) else size


if INTERPRETED:
    sgmv = torch.library.custom_op("lorafx::sgmv", _sgmv, mutates_args=())

    @sgmv.register_fake
    def _(ys, x, *rest):
        if layers := rest[-2]:
            return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in layers]
        return [torch.empty_like(y, memory_format=torch.contiguous_format) for y in ys]

else:
    sgmv = torch.library.triton_op("lorafx::sgmv", _sgmv, mutates_args=())
