"""An adapted layer: its own forward, then the marker. Works on any module, which stays as it is: a forward hook."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.bank import AdapterBank, bank_of
from lorafx.errors import UnsupportedModelError
from lorafx.kernels.layer_ops import rows_shape, set_layer_site_forward
from lorafx.kernels.ops import set_site_forward
from lorafx.layer_kinds import describe, mark


class SiteHook:
    """The forward hook of one adapted layer. ``site`` is its index in the bank's store; a new store changes it."""

    def __init__(self, bank: AdapterBank, site: int) -> None:
        self.bank = bank
        self.site = site

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        if torch.compiler.is_compiling():
            return mark(module, output, x, self.bank.key, self.site)
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
    )[0]


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
    if rows > 1 and (reason := rows_unknown(shape, rows, bank.batch)):
        raise UnsupportedModelError(refusal(bank.store.sites[site].name, reason))


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
    return None


def refusal(site: str, reason: str) -> str:
    return (
        f"{site} can't take different adapters for different rows: {reason}. Use one adapter for the whole batch"
        " (model.lora.use(name)), or a batch of one row at a time."
    )


def _marker_forward(y: Tensor, x: Tensor, key: int, site: int) -> Tensor:
    return apply_site(bank_of(key), site, y, x)


def _layer_marker_forward(
    y: Tensor, x: Tensor, factor: Tensor | None, kind: str, window: list[int], key: int, site: int
) -> Tensor:
    return _apply_to_layer(bank_of(key), site, y, x, factor, kind, window)


set_site_forward(_marker_forward)
set_layer_site_forward(_layer_marker_forward)
