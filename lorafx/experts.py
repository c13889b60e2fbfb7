"""Parameters that PEFT adapts (``target_parameters``): which can be, and what their sites are called.

All experts of a layer are one module with weights ``[experts, out, in]``. PEFT puts a ``ParamWrapper`` around it for
each adapted weight, one around the other. A site is called by its weight, ``model.layers.0.mlp.experts.down_proj``:
which wrapper is the outer one is PEFT's affair. Their router has a weight ``[experts, in]``, a linear layer's
(``linear_parameters.py``); to PEFT, that is one of a single expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from lorafx.errors import AdapterFormatError, AdapterMismatchError
from lorafx.linear_parameters import is_linear_weight

FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed")  # of transformers' use_experts_implementation
ORDER = ("gate_up_proj", "up_proj", "down_proj")  # as transformers registers them; PEFT wraps the first one first
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def site_name(path: str, layer: nn.Module) -> str:
    """The name of the site of PEFT's ``layer`` at ``path``: that path, but for a wrapper around a parameter."""
    if not isinstance(layer, ParamWrapper):
        return path
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return f"{path}.{layer.parameter_name}"


def layer_at(root: nn.Module, site: str) -> nn.Module:
    """The layer of this site: a module, or PEFT's wrapper around a parameter. AttributeError: there is none"""
    parent, _, name = site.rpartition(".")
    holder = root.get_submodule(parent)
    for wrapper in wrappers_from(holder):
        if wrapper.parameter_name == name:
            return wrapper
    return root.get_submodule(site)


def wrappers_from(layer: nn.Module) -> Iterator[ParamWrapper]:
    """``layer`` and what it wraps, from outside in, while they are wrappers around parameters."""
    while isinstance(layer, ParamWrapper):
        yield layer
        layer = layer.base_layer


def module_of(root: nn.Module, site: str) -> nn.Module:
    """The module whose parameter is adapted at ``site``, without PEFT's wrappers."""
    holder = root.get_submodule(site.rpartition(".")[0])
    return holder.get_base_layer() if isinstance(holder, ParamWrapper) else holder


def widths_at(root: nn.Module, site: str) -> tuple[int, int, int] | None:
    """(in, out, experts) of a parameter that can be adapted; None: there is none of that name"""
    try:
        module = module_of(root, site)
    except AttributeError:
        return None
    name = site.rpartition(".")[2]
    if why_not(module, name) is not None:
        return None
    weight = module._parameters[name]
    if weight.dim() == 2:
        return weight.shape[1], weight.shape[0], 1
    experts, out, width = weight.shape
    return (out, width, experts) if module.is_transposed else (width, out, experts)


def why_not(module: nn.Module, parameter: str) -> str | None:
    """Why lorafx can't run LoRA on this parameter; None if it can.

    The weight of a linear layer is known by what the forward does with it. The forward of experts is known where
    transformers itself may exchange it (``use_experts_implementation``): its products are then those of
    ``transformers/integrations/moe.py``.
    """
    weight = module._parameters.get(parameter)
    linear = weight is not None and weight.dim() == 2 and is_linear_weight(module, parameter)
    experts = weight is not None and weight.dim() == 3 and all(flag in vars(module) for flag in FLAGS)
    if not linear and not experts:
        return f"{parameter} of a {type(module).__name__} (target_parameters), whose products lorafx does not know"
    if weight.dtype not in DTYPES:
        return f"{parameter} in {weight.dtype}"
    if vars(module).get("forward") is not forward_of_ours(module):
        return f"{parameter} of a {type(module).__name__} that something has put another forward on"
    return _why_no_experts(module, parameter) if experts else None


def _why_no_experts(module: nn.Module, parameter: str) -> str | None:
    if not hasattr(type(module).forward, "__wrapped__") or not hasattr(type(module), "_apply_gate"):
        return f"{parameter} of a {type(module).__name__}, which has a forward of its own"
    if parameter not in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        return f"{parameter} of a {type(module).__name__}, which is no product of its"
    if getattr(module, "_is_expert_parallel", False):
        return f"{parameter} of experts that are spread over devices"
    return None


def is_of_experts(root: nn.Module, site: str) -> bool:
    """Whether this site is a weight of experts, and not that of a linear layer."""
    try:
        parameter = module_of(root, site)._parameters.get(site.rpartition(".")[2])
    except AttributeError:
        return False
    return parameter is not None and parameter.dim() == 3


def check_named(name: str, root: nn.Module, config: LoraConfig) -> None:
    """AdapterFormatError: this config targets experts as a layer, as one that is made up for a state dict alone does"""
    experts = [path for path, module in root.named_modules() if all(flag in vars(module) for flag in FLAGS)]
    for path in experts if config.target_modules else []:
        if check_target_module_exists(config, path):
            raise AdapterFormatError(
                f"adapter {name!r} is for {path}, the experts of a layer: which of their weights it adapts stands in"
                " its config alone. Expected them in target_parameters of that: pass the pair (state_dict, config), or"
                " a PEFT folder."
            )


def named_as(name: str, parameters: Iterable[str], others: Iterable[LoraConfig]) -> list[str]:
    """``target_parameters`` of adapter ``name`` as the other adapters on the model call the same weights: PEFT compares
    the names.

    AdapterMismatchError: they adapt others
    """
    wanted = sorted(parameters)
    for theirs in (sorted(other.target_parameters) for other in others if other.target_parameters):
        of_each = [[end for end in theirs if f".{path}".endswith(f".{end}")] for path in wanted]
        if not all(of_each) or {end for ends in of_each for end in ends} != {*theirs}:
            raise AdapterMismatchError(
                f"adapter {name!r} adapts the weights {wanted}, the others on this PeftModel {theirs}: PEFT takes"
                " adapters of the same weights only. Compile the base model without PEFT, which takes any."
            )
        return theirs
    return wanted


def forward_of_ours(module: nn.Module) -> object | None:
    """What lorafx has put in the place of this module's ``forward``, if it has."""
    forward = vars(module).get("forward")
    return forward if hasattr(type(forward), "_lorafx_parameters") else None


def why_not_wrapped(layer: nn.Module) -> str | None:
    """The same for PEFT's layer; None also where it is another kind of layer."""
    if not isinstance(layer, ParamWrapper):
        return None
    return why_not(layer.get_base_layer(), layer.parameter_name)


def parted(layers: Mapping[str, nn.Module]) -> list[str]:
    """Wrappers around one that is not among ``layers``: what runs the outer one runs the inner one too."""
    ours = {id(layer) for layer in layers.values()}
    return [path for path, layer in layers.items() if any(id(inner) not in ours for inner in wrappers_from(layer))]


__all__ = [
    "check_named",
    "forward_of_ours",
    "is_of_experts",
    "layer_at",
    "module_of",
    "named_as",
    "parted",
    "site_name",
    "why_not",
    "why_not_wrapped",
    "widths_at",
    "wrappers_from",
]
