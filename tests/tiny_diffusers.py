"""The same as ``tiny_models`` for diffusers, whose models have no config class: the defaults of ``__init__`` say it."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.tiny_models import MOST_PARAMETERS, ROWS, asked, filled, noise, shrunk


def types() -> list[str]:
    """Every model class; those of autoencoders and controls, of which few have adapters, at the end."""
    from diffusers import ModelMixin, models

    classes = [value for value in vars(models).values() if isinstance(value, type)]  # what was asked for so far
    classes = [getattr(models, name) for name in dir(models)] + classes
    found = {c.__name__ for c in classes if isinstance(c, type) and issubclass(c, ModelMixin) and c is not ModelMixin}
    return sorted(found, key=lambda name: ("Transformer" not in name and "UNet" not in name, "Control" in name, name))


def class_names(name: str) -> list[str]:
    return [name]


def build(_: str, name: str, recipe: int, seed: int = 0) -> nn.Module:
    """As ``tiny_models.build``."""
    from diffusers import models

    made = getattr(models, name)
    defaults = {
        k: p.default for k, p in inspect.signature(made.__init__).parameters.items() if p.default is not p.empty
    }
    fields = shrunk(defaults, recipe)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in made(**fields).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count:,} parameters; expected at most {MOST_PARAMETERS:,}")
    torch.manual_seed(seed)
    return filled(made(**fields).eval())


def inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """As ``tiny_models.inputs``."""
    arguments = inspect.signature(model.forward).parameters
    required = [name for name, p in arguments.items() if p.default is p.empty]
    usual = [name for name in MAKERS if name in arguments]
    for names in (usual, required):
        if not any(name not in MAKERS for name in names):
            for values in itertools.islice(itertools.product(*(MAKERS[name](model.config) for name in names)), 128):
                yield dict(zip(names, values, strict=True))


def _latents(config: Any) -> list[Tensor]:
    channels = asked(config, "in_channels", "in_dim", "embedding_dim", "in_visual_dim", default=4)
    sizes = [(channels, 8, 8), (6, channels), (channels, 2, 8, 8), (2, channels, 8, 8)]
    return [noise(ROWS, *size) for size in sizes]


def _text(config: Any) -> list[Tensor]:
    names = ("joint_attention_dim", "cross_attention_dim", "text_dim", "caption_channels", "text_embed_dim")
    names += ("caption_dim", "in_text_dim", "encoder_hid_dim", "text_embed_dim", "cross_attention_input_dim")
    return [noise(ROWS, 5, asked(config, *names, default=32))]


def _pooled(config: Any) -> list[Tensor]:
    return [noise(ROWS, asked(config, "pooled_projection_dim", "in_text_dim2", default=32))]


MAKERS: Mapping[str, Any] = {
    "hidden_states": _latents,
    "sample": _latents,
    "encoder_hidden_states": _text,
    "timestep": lambda config: [torch.arange(ROWS) * 7 + 3, torch.linspace(0.2, 0.9, ROWS)],
    "pooled_projections": _pooled,
    "guidance": lambda config: [torch.ones(ROWS)],
    "img_ids": lambda config: [torch.arange(18.0).view(6, 3), torch.zeros(6, 4)],
    "txt_ids": lambda config: [torch.zeros(5, 3), torch.zeros(5, 4)],
    "encoder_attention_mask": lambda config: [torch.ones(ROWS, 5, dtype=torch.long)],
    "class_labels": lambda config: [torch.arange(ROWS)],
}
