"""Modules with adapted parameters, which lorafx runs in the place of their own forward.

Experts by transformers' products (``expert_layers.py``), others, such as their router, by their own forward, watched
(``linear_parameters.py``), with a site behind the linear layer in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from lorafx.adapted import ADAPTED, PLAIN, Adapted, needs_gradients
from lorafx.bank import AdapterBank
from lorafx.errors import UnsupportedModelError
from lorafx.expert_layers import in_bank, in_parameters, run_experts, traced
from lorafx.experts import is_of_experts, wrappers_from
from lorafx.linear_parameters import Watching
from lorafx.selection import Selection
from lorafx.sites import apply_site

Then = Callable[[str, Tensor, Tensor], Tensor]  # (parameter, y, x) -> y


def behind_linear(bank: AdapterBank, sites: Mapping[str, int]) -> Then:
    """What ``Watching`` puts behind a linear layer. sites: by parameter"""

    def then(name: str, y: Tensor, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.lorafx.site.default(y, x, bank.key, sites[name])
        return apply_site(bank, sites[name], y, x)

    return then


def behind_with_parameters(wrappers: Iterable[ParamWrapper], selection: Selection) -> Then:
    """The same with PEFT's own parameters, so that every gradient is there."""
    by_name = {wrapper.parameter_name: wrapper for wrapper in wrappers}
    return lambda name, y, x: by_name[name]._added_to(y, selection, x)


def traced_behind(wrappers: Iterable[ParamWrapper]) -> Then:
    """The adapters that PEFT's switches say, as PEFT's linear layers spell them, for the branch finder."""
    by_name = {wrapper.parameter_name: wrapper for wrapper in wrappers}

    def then(name: str, y: Tensor, x: Tensor) -> Tensor:
        layer, out = by_name[name], y
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                out = out + layer._delta(adapter, x) * layer.scaling[adapter]
        return out.to(y.dtype)

    return then


class AdaptedParameter(Adapted, ParamWrapper):
    """PEFT's LoRA on a parameter. The outermost wrapper runs the module, for all of them."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("adapter_names") is not None:
            return super(Adapted, self).forward(x, *args, **kwargs)
        wrappers = list(wrappers_from(self))
        compiling, bank = torch.compiler.is_compiling(), self._lorafx_bank
        gradients = any(needs_gradients(wrapper) for wrapper in wrappers)
        if not compiling and (bank.chosen is None or self.disable_adapters):
            return super(Adapted, self).forward(x, *args, **kwargs)
        if compiling and gradients and (self.disable_adapters or self.merged):
            return super(Adapted, self).forward(x, *args, **kwargs)
        if not compiling:
            self._check_unmerged(wrappers)
        module, sites = self.get_base_layer(), {wrapper.parameter_name: wrapper._lorafx_site for wrapper in wrappers}
        if self.get_param().dim() == 3:
            if not gradients:
                adapt = in_bank(bank, sites)
            elif compiling:
                adapt = traced(wrappers, {name: bank.store.sites[site].name for name, site in sites.items()})
            else:
                adapt = in_parameters(bank, wrappers, bank.chosen)
            return run_experts(module, x, *args, **kwargs, adapt=adapt)
        if not gradients:
            then = behind_linear(bank, sites)
        else:
            then = traced_behind(wrappers) if compiling else behind_with_parameters(wrappers, bank.chosen)
        with Watching({name: getattr(module, name) for name in sites}, then):
            return module(x, *args, **kwargs)

    def _check_unmerged(self, wrappers: Iterable[ParamWrapper]) -> None:
        merged = dict.fromkeys(name for wrapper in wrappers for name in wrapper.merged_adapters)
        if merged:
            raise UnsupportedModelError(
                f"{', '.join(merged)} is merged into the base weights, which every row reads;"
                " unmerge_adapter() before choosing adapters with model.lora.use or adapter_names."
            )


class ParameterForward:
    """The ``forward`` of a module of a plain model. sites: by parameter; a new store changes them"""

    _lorafx_parameters = True

    def __init__(self, module: nn.Module, bank: AdapterBank) -> None:
        self.module, self.bank = module, bank
        self.sites: dict[str, int] = {}


class ExpertsForward(ParameterForward):
    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        adapt = in_bank(self.bank, self.sites)
        return run_experts(self.module, hidden_states, top_k_index, top_k_weights, adapt)


class LinearForward(ParameterForward):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        weights = {name: getattr(self.module, name) for name in self.sites}
        with Watching(weights, behind_linear(self.bank, self.sites)):
            return type(self.module).forward(self.module, *args, **kwargs)


def attach(root: nn.Module, bank: AdapterBank, sites: Iterable[str]) -> None:
    """Have the modules of these sites run by lorafx, and those of no site by themselves again."""
    wanted: dict[str, dict[str, int]] = {}
    for path in sites:
        module, _, parameter = path.rpartition(".")
        wanted.setdefault(module, {})[parameter] = bank.store.index[path]
    for path, module in root.named_modules():
        if path not in wanted:
            detach(module, bank)
    for path, parameters in wanted.items():
        module = root.get_submodule(path)
        if not isinstance(vars(module).get("forward"), ParameterForward):
            experts = any(is_of_experts(root, f"{path}.{name}") for name in parameters)
            vars(module)["forward"] = (ExpertsForward if experts else LinearForward)(module, bank)
        vars(module)["forward"].sites = parameters


def detach(module: nn.Module, bank: AdapterBank) -> None:
    """Undo ``attach`` on one module."""
    forward = vars(module).get("forward")
    if isinstance(forward, ParameterForward) and forward.bank is bank:
        del vars(module)["forward"]


AdaptedParameter.__name__ = ParamWrapper.__name__  # by which PEFT itself looks for wrappers
ADAPTED[ParamWrapper] = AdaptedParameter
PLAIN[AdaptedParameter] = ParamWrapper
