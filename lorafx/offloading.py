"""Weights that accelerate brings in and out around each layer's call are not where fused ops would read them."""

from __future__ import annotations

from torch import nn

from lorafx.errors import UnsupportedModelError


def check_in_place(model: nn.Module, root: nn.Module) -> None:
    """``root`` is what ``model`` wraps, or the same.

    UnsupportedModelError: weights are offloaded, or accelerate has spread them over devices.
    """
    devices = {parameter.device: path for path, parameter in root.named_parameters()}
    meta = next((path for device, path in devices.items() if device.type == "meta"), None)
    if meta is not None:
        raise UnsupportedModelError(
            f"{meta} is on the meta device: offloaded by accelerate, or moved there. lorafx runs models whose weights"
            " are in the memory of one device: load it with device_map={'': device}, or take accelerate's hooks off"
            " with accelerate.hooks.remove_hook_from_submodules. lorafx.uncompile gives a compiled one back."
        )
    if len(devices) > 1 and any("_hf_hook" in vars(module) for module in (model, root)):
        raise UnsupportedModelError(
            f"accelerate has spread this model over {', '.join(map(str, devices))}; lorafx runs models on one device:"
            " load it with device_map={'': device}."
        )
