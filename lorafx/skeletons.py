"""What PEFT would do with an adapter's file, found out on a model without memory.

PEFT knows which layers a config targets, what ``rank_pattern``, ``alpha_pattern`` and rsLoRA make of ranks and scales,
and how the names in old files map to a model of transformers 5. So the adapter is loaded into a skeleton: the model's
modules on the meta device. What is loaded there first are meta tensors of the file's names and shapes, each of which
can be told from all others; where they are found afterwards is where the file's tensors belong (``plans.py``). Where
PEFT makes new tensors of the file's, the real ones take the same way.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from lorafx.adapted import is_supported, other_variants
from lorafx.adapters import Magnitude, SiteWeights
from lorafx.errors import AdapterFormatError, AdapterMismatchError
from lorafx.experts import check_named, forward_of_ours, site_name, why_not_wrapped
from lorafx.layer_kinds import why_not
from lorafx.peft_tensors import parameters_of, weights_of
from lorafx.quantised import is_quantised, stand_in
from lorafx.saved_modules import has_rows, suitable_wrappers
from lorafx.token_rows import ROWS

PREFIX = "base_model.model."  # of the names that PEFT's save_pretrained writes
NAME = "default"  # of the adapter on a skeleton: what it is called in the end makes no difference
MESSAGE_LIMIT = 1000  # letters of what PEFT says, which may name every tensor of a file
SIZES = re.compile(r"size mismatch for (\S+): copying .*?Size\((\[.*?\])\).*?Size\((\[.*?\])\)")  # as torch says it


@dataclass(frozen=True)
class Loaded:
    """A skeleton after PEFT has loaded tensors into it.

    layers: the adapted ones, by path; base: weights of the base model that were replaced, by their path there; saved:
    tensors of copied modules, by the module's path, by name; tokens: those whose rows of the module's weight they are
    """

    layers: Mapping[str, PeftLinear]
    base: Mapping[str, Tensor]
    saved: Mapping[str, Mapping[str, Tensor]]
    tokens: Mapping[str, Tensor]


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with every weight on the meta device and no adapters: its modules, none of its memory.

    Quantised layers become plain ones of their sizes: PEFT then asks for none of their packages.
    """
    memo: dict[int, Any] = {id(module): stand_in(module) for module in model.modules() if is_quantised(module)}
    tensors = [t for m in model.modules() if id(m) not in memo for t in (*m._parameters.values(), *m._buffers.values())]
    for tensor in filter(lambda tensor: tensor is not None, tensors):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty.detach()
        )
    for attribute in ("lora", "generate", "_lorafx_runtime"):  # what lorafx has put on it
        if vars(model).get(attribute) is not None:
            memo[id(vars(model)[attribute])] = None
    for module in model.modules():
        for hook in (*module._forward_hooks.values(), forward_of_ours(module)):
            memo[id(hook)] = None
    bare = copy.deepcopy(model, memo)
    for module in bare.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        if vars(module).get("forward", module) is None:
            del vars(module)["forward"]
    adapted = [path for path, module in bare.named_modules() if isinstance(module, LoraLayer)]
    for path in adapted:
        if not path.startswith(tuple(f"{outer}." for outer in adapted)):
            bare.set_submodule(path, bare.get_submodule(path).get_base_layer())
    for path, module in list(bare.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):  # copies that adapters have: of no other adapter's concern
            bare.set_submodule(path, module.original_module)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        vars(bare).pop(attribute, None)
    return bare


def load_onto(name: str, bare: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor]) -> Loaded:
    """What PEFT makes of ``tensors`` on the skeleton ``bare``, which is used up.

    The tensors are put there as they are: of meta tensors nothing but where they went can be seen.

    AdapterFormatError: it adapts layers that lorafx does not run. AdapterMismatchError: does not fit the model.
    """
    check_named(name, bare, config)
    config = copy.deepcopy(config)
    config.inference_mode = True
    config.init_lora_weights = False  # what would be drawn here is overwritten by the file
    with _said_by_peft(name, bare, "target_modules that name layers of this model"), torch.device("meta"):
        inject_adapter_in_model(config, bare, adapter_name=NAME)
    layers, wrappers = _adapted_layers(name, bare), _wrappers(name, bare)
    before = _named_tensors(bare)
    vars(bare)["load_state_dict"] = partial(nn.Module.load_state_dict, bare, assign=True)
    try:
        with _said_by_peft(name, bare, "the shapes of this model"):
            result = set_peft_model_state_dict(bare, _without_prefix(name, bare, wrappers, tensors), adapter_name=NAME)
    finally:
        del vars(bare)["load_state_dict"]
    ours = (".lora_", ".modules_to_save.")
    missing = [key for key in result.missing_keys if any(map(key.__contains__, ours)) and f".{NAME}." in f"{key}."]
    if result.unexpected_keys or missing:
        raise _mismatch(
            name,
            bare,
            "; ".join(
                f"{len(keys)} tensor(s) {what}, for example {keys[0]!r}"
                for what, keys in (
                    ("that this model has no layer for", result.unexpected_keys),
                    ("missing in the file", missing),
                )
                if keys
            )
            + ".",
            "the tensors of the layers that its config targets: is it a config that does not belong to the file",
        )
    saved = {path: _tensors_in(wrapper) for path, wrapper in wrappers.items()}
    tokens = {path: _tokens_in(wrapper) for path, wrapper in wrappers.items() if has_rows(wrapper)}
    lora = {id(parameter) for parameter in lora_parameters(layers).values()}
    lora |= {id(tensor) for tensors in saved.values() for tensor in tensors.values()}
    base = {
        key.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", "."): tensor
        for key, tensor in _named_tensors(bare).items()
        if tensor is not before[key] and id(tensor) not in lora
    }
    return Loaded(layers, base, saved, tokens)


def _tensors_in(wrapper: AuxiliaryTrainingWrapper) -> dict[str, Tensor]:
    if has_rows(wrapper):
        return {ROWS: wrapper.token_adapter.trainable_tokens_delta[NAME]}
    return wrapper.modules_to_save[NAME].state_dict(keep_vars=True)


def _tokens_in(wrapper: TrainableTokensWrapper) -> Tensor:
    return torch.tensor(wrapper.token_adapter.token_indices[NAME], dtype=torch.int64, device="cpu")


def check_base(name: str, root: nn.Module, base: Mapping[str, Tensor]) -> None:
    """Nothing, where the file's weights of the base model are the model's own.

    AdapterMismatchError: PEFT would change the model that other adapters share
    """
    for path, tensor in base.items():
        module_path, _, attribute = path.rpartition(".")
        module = root.get_submodule(module_path)
        own = getattr(module.get_base_layer() if isinstance(module, LoraLayer) else module, attribute)
        if own.is_meta:
            raise AdapterMismatchError(
                f"adapter {name!r} brings {path}, a weight of the base model, and this model is on the meta device,"
                " without numbers to compare it with. Pass the model with its weights, or save the adapter with"
                " save_embedding_layers=False."
            )
        if own.shape != tensor.shape or not torch.equal(own, tensor.to(own.device, own.dtype)):
            raise AdapterMismatchError(
                f"adapter {name!r} brings {path}, a weight of the base model, and it is not the model's own. Expected"
                " LoRA weights only, or equal base weights: other adapters share them. Save the adapter with"
                " save_embedding_layers=False, or load it with PEFT and pass the PeftModel."
            )


def weights_on(loaded: Loaded) -> dict[str, SiteWeights]:
    """What stands in the adapted layers now."""
    return {path: _alone(weights_of(layer, NAME)) for path, layer in loaded.layers.items()}


def _alone(site: SiteWeights) -> SiteWeights:
    """Without the skeleton's modules."""
    return site if site.magnitude is None else replace(site, magnitude=Magnitude(site.magnitude.weight))


def _adapted_layers(name: str, bare: nn.Module) -> dict[str, PeftLinear]:
    layers: dict[str, PeftLinear] = {}
    for path, module in bare.named_modules():
        if isinstance(module, LoraLayer):
            kinds = other_variants(module)
            if not is_supported(module) or kinds:
                what = " with ".join([type(module).__name__, *kinds])
                raise AdapterFormatError(
                    f"adapter {name!r} adapts {path}, which PEFT makes a {what} of; lorafx runs LoRA on"
                    " linear layers, embeddings, Conv2d and the weights of experts and routers, DoRA and aLoRA on"
                    " linear layers. Load it with PEFT and pass the PeftModel: that layer then stays as PEFT has it."
                )
            if reason := why_not_wrapped(module) or why_not(module.get_base_layer()):
                raise AdapterFormatError(
                    f"adapter {name!r} adapts {path}, {reason}; lorafx does not run that. Load it with PEFT and pass"
                    " the PeftModel: that layer then stays as PEFT has it."
                )
            layers[site_name(path, module)] = module
    if not layers:
        raise _mismatch(name, bare, "its config targets no layer.", "target_modules that name layers of this model")
    return layers


def _wrappers(name: str, bare: nn.Module) -> dict[str, AuxiliaryTrainingWrapper]:
    wrappers, unsuitable = suitable_wrappers(bare)
    for path, wrapper in wrappers.items():
        if has_rows(wrapper):
            _check_tokens(name, bare, path, wrapper)
    for path, reason in unsuitable.items():
        raise AdapterFormatError(
            f"adapter {name!r} brings its own {path}: {reason}. Load it with PEFT and pass the PeftModel: that module"
            " then stays as PEFT has it."
        )
    return wrappers


def _check_tokens(name: str, bare: nn.Module, path: str, wrapper: TrainableTokensWrapper) -> None:
    """AdapterMismatchError: rows that the weight has not"""
    there, named = wrapper.original_module.weight.shape[0], wrapper.token_adapter.token_indices[NAME]
    if beyond := [token for token in named if token >= there]:
        got = f"its trainable_token_indices name token {beyond[0]}, {path} has {there} rows."
        raise _mismatch(name, bare, got, "tokens of this model's vocabulary")


def _without_prefix(
    name: str, bare: nn.Module, wrappers: Mapping[str, AuxiliaryTrainingWrapper], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """``tensors``, those of copied modules named as PEFT looks for them on a model without its own class around it."""
    named = dict(tensors)
    for path, wrapper in wrappers.items():
        for key in wrapper.adapter_state_dict_load_map(NAME):
            plain = f"{path}.{key}"
            if plain not in named and PREFIX + plain not in named:
                got = f"{PREFIX + plain!r} is missing in the file."
                raise _mismatch(name, bare, got, "every tensor of the modules that its config saves")
            if plain not in named:
                named[plain] = named.pop(PREFIX + plain)
    return named


def lora_parameters(layers: Mapping[str, PeftLinear]) -> dict[tuple[str, str], nn.Parameter]:
    found = {}
    for path, layer in layers.items():
        found.update({(path, role): parameter for role, parameter in parameters_of(layer, NAME).items()})
        if NAME in layer.lora_magnitude_vector:
            found[path, "magnitude"] = layer.lora_magnitude_vector[NAME].weight
    return found


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


@contextmanager
def _said_by_peft(name: str, bare: nn.Module, expected: str) -> Iterator[None]:
    """PEFT raises whatever its code trips over. What it was given was checked, so that means: it does not fit."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise _mismatch(name, bare, _in_short(str(error)) or type(error).__name__, expected) from error


def _in_short(said: str) -> str:
    """Of many sizes that don't fit the first one, as a sentence."""
    sizes = SIZES.findall(said)
    if not sizes:
        return said[:MESSAGE_LIMIT]
    (layer, theirs, ours), more = sizes[0], f", and {len(sizes) - 1} more" if len(sizes) > 1 else ""
    return f"size mismatch for {layer[:MESSAGE_LIMIT]}: the adapter has {theirs}, this model {ours}{more}."


def _mismatch(name: str, bare: nn.Module, got: str, expected: str) -> AdapterMismatchError:
    return AdapterMismatchError(
        f"adapter {name!r} does not fit {type(bare).__name__}: {got} Expected: {expected}. Is it an adapter of another"
        " model?"
    )
