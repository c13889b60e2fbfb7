"""A config for tensors that come without one."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from lorafx.adapters import SiteShape, rank_of
from lorafx.config_fields import NAMES_LIMIT, show
from lorafx.errors import AdapterFormatError, AdapterMismatchError


def infer_config(name: str, shapes: Mapping[str, tuple[int, ...]]) -> LoraConfig:
    """Ranks from shapes; alpha = rank, as diffusers and kohya take it where a file says nothing."""
    ranks = {}
    for key, shape in shapes.items():
        head, mark, _ = key.replace(".lora_embedding_A", ".lora_A").partition(".lora_A")
        if mark and len(shape) in (2, 4):
            ranks[head.removeprefix("base_model.model.").removeprefix("base_model.")] = shape[0]
    if not ranks:
        raise AdapterFormatError(
            f"adapter {name!r}: no '...lora_A...' among the {len(shapes)} names of this state dict, for example"
            f" {show(next(iter(shapes)))}. Expected PEFT's names, as get_peft_model_state_dict gives them."
        )
    if len(ranks) > NAMES_LIMIT:
        raise AdapterFormatError(
            f"adapter {name!r}: a state dict of {len(ranks):,} layers; expected at most {NAMES_LIMIT:,}, or the pair"
            " (state_dict, config)."
        )
    warnings.warn(
        f"adapter {name!r}: a state dict without its config does not say its lora_alpha; alpha = rank (scale 1) is"
        f" assumed. Pass the pair (state_dict, config) to be exact.",
        stacklevel=5,
    )
    bias = any(".lora_B" in key and key.endswith("bias") for key in shapes)
    return config_of_ranks(ranks, ranks, bias, any(".lora_magnitude_vector" in key for key in shapes))


def config_of_shapes(name: str, sites: Mapping[str, SiteShape]) -> LoraConfig:
    """A config that makes PEFT build layers of these shapes. AdapterMismatchError: there is none."""
    biases = {site.bias for site in sites.values()}
    if len(biases) != 1:
        raise AdapterMismatchError(
            f"adapter {name!r} has {'biases on some layers only' if biases else 'no layers'}; on a PeftModel expected"
            " biases on every adapted layer or on none."
        )
    dora = {site.dora for site in sites.values()}
    if len(dora) != 1:
        raise AdapterMismatchError(
            f"adapter {name!r} has DoRA on some layers only; on a PeftModel expected it on every adapted"
            " layer or on none."
        )
    ranks = {path: rank_of(site) for path, site in sites.items()}
    alphas = {path: site.scale * ranks[path] for path, site in sites.items()}
    config = config_of_ranks(ranks, alphas, biases.pop(), dora.pop())
    experts = {path for path, site in sites.items() if site.experts}
    if experts:
        config.target_modules, config.target_parameters = {*ranks} - experts, sorted(experts)
    return config


def config_of_ranks(
    ranks: Mapping[str, int], alphas: Mapping[str, float], bias: bool, dora: bool = False
) -> LoraConfig:
    """A config that gives these layers, by the end of their path, these ranks and alphas."""
    return LoraConfig(
        r=_commonest(ranks),
        lora_alpha=_commonest(alphas),
        target_modules=sorted(ranks),
        rank_pattern=_differing(ranks),
        alpha_pattern=_differing(alphas),
        lora_bias=bias,
        use_dora=dora,
    )


def _commonest(values: Mapping[str, float]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _differing(values: Mapping[str, float]) -> dict[str, Any]:
    """A pattern for each layer that is not as most are: PEFT tries all patterns on all layers.

    The end of a path is what counts, names of old files may lack a prefix; so a path that ends in another comes first.
    """
    common = _commonest(values)
    ends = tuple(f".{path}" for path, value in values.items() if value != common)
    chosen = [path for path, value in values.items() if value != common or path.endswith(ends)]
    return {re.escape(path): values[path] for path in sorted(chosen, key=len, reverse=True)}
