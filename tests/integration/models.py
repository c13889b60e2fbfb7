"""Adapters for tiny models, and the plain PEFT model that every result is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

import lorafx

from .families import FAMILIES as FAMILIES
from .families import LLAMA as LLAMA
from .families import TOKENS as TOKENS
from .families import VOCABULARY as VOCABULARY
from .families import Family as Family
from .families import noise as noise
from .families import tokens as tokens

EAGER_GRAPH = {"inductor": False}  # the rewritten graph, run as it is

# ------------------------------------------------------------------------------------------------ adapters


def config(**values: Any) -> LoraConfig:
    """An adapter with a B that is not zero and the dropout that published adapters have."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "init_lora_weights": False, **values})


def save_adapter(family: Family, path: Path, seed: int = 0, layers: int | None = None, **values: Any) -> str:
    """A PEFT folder with one adapter, made and written by PEFT."""
    model = family.build(layers)
    torch.manual_seed(100 + seed)
    get_peft_model(model, config(**values)).save_pretrained(str(path))
    return str(path)


def save_adapters(
    family: Family, folder: Path, layers: int | None = None, **configs: Mapping[str, Any]
) -> dict[str, str]:
    """name -> folder, for name -> fields of LoraConfig."""
    return {
        name: save_adapter(family, Path(folder) / name, seed, layers, **values)
        for seed, (name, values) in enumerate(configs.items())
    }


def three_adapters(family: Family, folder: Path, layers: int | None = None, **common: Any) -> dict[str, str]:
    """Different ranks, scales and targets."""
    return save_adapters(
        family,
        folder,
        layers,
        a={"r": 4, "target_modules": list(family.qkv[:1]), **common},
        b={"r": 7, "lora_alpha": 10, "target_modules": list(family.qkv), **common},
        c={"r": 16, "target_modules": "all-linear", **common},
    )


def with_peft(model: nn.Module, folders: Mapping[str, Any]) -> PeftModel:
    """``model`` with these adapters loaded by PEFT, in eval mode; the first is active."""
    names = list(folders)
    peft_model = PeftModel.from_pretrained(model, folders[names[0]], adapter_name=names[0])
    for name in names[1:]:
        peft_model.load_adapter(folders[name], adapter_name=name)
    return peft_model.eval()


def adapted_layers(peft_model: nn.Module) -> set[str]:
    """Paths, in the base model, of every layer that PEFT adapted, and of every parameter."""
    root = peft_model.get_base_model()
    return {site_of(path, module) for path, module in root.named_modules() if isinstance(module, LoraLayer)}


def site_of(path: str, layer: nn.Module) -> str:
    """The path of an adapted layer, or of the parameter that PEFT has wrapped."""
    return f"{path.partition('.base_layer')[0]}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else path


# ------------------------------------------------------------------------------------------------ comparing


def main_output(output: Any) -> Tensor:
    """Logits, a sample, the embeddings of two towers, or the last hidden state of a model without a head."""
    if "text_embeds" in output:
        return torch.cat([output.text_embeds, output.image_embeds], -1)
    return next(output[name] for name in ("logits", "sample", "last_hidden_state") if name in output)


@torch.no_grad()
def run(model: nn.Module, inputs: Mapping[str, Tensor], adapter_names: Any = None) -> Tensor:
    extra = {} if adapter_names is None else {"adapter_names": adapter_names}
    return main_output(model(**inputs, **extra)).clone()


def difference(got: Tensor, want: Tensor) -> float:
    """rel-L2"""
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm())


def assert_close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert difference(got, want) <= tolerance


def compiled_llama(folders: Mapping[str, Any], layers: int | None = None, **arguments: Any) -> Any:
    """A tiny Llama with these adapters; the rewritten graph is run without Inductor."""
    arguments.setdefault("options", EAGER_GRAPH)
    return lorafx.compile(LLAMA.build(layers), dict(folders), **arguments)
