"""How much memory tensors take."""

from __future__ import annotations

import gc

import torch


def tensor_bytes() -> int:
    """Of all tensors that are alive on the CPU, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu" and thing.layout == torch.strided:
            try:
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
            except (RuntimeError, NotImplementedError):  # fake tensors have none
                continue
    return sum(storages.values())
