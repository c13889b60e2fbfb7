"""Layers that the backward computes again (gradient checkpointing), when the call that chose adapters is over."""

from __future__ import annotations

from torch import nn

from lorafx.errors import UnsupportedModelError


def check_not_recomputed(root: nn.Module) -> None:
    """A compiled graph hands the routing of its call on to its backward; layers that run eagerly have none there.

    UnsupportedModelError: ``root`` has layers under gradient checkpointing
    """
    for path, module in root.named_modules():
        if module.training and getattr(module, "gradient_checkpointing", False):
            raise UnsupportedModelError(
                f"{path or type(root).__name__} is under gradient checkpointing and runs eagerly, or has adapted"
                " experts, so the backward computes it again when the adapter_names of this call are gone. Choose with"
                " model.lora.use, and keep to it until after the backward."
            )
