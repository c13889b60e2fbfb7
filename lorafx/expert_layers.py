"""Experts while lorafx runs them: transformers' own products, the tokens sorted by expert, and a site behind each.

The adapters of a token are those of its row of the batch: tokens are ``[rows * positions]``, and what is sorted carries
along which token it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers.integrations.moe import _batched_linear, _grouped_linear

from lorafx.bank import AdapterBank, bank_of
from lorafx.kernels.experts import expert_delta, set_expert_site_forward
from lorafx.selection import Selection
from lorafx.sites import MARKERS, check_rows

Adapt = Callable[[str, Tensor, Tensor, Tensor, Tensor, int], Tensor]  # (parameter, y, x, ids, tokens, total) -> y


def run_experts(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor, adapt: Adapt) -> Tensor:
    """The experts' output, ``adapt`` called behind each product; the steps are those of transformers'
    ``grouped_mm_experts_forward``.

    hidden: ``[tokens, in]``; index, weights: ``[tokens, k]``, the experts of each token and what each counts
    """
    total, chosen = index.shape
    ids, order = torch.sort(index.reshape(-1), stable=True)
    tokens = order // chosen

    def product(name: str, x: Tensor) -> Tensor:
        return adapt(name, _product(module, name, x, ids), x, ids, tokens, total)

    if module.has_gate:
        inner = module._apply_gate(product("gate_up_proj", hidden[tokens]))
    else:
        inner = module.act_fn(product("up_proj", hidden[tokens]))
    out = product("down_proj", inner)
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)
    out = out * weights.reshape(-1)[order][:, None]
    back = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    return out[back].view(total, chosen, -1).sum(1).to(hidden.dtype)


def _product(module: nn.Module, name: str, x: Tensor, ids: Tensor) -> Tensor:
    """Each row of ``x`` with the weight of its expert, by what the model was set to."""
    weight = getattr(module, name)
    bias = getattr(module, f"{name}_bias")[ids] if module.has_bias else None
    if module.config._experts_implementation == "batched_mm":
        return _batched_linear(x, weight[ids], bias=bias, is_transposed=module.is_transposed)
    each = torch.arange(module.num_experts, device=ids.device, dtype=ids.dtype)
    ends = torch.searchsorted(ids, each, right=True).to(torch.int32)
    if weight.dtype == torch.float64:  # which torch's grouped_mm does not take
        turned = weight if module.is_transposed else weight.mT
        out = torch.ops.transformers.grouped_mm_fallback(x, turned, ends)
        return out if bias is None else out + bias
    return _grouped_linear(x, weight, ends, bias=bias, is_transposed=module.is_transposed)


def in_bank(bank: AdapterBank, sites: Mapping[str, int]) -> Adapt:
    """sites: by parameter"""

    def adapt(name: str, y: Tensor, x: Tensor, ids: Tensor, tokens: Tensor, total: int) -> Tensor:
        if name not in sites:
            return y
        if torch.compiler.is_compiling():
            return torch.ops.lorafx.expert_site.default(y, x, ids, tokens, total, bank.key, sites[name])
        return apply_expert_site(bank, sites[name], y, x, ids, tokens, total)

    return adapt


def apply_expert_site(
    bank: AdapterBank, site: int, y: Tensor, x: Tensor, ids: Tensor, tokens: Tensor, total: int
) -> Tensor:
    """What the routing of this call adds to ``y``, now and without a graph.

    y: ``[pairs, out]``; x: ``[pairs, in]``; ids, tokens: ``[pairs]``, the expert and the token of each; total: tokens
    """
    routing, store = bank.routing(), bank.store
    named, name = len(routing.rows), store.sites[site].name
    slots = dict.fromkeys(slot for row in routing.rows for slot, _ in row if name in store.taken[slot])
    check_rows(bank, site, (total, x.shape[1]), named)
    rows = tokens * named // total if named > 1 else torch.zeros_like(tokens)
    experts, out = store.sites[site].experts, y
    for slot in slots:
        here = routing.slots == slot
        gates = (torch.where(here, routing.weights, 0).sum(1) * store.scale[slot, site])[rows]
        a, b, _ = store.views(slot, name)
        if all(slot in dict(row) for row in routing.rows) or (x.is_cuda and len(ids) <= experts):
            delta = expert_delta(x, ids, gates, a, b.t(), experts)
            out = out.to(delta.dtype) + delta
        else:  # the pairs of its rows alone; to count them a GPU is waited for, as it is for more pairs than experts
            mine = here.any(1)[rows].nonzero()[:, 0]
            delta = expert_delta(x[mine], ids[mine], gates[mine], a, b.t(), experts)
            out = out.to(delta.dtype).index_add(0, mine, delta)
    return out.to(y.dtype)


def in_parameters(bank: AdapterBank, wrappers: Iterable[ParamWrapper], selection: Selection) -> Adapt:
    """The selection row by row, with PEFT's own parameters, so that every gradient is there."""
    by_name = {wrapper.parameter_name: wrapper for wrapper in wrappers}

    def adapt(name: str, y: Tensor, x: Tensor, ids: Tensor, tokens: Tensor, total: int) -> Tensor:
        layer = by_name.get(name)
        if layer is None:
            return y
        check_rows(bank, layer._lorafx_site, (total, x.shape[1]), len(selection))
        rows = tokens * len(selection) // total
        out = y
        for adapter in dict.fromkeys(each for row in selection for each, _ in row if each in layer.lora_A):
            weights = [sum(weight for each, weight in row if each == adapter) for row in selection]
            gates = torch.tensor(weights, device=x.device, dtype=torch.float32)[rows] * layer.scaling[adapter]
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            delta = expert_delta(x, ids, gates, a, b.t(), layer.num_experts)
            out = out.to(delta.dtype) + delta
        return out.to(y.dtype)

    return adapt


def traced(wrappers: Iterable[ParamWrapper], names: Mapping[str, str]) -> Adapt:
    """The adapters that PEFT's switches say, with PEFT's own parameters, in a graph. names: of each parameter's site"""
    by_name = {wrapper.parameter_name: wrapper for wrapper in wrappers}

    def adapt(name: str, y: Tensor, x: Tensor, ids: Tensor, tokens: Tensor, total: int) -> Tensor:
        layer = by_name.get(name)
        for adapter in layer.active_adapters if layer is not None else ():
            if adapter in layer.lora_A:
                weights = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                scale, experts = float(layer.scaling[adapter]), layer.num_experts
                y = torch.ops.lorafx.expert_lora.default(y, x, ids, *weights, scale, experts, names[name])
        return y

    return adapt


def _op_forward(y: Tensor, x: Tensor, ids: Tensor, tokens: Tensor, total: int, key: int, site: int) -> Tensor:
    return apply_expert_site(bank_of(key), site, y, x, ids, tokens, total)


set_expert_site_forward(_op_forward)
MARKERS[torch.ops.lorafx.expert_site.default] = _op_forward
