"""A file of another format as PEFT would have it: which of its tensors are whose A and B, and the config they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from peft import LoraConfig
from torch import Tensor

from lorafx.config_fields import show
from lorafx.errors import AdapterFormatError
from lorafx.inferred_config import config_of_ranks
from lorafx.tensor_files import TensorSet

PREFIX = "base_model.model."  # of the names that PEFT's save_pretrained writes


@dataclass
class Layer:
    """The names in the file of one adapted layer's tensors; alpha: the name of one number, or the number."""

    a: str | None = None
    b: str | None = None
    bias: str | None = None
    alpha: str | float | None = None

    def put(self, name: str, role: str, key: str) -> None:
        """AdapterFormatError: it has one already"""
        if getattr(self, role) is not None:
            raise AdapterFormatError(
                f"adapter {name!r}: {show(getattr(self, role))} and {show(key)} are the same weight under two names;"
                " expected each once. Take one of them out."
            )
        setattr(self, role, key)

    def names(self) -> list[str]:
        named = (self.a, self.b, self.bias, self.alpha)
        return [key for key in named if isinstance(key, str)]


@dataclass(frozen=True)
class Conversion:
    """layers: by the path of the module
    config: what the file says it is; None: it is made of ranks and alphas, alpha = rank where no alpha is given
    invocation: of aLoRA, the token ids at which it begins
    turn: what has to be done to some layers' B ``[out, rank]``, by path
    """

    layers: Mapping[str, Layer]
    config: LoraConfig | None = None
    turn: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    invocation: tuple[int, ...] = ()

    def names(self) -> set[str]:
        """Of all tensors that are needed."""
        return {key for layer in self.layers.values() for key in layer.names()}


def converted(name: str, conversion: Conversion, tensors: TensorSet) -> tuple[LoraConfig, TensorSet]:
    """The config and the tensors with PEFT's names. AdapterFormatError: a layer lacks a part, or its parts don't fit"""
    sources: dict[str, str] = {}
    turns: dict[str, Callable[[Tensor], Tensor]] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, layer in conversion.layers.items():
        ranks[path] = _rank(name, path, layer, tensors.shapes)
        alphas[path] = _alpha(name, layer, tensors, ranks[path])
        sources[f"{PREFIX}{path}.lora_A.weight"] = layer.a
        sources[f"{PREFIX}{path}.lora_B.weight"] = layer.b
        if layer.bias is not None:
            sources[f"{PREFIX}{path}.lora_B.bias"] = layer.bias
        if path in conversion.turn:
            turns[f"{PREFIX}{path}.lora_B.weight"] = conversion.turn[path]
    bias = any(layer.bias is not None for layer in conversion.layers.values())
    config = conversion.config if conversion.config is not None else config_of_ranks(ranks, alphas, bias)
    if conversion.invocation:
        # PEFT looks for them in its class for this task alone
        config.alora_invocation_tokens, config.task_type = list(conversion.invocation), "CAUSAL_LM"

    def take(key: str) -> Tensor:
        tensor = tensors.take(sources[key])
        return turns[key](tensor) if key in turns else tensor

    return config, TensorSet({key: tensors.shapes[source] for key, source in sources.items()}, take)


def _rank(name: str, path: str, layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> int:
    if layer.a is None or layer.b is None:
        there = layer.names()
        raise AdapterFormatError(
            f"adapter {name!r}: of {path} it has {show(there[0]) if there else 'nothing'} only; expected both of its"
            " matrices. The file is not whole: download it again."
        )
    a, b = shapes[layer.a], shapes[layer.b]
    convolution = len(a) == len(b) == 4 and tuple(b[2:]) == (1, 1)
    if not (len(a) == len(b) == 2 or convolution) or a[0] != b[1]:
        raise AdapterFormatError(
            f"adapter {name!r}: {show(layer.a)} has shape {list(a)[:8]} and {show(layer.b)} has {list(b)[:8]};"
            " expected [rank, in] and [out, rank], of a convolution [rank, in, height, width] and [out, rank, 1, 1]."
        )
    return a[0]


def _alpha(name: str, layer: Layer, tensors: TensorSet, rank: int) -> float:
    value: float = rank if layer.alpha is None else layer.alpha
    if isinstance(layer.alpha, str):
        value = tensors.take(layer.alpha).item()
    if not math.isfinite(value):
        raise AdapterFormatError(
            f"adapter {name!r}: the alpha of {show(layer.a)} is {value}; expected a finite number. The file is damaged."
        )
    return int(value) if value == int(value) else value
