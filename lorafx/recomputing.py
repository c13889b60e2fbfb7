"""Layers that the backward computes again (gradient checkpointing), when the call that chose adapters is over."""

from __future__ import annotations

from torch import nn

from lorafx.errors import UnsupportedModelError


def recomputed_layer(root: nn.Module) -> str | None:
    """The path of the first layer under gradient checkpointing; None where there is none."""
    for path, module in root.named_modules():
        if module.training and getattr(module, "gradient_checkpointing", False):
            return path or type(root).__name__
    return None


def check_not_recomputed(root: nn.Module, late: bool = False) -> None:
    """A compiled graph hands the routing of its call on to its backward; layers that run eagerly have none there.

    late: the call uses aLoRA adapters, however they were chosen

    UnsupportedModelError: ``root`` has layers under gradient checkpointing
    """
    path = recomputed_layer(root)
    if path is None:
        return
    if late:
        raise UnsupportedModelError(
            f"{path} is under gradient checkpointing and runs eagerly, so the backward computes it again when the"
            " prompt of this call is gone, which says where its aLoRA adapter begins. Compile the model (any mode but"
            " 'eager'), or call gradient_checkpointing_disable()."
        )
    raise UnsupportedModelError(
        f"{path} is under gradient checkpointing and runs eagerly, or has adapted experts, so the backward computes it"
        " again when the adapter_names of this call are gone. Choose with model.lora.use, and keep to it until after"
        " the backward."
    )
