"""What is in an adapter: read from its files alone, one tensor at a time, and judged without its model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lorafx.adapter_config import check_config, read_fields, unsupported
from lorafx.config_fields import show
from lorafx.errors import AdapterFormatError
from lorafx.experts import ORDER
from lorafx.folder_files import open_folder
from lorafx.sources import load_source
from lorafx.tensor_files import TensorSet

PREFIX = "base_model.model."
USUAL_SCALES = 1 / 32, 32  # alpha / rank; most are 1 or 2
EXAMPLES = 3
TRIES_LIMIT = 1 << 22  # of a pattern of the config on a name
PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
}
WRAPPED = ".base_layer"
BASE = f"{WRAPPED}.weight"  # PEFT saves that of an adapted embedding or output head too


@dataclass
class Layer:
    """One adapted layer: what the config says of it, and its tensors by part ("A", "B", "bias").

    path: of the layer, or of a parameter (``target_parameters``), which all experts may share: each of them has as many
    rank rows as the rank is
    """

    path: str
    expected_rank: int
    alpha: float
    scale: float
    shapes: dict[str, tuple[int, ...]]
    is_parameter: bool = False
    ranks: tuple[int, ...] = ()  # that it may have, where it is one of several parameters and names don't say which
    keys: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    bytes: int = 0

    @property
    def rank(self) -> int:
        if not self.is_parameter or self.rows in self.expected:
            return self.rows
        return next((rank for rank in self.expected if self.rows % rank == 0), self.rows)

    @property
    def expected(self) -> tuple[int, ...]:
        """The ranks that the config may mean."""
        return self.ranks or (self.expected_rank,)

    @property
    def rows(self) -> int:
        return self.shapes["A"][0] if "A" in self.shapes else self.shapes["B"][1]

    @property
    def features(self) -> str:
        """in->out; of a convolution channelsxheightxwidth->out"""
        a, b = self.shapes.get("A"), self.shapes.get("B")
        return f"{'x'.join(map(str, a[1:])) if a else '?'}->{b[0] if b else '?'}"


@dataclass
class Contents:
    """layers: by path; left_to_peft: what it uses that lorafx does not run; problems: what is wrong with it;
    notes: what is unusual, and may be meant"""

    path: str
    config: LoraConfig
    tensors: int
    layers: dict[str, Layer]
    left_to_peft: list[str]
    problems: list[str]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "path": self.path,
            "base_model": self.config.base_model_name_or_path,
            "rank": self.config.r,
            "alpha": self.config.lora_alpha,
            "rslora": bool(self.config.use_rslora),
            "tensors": self.tensors,
            "bytes": sum(layer.bytes for layer in self.layers.values()),
            "layers": [
                {"path": layer.path, "rank": layer.rank, "rows": layer.rows, "alpha": layer.alpha, "scale": layer.scale}
                | {"shapes": {part: list(shape) for part, shape in layer.shapes.items()}}
                | {"dtypes": layer.dtypes, "bytes": layer.bytes}
                for layer in self.layers.values()
            ],
            "left_to_peft": self.left_to_peft,
            "problems": self.problems,
            "notes": self.notes,
        }

    def table(self) -> list[dict[str, Any]]:
        """One row for each kind of layer: those that differ in their place in the model alone are counted."""
        kinds: Counter[tuple] = Counter()
        sizes: Counter[tuple] = Counter()
        for layer in self.layers.values():
            target = layer.path.rpartition(".")[2]
            dtypes = ", ".join(dict.fromkeys(layer.dtypes.values()))
            kind = (target, layer.features, layer.rank, layer.alpha, layer.scale, dtypes)
            kinds[kind] += 1
            sizes[kind] += layer.bytes
        names = ("target", "in->out", "rank", "alpha", "scale", "dtype")
        return [
            dict(zip(names, (*kind[:3], *(f"{number:g}" for number in kind[3:5]), kind[5]), strict=True))
            | {"layers": count, "bytes": sizes[kind]}
            for kind, count in kinds.items()
        ]


def read_contents(path: Path) -> Contents:
    """Everything that can be said of the adapter at ``path`` without its model.

    AdapterFormatError: not an adapter that can be read, or no LoRA adapter
    """
    name = path.name or str(path)
    features: dict[str, str] = {}
    if path.is_dir() or not path.exists():
        fields = read_fields(name, path)
        features = unsupported(fields)
        config = check_config(name, {key: value for key, value in fields.items() if key not in features})
        tensors = open_folder(name, path)
    else:
        config, tensors = load_source(name, path)
    patterns = [config.rank_pattern, config.alpha_pattern]
    if config.target_parameters:
        patterns += [config.target_parameters, config.target_modules or "", config.modules_to_save or ""]
    tries = sum(map(len, patterns)) * len(tensors.shapes)
    if tries > TRIES_LIMIT:
        raise AdapterFormatError(
            f"adapter {name!r} has {len(tensors.shapes):,} tensors and so many patterns in its config that they take"
            f" {tries:,} tries; expected at most {TRIES_LIMIT:,}"
        )
    layers, others = _sort(tensors.shapes, config)
    contents = Contents(str(path), config, len(tensors.shapes), layers, list(features.values()), [], [])
    contents.problems += _wrong_shapes(layers)
    kinds = {"use_dora": "DoRA", "modules_to_save": "modules_to_save", "trainable_token_indices": "trainable tokens"}
    extra = [kind for field, kind in kinds.items() if getattr(config, field)]
    contents.notes += [f"it uses {kind}" for kind in extra]
    if config.alora_invocation_tokens:
        contents.notes.append(f"it is aLoRA: it begins at the tokens {show(config.alora_invocation_tokens)}")
    if config.target_parameters:
        contents.notes.append(f"it adapts parameters (target_parameters): {_some(sorted(config.target_parameters))}")
    if others:
        text = f"{len(others)} tensor(s) that are no LoRA weights, such as {_some(others[:1])}"
        # which bring tensors of their own
        if features or extra or all(key.endswith(BASE) for key in others):
            contents.notes.append(text)
        else:
            contents.problems.append(text)
    _look_at_numbers(contents, tensors, others)
    scales = {layer.scale for layer in layers.values()}
    low, high = USUAL_SCALES
    if unusual := sorted(scale for scale in scales if not low <= abs(scale) <= high):
        contents.notes.append(f"an unusual scale (alpha / rank): {unusual[0]:g}; most adapters have 1 or 2")
    return contents


def _sort(shapes: Mapping[str, tuple[int, ...]], config: LoraConfig) -> tuple[dict[str, Layer], list[str]]:
    """The layers that these tensors are of, and the names of those that are of none."""
    layers: dict[str, Layer] = {}
    others = []
    ends = {key: next((end for end in PARTS if key.endswith(end)), None) for key in shapes}
    paths = {key.removesuffix(end).removeprefix(PREFIX) for key, end in ends.items() if end is not None}
    parameters = _parameters(paths, config)
    for key, shape in shapes.items():
        end = ends[key]
        if end is None or len(shape) not in ((1,) if PARTS[end] == "bias" else (2, 4)):
            others.append(key)
            continue
        own = key.removesuffix(end).removeprefix(PREFIX)
        path = parameters.get(own, own)
        if path not in layers:
            ranks = _ranks_at(_unwrapped(path), config) if parameters.get(own) == own else ()
            layers[path] = Layer(path, *_from_config(path, config), {}, own in parameters, ranks)
        layers[path].shapes[PARTS[end]], layers[path].keys[PARTS[end]] = shape, key
    return layers, others


def _parameters(paths: set[str], config: LoraConfig) -> dict[str, str]:
    """Of the paths that are PEFT's wrappers around parameters: what the config calls these.

    One wrapper stands around the other. In which order only the model says, but for experts, whose weights are ORDER's:
    other parameters of one module are left as PEFT's path has them.
    """
    if not config.target_parameters:
        return {}
    wrappers: dict[str, list[str]] = {}
    for path in sorted(paths, key=len):  # from outside in
        wrappers.setdefault(_unwrapped(path), []).append(path)
    found = {}
    for module, here in wrappers.items():
        names = _named_at(module, config)
        if len(names) == len(here) and (len(here) == 1 or names <= {*ORDER}):
            outside_in = sorted(names, key=ORDER[::-1].index) if len(here) > 1 else names
            found.update(zip(here, (f"{module}.{name}" for name in outside_in), strict=True))
        elif names:
            found.update((path, path) for path in here)
    return found


def _unwrapped(path: str) -> str:
    """The module that PEFT's wrappers around its parameters stand around."""
    while path.endswith(WRAPPED):
        path = path.removesuffix(WRAPPED)
    return path


def _ranks_at(module: str, config: LoraConfig) -> tuple[int, ...]:
    """Those of the module's parameters that ``target_parameters`` names."""
    return tuple(sorted({_from_config(f"{module}.{name}", config)[0] for name in _named_at(module, config)}))


def _named_at(module: str, config: LoraConfig) -> set[str]:
    """The parameters of ``module`` that ``target_parameters`` names, by the end of their paths as PEFT does."""
    if check_target_module_exists(config, module):
        return set()
    ends = [target.rpartition(".") for target in config.target_parameters]
    return {name for parent, _, name in ends if not parent or f".{module}".endswith(f".{parent}")}


def _from_config(path: str, config: LoraConfig) -> tuple[int, float, float]:
    """Rank, alpha and scale, as PEFT's LoraModel takes them from the patterns, and LoraLayer makes a scale of them."""
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), path), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), path), config.lora_alpha)
    return rank, alpha, alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _wrong_shapes(layers: Mapping[str, Layer]) -> Iterator[str]:
    if not layers:
        yield f"no LoRA weights in it; expected names such as {PREFIX}...q_proj.lora_A.weight"
    halves = {path for path, layer in layers.items() if not {"A", "B"} <= layer.shapes.keys()}
    if halves:
        yield f"{len(halves)} layer(s) with an A or a B only, such as {_some(sorted(halves))}"
    whole = {path: layer for path, layer in layers.items() if path not in halves}
    if unequal := {path for path, layer in whole.items() if layer.shapes["A"][0] != layer.shapes["B"][1]}:
        yield f"{len(unequal)} layer(s) whose A and B differ in rank, such as {_some(sorted(unequal))}"
    if other := [path for path in whole if path not in unequal and layers[path].rank not in layers[path].expected]:
        first = layers[other[0]]
        what = f"{first.rows} rank rows, no multiple of what" if first.is_parameter else f"rank {first.rank},"
        yield (
            f"{len(other)} layer(s) whose rank is not what the config says, such as {_some(other[:1])}: its weights"
            f" have {what} the config says {' or '.join(map(str, first.expected))}"
        )


def _look_at_numbers(contents: Contents, tensors: TensorSet, others: list[str]) -> None:
    """Reads every tensor, one at a time."""
    damaged, zero = [], []
    for key in others:
        if not torch.isfinite(tensors.take(key)).all():
            damaged.append(key)
    for path, layer in contents.layers.items():
        for part, key in layer.keys.items():
            tensor = tensors.take(key)
            layer.dtypes[part] = str(tensor.dtype).removeprefix("torch.")
            layer.bytes += tensor.numel() * tensor.element_size()
            if not torch.isfinite(tensor).all():
                damaged.append(key)
            if part == "B" and not tensor.any():
                zero.append(path)
    if damaged:
        contents.problems.append(f"NaN or Inf in {len(damaged)} tensor(s), such as {_some(damaged)}")
    if zero:
        all_ = len(zero) == len(contents.layers)
        what = "every layer" if all_ else f"{len(zero)} of {len(contents.layers)} layers, such as {_some(zero)}"
        contents.notes.append(f"B is zero in {what}: {'untrained, it changes nothing' if all_ else 'untrained there'}")


def _some(names: list[str]) -> str:
    return ", ".join(repr(name)[:120] for name in names[:EXAMPLES])


__all__ = ["Contents", "Layer", "read_contents"]
