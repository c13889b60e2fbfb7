"""Reads an adapter, from a PEFT folder or from memory, through PEFT's own loader.

PEFT knows which layers a config targets, what ``rank_pattern``, ``alpha_pattern`` and rsLoRA make of ranks and scales,
and how the names in old files map to a model of transformers 5. So the file is loaded into a skeleton of the model that
has the same modules and no weights, and the adapted layers are read off it. Nothing of the model itself is touched.
"""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftType, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lorafx.adapters import AdapterWeights, SiteWeights
from lorafx.errors import AdapterFormatError, AdapterMismatchError
from lorafx.peft_layers import AdaptedLinear

CONFIG_NAME = "adapter_config.json"

# Fields of LoraConfig that change what a layer computes or which weights it has, with what they are when unused.
UNSUPPORTED = {
    "use_dora": "DoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "use_bdlora": "BD-LoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "use_qalora": "QALoRA",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "target_parameters",
    "layer_replication": "layer replication",
    "megatron_config": "Megatron",
}
# Initialisations that rewrite the base weight: the file alone does not say what the base has become.
REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

Source = Any  # a path, a state dict, or (state dict, config)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with every weight on the meta device: its modules and names, none of its memory."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty.detach()
        )
    for attribute in ("lora", "generate", "_lorafx_runtime"):  # what lorafx has put on the model holds the bank
        if attribute in vars(model):
            memo[id(vars(model)[attribute])] = None
    for module in model.modules():
        for hook in module._forward_hooks.values():
            memo[id(hook)] = None
    bare = copy.deepcopy(model, memo)
    for module in bare.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return bare


def read_adapter(name: str, source: Source, bare: nn.Module, dtype: torch.dtype) -> AdapterWeights:
    """The adapter at ``source`` as it would stand on the model whose ``skeleton`` is ``bare`` (which is used up).

    source: a folder with adapter_config.json and adapter_model.safetensors (or .bin, read with weights_only), a
        (state dict, config) pair, or a state dict alone, whose alpha is then taken to be its rank
    dtype: of the weights returned, on the CPU

    AdapterFormatError: not a LoRA adapter that can be read. AdapterMismatchError: does not fit the model.
    """
    config, tensors = load_source(name, source)
    config = copy.deepcopy(config)
    config.inference_mode = True
    config.init_lora_weights = False  # what would be drawn here is overwritten by the file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, bare, adapter_name=name, low_cpu_mem_usage=True)
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterMismatchError(
            f"adapter {name!r} does not fit {type(bare).__name__}: {error} Expected: target_modules that name layers of"
            " this model. Is it an adapter of another model?"
        ) from error
    layers = _adapted_layers(name, bare)
    for layer in layers.values():
        for module in (layer.lora_A[name], layer.lora_B[name]):
            module.to(dtype).to_empty(device="cpu")
    return _fill(name, bare, layers, tensors)


def load_source(name: str, source: Source) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and the tensors at ``source``, of a kind that lorafx runs. AdapterFormatError: they are not."""
    config, tensors = _load(name, source)
    _check_kind(name, config)
    return config, tensors


def _load(name: str, source: Source) -> tuple[LoraConfig, dict[str, Tensor]]:
    if isinstance(source, (str, os.PathLike)):
        return _load_folder(name, Path(source))
    if isinstance(source, tuple) and len(source) == 2:
        tensors, config = source if isinstance(source[0], Mapping) and _is_tensors(source[0]) else source[::-1]
        if isinstance(config, Mapping):
            config = _config_from(name, dict(config))
        if isinstance(config, PeftConfig) and isinstance(tensors, Mapping) and _is_tensors(tensors):
            return config, dict(tensors)
    elif isinstance(source, Mapping) and _is_tensors(source):
        return _infer_config(name, source), dict(source)
    raise AdapterFormatError(
        f"adapter {name!r}: got {type(source).__name__}; expected the path of a PEFT folder, a state dict of tensors,"
        " or a pair (state dict, LoraConfig or dict)."
    )


def _is_tensors(value: Mapping) -> bool:
    return bool(value) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _load_folder(name: str, path: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    if not (path / CONFIG_NAME).is_file():
        found = "no such folder" if not path.exists() else f"there is no {CONFIG_NAME} in it"
        raise AdapterFormatError(
            f"adapter {name!r}: {str(path)!r} is not an adapter: {found}. Expected a folder that PEFT's save_pretrained"
            f" wrote: {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}."
        )
    try:
        kind = PeftConfig._get_peft_type(str(path))
        config = PeftConfig.from_pretrained(str(path)) if kind == "LORA" else None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise AdapterFormatError(f"adapter {name!r}: {path / CONFIG_NAME} can't be read: {error}") from error
    if config is None:
        raise AdapterFormatError(f"adapter {name!r}: {str(path)!r} holds a {kind} adapter; lorafx runs LORA adapters.")
    safe, pickled = path / SAFETENSORS_WEIGHTS_NAME, path / WEIGHTS_NAME
    try:
        if safe.is_file():
            return config, load_file(safe, device="cpu")
        if pickled.is_file():
            return config, torch.load(pickled, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise AdapterFormatError(
            f"adapter {name!r}: the weights in {str(path)!r} can't be read ({error}). The file is cut short or damaged:"
            " copy or download it again."
        ) from error
    raise AdapterFormatError(
        f"adapter {name!r}: {str(path)!r} has no weights; expected {SAFETENSORS_WEIGHTS_NAME} beside {CONFIG_NAME}."
    )


def _config_from(name: str, values: dict[str, Any]) -> LoraConfig:
    try:
        known = {k: v for k, v in values.items() if k in LoraConfig.__dataclass_fields__}
        return LoraConfig(**known)
    except (TypeError, ValueError) as error:
        raise AdapterFormatError(f"adapter {name!r}: its config is not a LoraConfig: {error}") from error


def _infer_config(name: str, tensors: Mapping[str, Tensor]) -> LoraConfig:
    """Ranks from shapes; alpha = rank, as diffusers and kohya take it where a file says nothing."""
    ranks = {}
    for key, tensor in tensors.items():
        head, mark, _ = key.partition(".lora_A")
        if mark and tensor.dim() == 2:
            ranks[head.removeprefix("base_model.model.").removeprefix("base_model.")] = tensor.shape[0]
    if not ranks:
        raise AdapterFormatError(
            f"adapter {name!r}: no '...lora_A...' among the {len(tensors)} names of this state dict, for example"
            f" {next(iter(tensors))!r}. Expected PEFT's names, as get_peft_model_state_dict gives them."
        )
    warnings.warn(
        f"adapter {name!r}: a state dict without its config does not say its lora_alpha; alpha = rank (scale 1) is"
        f" assumed. Pass the pair (state_dict, config) to be exact.",
        stacklevel=5,
    )
    # an anchored pattern for each layer: names of old files may lack a prefix, so the end is what counts
    patterns = {path.replace(".", r"\."): rank for path, rank in ranks.items()}
    return LoraConfig(
        r=next(iter(ranks.values())),
        lora_alpha=next(iter(ranks.values())),
        target_modules=sorted(ranks),
        rank_pattern=patterns,
        alpha_pattern=patterns,
        lora_bias=any(".lora_B" in key and key.endswith("bias") for key in tensors),
    )


def _check_kind(name: str, config: PeftConfig) -> None:
    if config.peft_type != PeftType.LORA or not isinstance(config, LoraConfig):
        raise AdapterFormatError(f"adapter {name!r} is of type {config.peft_type}; lorafx runs LORA adapters.")
    init = config.init_lora_weights
    reasons = [label for field, label in UNSUPPORTED.items() if getattr(config, field, None)]
    if config.bias != "none":
        reasons.append(f"bias={config.bias!r}, which replaces biases of the base model")
    if isinstance(init, str) and init.startswith(REWRITES_BASE):
        reasons.append(f"init_lora_weights={init!r}, which rewrites the base weights")
    if init == "mica":
        reasons.append("MiCA")
    if reasons:
        raise AdapterFormatError(
            f"adapter {name!r} uses {', '.join(reasons)}: lorafx can't run that from a file yet. Load it with PEFT and"
            " pass the PeftModel: such layers then stay exactly as PEFT computes them."
        )


def _adapted_layers(name: str, bare: nn.Module) -> dict[str, PeftLinear]:
    layers: dict[str, PeftLinear] = {}
    for path, module in bare.named_modules():
        if isinstance(module, LoraLayer) and (name in module.lora_A or name in module.lora_embedding_A):
            if type(module) not in (PeftLinear, AdaptedLinear) or name in module.lora_variant:
                raise AdapterFormatError(
                    f"adapter {name!r} adapts {path}, which PEFT makes a {type(module).__name__} of; lorafx runs LoRA"
                    " on linear layers. Load it with PEFT and pass the PeftModel: that layer then stays as PEFT has it."
                )
            layers[path] = module
    return layers


def _fill(name: str, bare: nn.Module, layers: dict[str, PeftLinear], tensors: dict[str, Tensor]) -> AdapterWeights:
    try:
        result = set_peft_model_state_dict(bare, tensors, adapter_name=name)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise AdapterMismatchError(
            f"adapter {name!r} does not fit {type(bare).__name__}: {error} Expected the shapes of this model: is the"
            " adapter one of another model?"
        ) from error
    unexpected = list(result.unexpected_keys)
    missing = [key for key in result.missing_keys if ".lora_" in key and f".{name}." in f"{key}."]
    if unexpected or missing:
        raise AdapterMismatchError(
            f"adapter {name!r} does not fit {type(bare).__name__}: "
            + "; ".join(
                f"{len(keys)} tensor(s) {what}, for example {keys[0]!r}"
                for what, keys in (("that this model has no layer for", unexpected), ("missing in the file", missing))
                if keys
            )
            + ". Is it an adapter of another model, or a config that does not belong to the file?"
        )
    adapter = AdapterWeights(
        name,
        {
            path: SiteWeights(
                layer.lora_A[name].weight.detach(),
                layer.lora_B[name].weight.detach(),
                None if layer.lora_B[name].bias is None else layer.lora_B[name].bias.detach(),
                float(layer.scaling[name]),
            )
            for path, layer in layers.items()
        },
    )
    adapter.check_finite()
    return adapter
