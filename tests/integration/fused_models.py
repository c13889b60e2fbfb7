"""A Phi3 with the weights of a Llama: the same model, with q, k and v, and gate and up, in one layer each."""

from __future__ import annotations

import torch
from torch import nn

from .models import FAMILIES, LLAMA

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@torch.no_grad()
def fused_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """``LLAMA.build()``, fused."""
    llama, phi = LLAMA.build(dtype=dtype), FAMILIES["phi3"].build(dtype=dtype)
    state = llama.state_dict()
    for path, _ in phi.named_modules():
        parent, _, name = path.rpartition(".")
        for part in FUSED.get(name, ()):
            state.setdefault(f"{path}.weight", []).append(state.pop(f"{parent}.{part}.weight"))
    joined = {key: torch.cat(value) if isinstance(value, list) else value for key, value in state.items()}
    phi.load_state_dict(joined)
    for module in phi.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = llama.config.rms_norm_eps
    return phi
