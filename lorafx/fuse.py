"""``lorafx.fuse``: the passes alone, on a graph that ``torch.fx.symbolic_trace`` or ``torch.export`` made."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from lorafx.backend import GraphRecord, Options
from lorafx.errors import LorafxError
from lorafx.explain import Report, report_on
from lorafx.passes import PassContext, PassRecord, run_passes
from lorafx.validation import validated


def fuse(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any] | None = None,
    *,
    options: dict[str, Any] | None = None,
    validate: bool | None = None,
) -> tuple[fx.GraphModule, Report]:
    """Fuse the LoRA branches of a traced graph. ``graph_module`` stays as it is; its parameters are shared.

    example_inputs: real tensors, to learn shapes and dtypes from; without them a branch that casts or reshapes on its
        way is left alone, since the dtype and the shape of its sum are unknown
    options: "lowering", as in ``lorafx.compile``
    validate: try every rewrite on ``example_inputs`` beside what it replaces, and undo what differs. None: if there are
        example inputs and the environment variable LORAFX_VALIDATE is 1

    Dropout is judged by the mode that the graph's modules are in now: a graph that is fused in eval has no dropout in
    its branches afterwards, so trace and fuse again for training.

    Returns the fused graph and a report of what was done.

    LorafxError: ``validate`` without example inputs
    """
    if validate and example_inputs is None:
        raise LorafxError("validate=True needs example_inputs: real tensors to try the rewritten graph on. Pass them.")
    parsed = Options.parse(options if validate is None else {**(options or {}), "validate": validate})

    traced = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    if example_inputs is not None:
        _learn_shapes(traced, example_inputs)

    def copied() -> fx.GraphModule:
        return fx.GraphModule(traced, copy.deepcopy(traced.graph))

    def rewrite(refused: Collection[str] = ()) -> tuple[fx.GraphModule, PassRecord]:
        fused = copied()
        return fused, run_passes(fused, PassContext(lowering=parsed.lowering, refused=refused))

    before = traced.print_readable(print_output=False)
    if parsed.validate and example_inputs is not None:
        fused, record = validated(traced, example_inputs, rewrite, copied)
    else:
        fused, record = rewrite()
    after = fused.print_readable(print_output=False)
    return fused, report_on([GraphRecord(record, 0.0, None, {}, before, after)])


def _learn_shapes(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Leave a fake tensor in ``meta["val"]`` of every node."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    with torch.no_grad():
        kept = [(buffer, buffer.clone()) for buffer in gm.buffers()]
        FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)
        for buffer, before in kept:  # a batch norm counts its batches in a real number, also where all others are fake
            buffer.copy_(before)
