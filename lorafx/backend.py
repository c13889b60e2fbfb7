"""From a traced graph to something that runs: the passes, then Inductor, then the inputs that Dynamo does not know.

What the routed ops read (the bank's tensors, the routing of the call) is appended to the graph's inputs at every call.
Dynamo never sees these tensors, so nothing about them is guarded: a swap recompiles nothing, and threads that run the
same compiled code read each the routing of its own call.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn

from lorafx import outlined, validation
from lorafx.bank import AdapterBank
from lorafx.errors import LorafxError, UnsupportedModelError
from lorafx.kernels.ops import LOWERINGS
from lorafx.logs import GRAPHS
from lorafx.passes import PassContext, PassRecord, run_passes
from lorafx.passes.attach_inputs import routed_inputs
from lorafx.passes.checkpointed import draw_again
from lorafx.probe_bank import ProbeBank
from lorafx.recompiles import input_shapes, reason_now
from lorafx.sites import note_positions, refusal, rows_unknown, run_markers_now

log = logging.getLogger("lorafx")
graphs_log = logging.getLogger(GRAPHS)


@dataclass(frozen=True)
class Options:
    """``options`` of ``lorafx.compile``: what is ours, and what goes on to Inductor."""

    lowering: str = "auto"
    fold: bool = True  # the adapted layers' own products go into the fused op
    inductor: bool = True
    outline: bool = True  # one compiled layer for all that are alike, where that can be done
    patches: dict[str, Any] | None = None
    validate: bool = False  # every rewrite is tried on probe inputs, and undone where it differs

    @classmethod
    def parse(cls, options: dict[str, Any] | None, mode: str | None = None) -> Options:
        """LorafxError: a lowering that there is none of, an option that neither lorafx nor Inductor knows."""
        rest = dict(options or {})
        lowering = rest.pop("lowering", "auto")
        if lowering not in LOWERINGS:
            raise LorafxError(f"got lowering {lowering!r}; expected one of {', '.join(LOWERINGS)}")
        fold = bool(rest.pop("fold", True))
        inductor = bool(rest.pop("inductor", True))
        outline = bool(rest.pop("outline", True))
        wanted = rest.pop("validate", None)
        validate = validation.default() if wanted is None else bool(wanted)
        if mode in (None, "default", "eager"):
            patches = {}
        else:
            try:
                patches = dict(torch._inductor.list_mode_options(mode))
            except RuntimeError as error:
                raise LorafxError(f"got mode {mode!r}; expected one of torch.compile's, or 'eager': {error}") from error
        known = set(torch._inductor.list_options())
        unknown = sorted(key for key in rest if key.replace("-", "_") not in known)
        if unknown:
            raise LorafxError(
                f"unknown option {unknown[0]!r}; lorafx has lowering, fold, inductor, outline and validate,"
                " and torch._inductor.list_options() lists Inductor's"
            )
        patches.update({key.replace("-", "_"): value for key, value in rest.items()})
        if lowering == "cpp" and inductor and patches.get("cpp_wrapper"):
            raise LorafxError(
                'got lowering "cpp" with Inductor\'s option cpp_wrapper; expected one of them: leave out the lowering,'
                " and ATen's is used beside cpp_wrapper"
            )
        return cls(lowering, fold, inductor, outline, patches, validate)

    def lowering_for(self, inputs: Sequence[Any]) -> str:
        """``lowering``, but "aten" for "auto" on a CPU where Inductor writes C++ around the kernels: from there it
        calls an op that is not its own through Python, and ours then crashes the process (torch 2.13)."""
        wrapped = self.inductor and (self.patches or {}).get("cpp_wrapper", torch._inductor.config.cpp_wrapper)
        on_cpu = all(value.device.type == "cpu" for value in inputs if isinstance(value, torch.Tensor))
        return "aten" if self.lowering == "auto" and wrapped and on_cpu else self.lowering


@dataclass
class GraphRecord:
    """One graph that was compiled: what the passes did, how long Inductor took, which of Dynamo's frames it is of."""

    passes: PassRecord
    seconds: float
    frame: int | None
    parameters: Mapping[int, nn.Parameter]  # those it reads that are still there, by id
    before: str  # code of the graph as traced
    after: str  # and as fused
    shapes: Mapping[str, str] = field(default_factory=dict)  # it was traced for, by input
    outlined: int = 0  # layers that run what was compiled for another one
    recompiled: str | None = None  # why, where its frame had a graph before
    call: int = 0  # of the model, in which it was compiled


recent: deque[GraphRecord] = deque(maxlen=64)  # of torch.compile(backend="lorafx"), which has no bank to ask


def compile_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    bank: AdapterBank | None = None,
    keep: Callable[[GraphRecord], None] = recent.append,
) -> Callable[..., Any]:
    """What Dynamo calls a backend: ``gm`` rewritten and compiled, to be called as ``gm`` is."""
    traced, shapes, reason = gm.print_readable(print_output=False), input_shapes(gm, inputs), reason_now()
    rewritten, record = _rewrite(gm, inputs, options, bank)
    fused = rewritten.print_readable(print_output=False)
    graphs_log.debug("as traced:\n%s", traced)
    graphs_log.debug("as rewritten:\n%s", fused)
    routed = routed_inputs(rewritten)
    of_call = sum(wanted.of_call for wanted in routed)
    held = [bank.store.table(*vars(wanted).values()) for wanted in routed[of_call:]]
    mixed_refusal = _mixed_refusal(record, bank) if routed else None
    started, groups = time.perf_counter(), len(record.groups)
    if routed:
        inputs = [*inputs, *_static_fakes([*bank.routing().tensors[:of_call], *held], inputs)]
    if not run_markers_now(rewritten) and options.inductor:
        log.info("Inductor compiles a graph of %d nodes, with %d fused group(s)", len(rewritten.graph.nodes), groups)
        compile_ = outlined.compile_outlined if options.outline else outlined.compile_alone
        compiled, repeats = compile_(rewritten, inputs, options.patches)
    else:
        draw_again(rewritten)
        compiled, repeats = rewritten.forward, 0
    identity = torch._guards.CompileContext.current_compile_id()
    keep(
        GraphRecord(
            record,
            time.perf_counter() - started,
            identity.frame_id if identity is not None else None,
            WeakValueDictionary({id(value): value for value in inputs if isinstance(value, nn.Parameter)}),
            traced,
            fused,
            shapes,
            repeats,
            reason,
        )
    )
    log.info(
        "graph compiled: %d group(s) fused, %d branch(es) left, %.1f s",
        groups,
        len(record.skipped),
        time.perf_counter() - started,
    )
    return _with_extras(compiled, bank, of_call, held, mixed_refusal) if routed else compiled


def _rewrite(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Options, bank: AdapterBank | None
) -> tuple[fx.GraphModule, PassRecord]:
    def rewrite(refused: Collection[str] = ()) -> tuple[fx.GraphModule, PassRecord]:
        context = PassContext(lowering=options.lowering_for(inputs), fold=options.fold, refused=refused)
        if bank is not None:
            context.bank_key, context.sites = bank.key, bank.store.geometry
            context.late = bank.store.late
            context.factors = bank.store.dora.places if bank.store.dora is not None else {}
        rewritten = _copy_graph(gm)
        return rewritten, run_passes(rewritten, context)

    def sites(record: PassRecord) -> ProbeBank:
        rows = 1 if _mixed_refusal(record, bank) is not None else int(bank.batch or 1)
        return ProbeBank(bank, rows)

    if not options.validate:
        return rewrite()
    return validation.validated(gm, inputs, rewrite, lambda: _copy_graph(gm), sites if bank is not None else None)


def _with_extras(
    compiled: Callable[..., Any],
    bank: AdapterBank,
    of_call: int,
    held: list[Tensor],
    mixed_refusal: tuple[str, str] | None,
) -> Callable[..., Any]:
    """Append the first ``of_call`` tensors of each call's routing, and ``held``: tensors of the bank, at one address
    as long as its key stays."""
    made_for = bank.key

    def call(*args: Any) -> Any:
        if bank.key != made_for:
            raise LorafxError("a graph was called whose bank has been packed anew since; call the model itself")
        routing = bank.routing()
        if mixed_refusal is not None and len(routing.rows) > 1:
            raise UnsupportedModelError(refusal(*mixed_refusal, bank.late_in_use))
        return compiled(*args, *routing.tensors[:of_call], *held)

    return call


def _static_fakes(tensors: Sequence[Tensor], inputs: Sequence[Any]) -> list[Tensor]:
    """What tracing is to take these for. Left as they are, their sizes would become symbols, shared with any input that
    happens to have the same size."""
    mode = torch._guards.detect_fake_mode(list(inputs))
    return list(tensors) if mode is None else [mode.from_tensor(t, static_shapes=True) for t in tensors]


def _mixed_refusal(record: PassRecord, bank: AdapterBank) -> tuple[str, str] | None:
    """Where, and why, this graph can't serve different adapters row by row, judged by the batch that it was traced
    with."""
    if bank.batch is None:
        return None
    for shape in record.shapes.values():
        note_positions(shape, bank.batch)
    for site, shape in record.shapes.items():
        if reason := rows_unknown(shape, bank.batch, bank.batch):
            return site, reason
    return None


def _copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of our own to change: Dynamo still reads its one after the backend returned."""
    rewritten = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    rewritten.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        rewritten._param_name_to_source = gm._param_name_to_source
    for old, new in zip(gm.graph.nodes, rewritten.graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return rewritten


def dynamo_backend(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="lorafx")``: LoRA branches of the graph are fused, the rest is Inductor's."""
    return compile_graph(gm, inputs, Options.parse(options, mode))


__all__ = ["GraphRecord", "Options", "compile_graph", "dynamo_backend", "recent"]
