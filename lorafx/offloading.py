"""Weights that accelerate brings in and out around each layer's call are not where fused ops would read them."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorafx.errors import UnsupportedModelError


def hook_of(root: nn.Module) -> Any:
    """What accelerate has put around the model itself, as it does whenever it spreads or offloads one."""
    return vars(root).get("_hf_hook")


def check_in_place(root: nn.Module) -> None:
    """UnsupportedModelError: weights are offloaded, or accelerate has spread them over devices."""
    devices = {parameter.device: path for path, parameter in root.named_parameters()}
    meta = next((path for device, path in devices.items() if device.type == "meta"), None)
    if meta is not None:
        raise UnsupportedModelError(
            f"{meta} is on the meta device: offloaded by accelerate, or moved there. lorafx runs models whose weights"
            " are in the memory of one device: load it with device_map={'': device}, or take accelerate's hooks off"
            " with accelerate.hooks.remove_hook_from_submodules. lorafx.uncompile gives a compiled one back."
        )
    if hook_of(root) is not None and len(devices) > 1:
        raise UnsupportedModelError(
            f"accelerate has spread this model over {', '.join(map(str, devices))}; lorafx runs models on one device:"
            " load it with device_map={'': device}."
        )
