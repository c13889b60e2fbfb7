"""PEFT's ``hotswap_adapter`` on layers of ours: with the scales that loading the adapter afresh would give.

peft 0.21.2 looks ``rank_pattern`` and ``alpha_pattern`` up by the names of tensors, where they name layers, so that no
pattern is ever found. The config is gone once the swap is done, so the function that does it is wrapped; on models that
lorafx has not compiled it does what it did.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from peft import LoraConfig, PeftModel
from peft.utils import hotswap
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from lorafx.experts import site_name


def mend(layer_class: type[nn.Module]) -> None:
    """See to it that swaps on layers of this class scale them right. Once is enough."""
    swap = hotswap.hotswap_adapter_from_state_dict
    if hasattr(swap, "_layer_class"):
        return

    @functools.wraps(swap)
    def mended(model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: LoraConfig, *args, **kwargs):
        swap(model, state_dict, adapter_name, config, *args, **kwargs)
        root = model.get_base_model() if isinstance(model, PeftModel) else model
        swapped = {key.partition(".lora_")[0] for key in state_dict}
        prefix = "base_model.model." if isinstance(model, PeftModel) else ""
        for path, layer in root.named_modules():
            if isinstance(layer, layer_class) and prefix + path in swapped:
                hotswap._update_scaling(layer, adapter_name, scale_at(site_name(path, layer), config))

    vars(mended)["_layer_class"] = layer_class
    hotswap.hotswap_adapter_from_state_dict = mended


def scale_at(path: str, config: Any) -> float:
    """What PEFT scales a layer with when it loads an adapter; ``path``: in the base model."""
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), path), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), path), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)
