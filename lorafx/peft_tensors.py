"""The parameters of PEFT's LoRA layers, wherever a kind of layer keeps them, and what they are as rank rows.

A linear layer, a convolution and a wrapper around a parameter have modules with weights, an embedding has bare
parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from lorafx.adapters import Magnitude, SiteWeights


def names_on(layer: LoraLayer) -> Iterable[str]:
    """The adapters that stand on this layer."""
    return layer.lora_embedding_A.keys() if has_bare_parameters(layer) else layer.lora_A.keys()


def has_bare_parameters(layer: LoraLayer) -> bool:
    return isinstance(layer.get_base_layer(), nn.Embedding)


def parameters_of(layer: LoraLayer, name: str) -> dict[str, nn.Parameter]:
    """ "A", "B", and "bias" where there is one, as PEFT shapes them."""
    if has_bare_parameters(layer):
        return {"A": layer.lora_embedding_A[name], "B": layer.lora_embedding_B[name]}
    a, b = layer.lora_A[name], layer.lora_B[name]
    found = {"A": a.weight, "B": b.weight, "bias": getattr(b, "bias", None)}
    return {role: parameter for role, parameter in found.items() if parameter is not None}


def all_parameters(layer: LoraLayer) -> Iterator[nn.Parameter]:
    for name in names_on(layer):
        yield from parameters_of(layer, name).values()


def weights_of(layer: LoraLayer, name: str) -> SiteWeights:
    """The adapter ``name`` of this layer; the weights are the parameters' own memory."""
    tensors = {role: parameter.detach() for role, parameter in parameters_of(layer, name).items()}
    a, b = (flattened(tensors[role]) for role in "AB")
    magnitude = None
    if name in layer.lora_magnitude_vector:  # DoRA
        own = [layer.lora_magnitude_vector[name], layer.lora_A[name], layer.lora_B[name]]
        magnitude = Magnitude(own[0].weight.detach(), tuple(module._parameters for module in own))
    experts = layer.num_experts if isinstance(layer, ParamWrapper) else 0
    return SiteWeights(a, b, tensors.get("bias"), float(layer.scaling[name]), magnitude, experts)


def flattened(weight: Tensor) -> Tensor:
    """A convolution's weight as a matrix: a view."""
    return weight.flatten(1) if weight.dim() > 2 else weight


def shaped(matrix: Tensor, like: Tensor) -> Tensor:
    """A matrix as PEFT shapes the parameter ``like``: a view, whatever its strides are.

    ``matrix``: ``[rank, in]`` with rows in one piece, or ``[out, rank]``; the kernel of a convolution's B is 1 x 1
    """
    if matrix.dim() == like.dim():
        return matrix
    return matrix[:, :, None, None] if tuple(like.shape[2:]) == (1, 1) else matrix.view(-1, *like.shape[1:])
