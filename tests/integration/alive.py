"""How much memory tensors take."""

from __future__ import annotations

import gc

import torch


def tensor_bytes() -> int:
    """Of all tensors that are alive on the CPU, each storage once; tracing's fake ones have no memory."""
    for _ in range(2):  # what the first one finalizes may let go of more
        gc.collect()
    storages = {}
    for thing in gc.get_objects():
        plain = type(thing) in (torch.Tensor, torch.nn.Parameter) and not torch._is_functional_tensor(thing)
        if plain and thing.device.type == "cpu" and thing.layout == torch.strided:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())
