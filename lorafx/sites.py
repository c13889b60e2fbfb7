"""An adapted layer: its own forward, then the marker. Works on any module, which stays as it is: a forward hook."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from lorafx.bank import AdapterBank, bank_of
from lorafx.errors import UnsupportedModelError
from lorafx.kernels.layer_ops import rows_shape, set_layer_site_forward
from lorafx.kernels.ops import set_site_forward
from lorafx.kernels.row_factors import set_magnitude_forward
from lorafx.layer_kinds import describe, mark
from lorafx.passes.checkpointed import bodies_of
from lorafx.passes.graph_reading import example


class SiteHook:
    """The forward hook of one adapted layer. ``site`` is its index in the bank's store; a new store changes it."""

    def __init__(self, bank: AdapterBank, site: int) -> None:
        self.bank = bank
        self.site = site
        self.dora = False  # whether any adapter may have DoRA here: what is traced then has one op more

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        if torch.compiler.is_compiling():
            if self.dora:
                return marked(output, x, module.bias, self.bank.key, self.site)
            return mark(module, output, x, self.bank.key, self.site)
        if self.dora:
            return apply_dora(self.bank, self.site, output, x, module.bias)
        return apply_behind(module, self.bank, self.site, output, x)


class RefuseNames:
    """A forward pre-hook of the model. Its compiled call takes ``adapter_names`` out; a shallow copy has none."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if kwargs.get("adapter_names") is not None:
            raise UnsupportedModelError(
                "adapter_names reached the model past lorafx's call of it, and would be ignored. A copy.copy of a model"
                " doesn't take them: call the model itself, or a copy.deepcopy."
            )


def check_one_place(root: nn.Module, paths: Iterable[str]) -> None:
    """UnsupportedModelError: one of these modules stands at several places, which a hook on it can't tell apart."""
    places: dict[int, list[str]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(path)
    for path in paths:
        same = places[id(root.get_submodule(path))]
        if len(same) > 1:
            raise UnsupportedModelError(
                f"{' and '.join(same)} are the same module; PEFT adapts {same[0]} alone, a hook on it both. Use a"
                " PeftModel, whose layer stands at one place only."
            )


def apply_site(bank: AdapterBank, site: int, y: Tensor, x: Tensor) -> Tensor:
    """What the routing of this call adds to ``y``, now and without a graph.

    y: ``[rows, ..., out]``; x: ``[rows, ..., in]``
    """
    routing = bank.routing()
    if routing.idle:
        return y
    check_rows(bank, site, tuple(x.shape), len(routing.rows))
    tensors = bank.store.site_tensors(site)
    return torch.ops.lorafx.routed_lora(
        [y],
        x,
        [tensors["a"]],
        [tensors["b"]],
        [tensors["a"].shape[0]],
        routing.slots,
        routing.weights,
        routing.count,
        tensors["owner"],
        tensors["scale"],
        tensors["windows"],
        None,
        bank.lowering,
        last=routing.last if bank.store.sites[site].name in bank.store.late else None,
    )[0]


def marked(y: Tensor, x: Tensor, bias: Tensor | None, key: int, site: int) -> Tensor:
    """Both markers of a layer that DoRA may stand on. Between them the sum stays in float32, to be rounded once."""
    whole = torch.ops.lorafx.site.default(_wide(y), x, key, site)
    return torch.ops.lorafx.magnitude.default(whole, bias, key, site).to(y.dtype)


def apply_dora(bank: AdapterBank, site: int, y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """The same, now and without a graph. bias: the layer's own"""
    return apply_magnitude(bank, site, apply_site(bank, site, _wide(y), x), bias).to(y.dtype)


def _wide(y: Tensor) -> Tensor:
    return y.float() if y.dtype in (torch.bfloat16, torch.float16) else y


def apply_magnitude(bank: AdapterBank, site: int, y: Tensor, bias: Tensor | None) -> Tensor:
    """What DoRA adapters of this call's routing make of ``y``, the output of ``apply_site``; bias: the layer's own"""
    dora, path = bank.store.dora, bank.store.sites[site].name
    if dora is None or path not in dora.sites or (routing := bank.routing()).idle:
        return y
    return torch.ops.lorafx.scaled_rows(y, bias, dora.table(path), routing.slots, routing.count)


def apply_behind(layer: nn.Module, bank: AdapterBank, site: int, y: Tensor, x: Tensor) -> Tensor:
    """``apply_site`` behind a layer of any kind: ``y`` and ``x`` are shaped as the layer has them."""
    described = describe(layer, y)
    return apply_site(bank, site, y, x) if described is None else _apply_to_layer(bank, site, y, x, *described)


def _apply_to_layer(
    bank: AdapterBank, site: int, y: Tensor, x: Tensor, factor: Tensor | None, kind: str, window: list[int]
) -> Tensor:
    routing = bank.routing()
    if routing.idle:
        return y
    check_rows(bank, site, rows_shape(kind, tuple(x.shape)), len(routing.rows))
    tensors = bank.store.site_tensors(site)
    return torch.ops.lorafx.routed_layer(
        y,
        x,
        factor,
        kind,
        window,
        tensors["a"],
        tensors["b"],
        routing.slots,
        routing.weights,
        routing.count,
        tensors["owner"],
        tensors["scale"],
        tensors["windows"],
        None,
        bank.lowering,
    )


def check_rows(bank: AdapterBank, site: int, shape: tuple[int, ...], rows: int) -> None:
    """UnsupportedModelError: ``rows`` adapters are named, and the leading dimension of an input of this shape is not
    known to be rows"""
    note_positions(shape, bank.batch)
    if rows > 1 and (reason := rows_unknown(shape, rows, bank.batch)):
        raise UnsupportedModelError(refusal(bank.store.sites[site].name, reason, bank.late_in_use))


class BatchRows(int):
    """How many rows the batch of a call has. positions: how many each has, one after the other, in some of its tensors:
    what rows times that many is can be rows and positions as one dimension, and a few of them, chosen, can't."""

    positions: set[int]

    @classmethod
    def of_call(cls, rows: int, inputs: Iterable[Any]) -> BatchRows:
        made = cls(rows)
        made.positions = set()
        for value in inputs:
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == rows:
                made.positions.add(int(value.shape[1]))
                note_positions((*value.shape, 1), made)
                note_positions(tuple(value.shape), made)
        return made


def note_positions(shape: tuple[int, ...], batch: int | None) -> None:
    """Remember how many positions a row has in an input of this shape, ``[rows, ..., in]``."""
    if isinstance(batch, BatchRows) and batch and len(shape) > 2 and shape[0] % batch == 0:
        batch.positions.add(shape[0] // batch * prod(shape[1:-1]))


def rows_unknown(shape: tuple[int, ...], rows: int, batch: int | None) -> str | None:
    """Why the leading dimension of a layer's input can't be told to be batch rows; None if it can.

    shape: of the input, ``[rows, ..., in]`` or ``[rows * tokens, in]``; rows: named; batch: of the call, if known
    """
    leading = shape[0] if len(shape) > 1 else 1
    unit = batch or rows
    if leading % unit:
        return f"its input has leading size {leading}, which is no multiple of the batch's {unit}"
    if len(shape) > 2 and leading != unit and shape[1] == unit:
        return f"its input {list(shape)} looks time-major: the batch of {unit} is its second dimension"
    each = leading // unit
    if len(shape) == 2 and each != 1 and isinstance(batch, BatchRows) and each not in batch.positions:
        # tokens that were chosen for an expert, patches of many pictures
        return f"its input {list(shape)} is not known to hold {each} of each of the batch's {unit}"
    return None


def refusal(site: str, reason: str, late: bool = False) -> str:
    """late: an aLoRA adapter is in use, with which rows differ even where all name the same"""
    if late:
        return (
            f"{site} can't take an aLoRA adapter, which begins at a place of its own in each row: {reason}. Use an"
            " adapter without alora_invocation_tokens."
        )
    return (
        f"{site} can't take different adapters for different rows: {reason}. Use one adapter for the whole batch"
        " (model.lora.use(name)), or a batch of one row at a time."
    )


def _marker_forward(y: Tensor, x: Tensor, key: int, site: int) -> Tensor:
    return apply_site(bank_of(key), site, y, x)


def _magnitude_forward(y: Tensor, bias: Tensor | None, key: int, site: int) -> Tensor:
    return apply_magnitude(bank_of(key), site, y, bias)


def _layer_marker_forward(
    y: Tensor, x: Tensor, factor: Tensor | None, kind: str, window: list[int], key: int, site: int
) -> Tensor:
    return _apply_to_layer(bank_of(key), site, y, x, factor, kind, window)


set_site_forward(_marker_forward)
set_layer_site_forward(_layer_marker_forward)
set_magnitude_forward(_magnitude_forward)

MARKERS = {
    torch.ops.lorafx.site.default: _marker_forward,
    torch.ops.lorafx.layer_site.default: _layer_marker_forward,
    torch.ops.lorafx.magnitude.default: _magnitude_forward,
}


def run_markers_now(gm: fx.GraphModule) -> int:
    """Have the markers that the passes left in ``gm`` and in its checkpointed bodies, and that need gradients, computed
    as a layer outside a graph is: autograd then keeps the routing of the call, which a marker's own backward would look
    for once the call is over. Returns how many there were; ``gm`` has to be run as it is then.
    """
    done = 0
    for one in (gm, *bodies_of(gm).values()) if torch.is_grad_enabled() else ():
        markers = [node for node in one.graph.nodes if node.target in MARKERS and _wants_gradients(node)]
        for node in markers:
            node.target = MARKERS[node.target]
        if markers:
            one.recompile()
        done += len(markers)
    return done


def _wants_gradients(marker: fx.Node) -> bool:
    return any(getattr(example(arg), "requires_grad", False) for arg in marker.args[:2])
