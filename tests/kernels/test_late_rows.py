"""Which positions of a row have their adapter, held to PEFT's own mask where that takes the shape, else to loops."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import nn

from lorafx.kernels.late_rows import keep_base
from lorafx.routing import EVERYWHERE, MAX_ROWS

LAST = [3, 0, EVERYWHERE, 1, 6]


def tables(last):
    filled = torch.full((MAX_ROWS,), EVERYWHERE, dtype=torch.int64)
    filled[: len(last)] = torch.tensor(last)
    return filled, torch.tensor(len(last))


def kept(shape, last=LAST):
    return keep_base([torch.ones(shape)], [torch.zeros(shape)], *tables(last))[0]


class Layer(nn.Module):
    """What PEFT's variant asks a layer for; its adapter adds 1 everywhere."""

    def __init__(self):
        super().__init__()
        self.lora_A, self.lora_B = nn.ModuleDict({"a": nn.Linear(2, 1)}), nn.ModuleDict({"a": nn.Linear(1, 4)})
        self.lora_dropout, self.scaling = nn.ModuleDict({"a": nn.Identity()}), {"a": 1.0}
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        nn.init.ones_(self.lora_B["a"].bias)


@pytest.mark.parametrize("positions", [1, 2, 5, 8])
def test_pefts_mask(positions):
    x, zeros = torch.randn(5, positions, 2), torch.zeros(5, positions, 4)
    offsets = [None if last == 0 else last for last in LAST]
    with torch.no_grad():
        want = ALoraLinearVariant.forward(Layer(), "a", x, zeros, alora_offsets=offsets)
    assert torch.equal(kept((5, positions, 4)), want)
    assert torch.equal(kept((5 * positions, 4)), want.view(-1, 4))  # the same rows, flattened
    assert torch.equal(kept((5, positions, 2, 4)), want.unsqueeze(2).expand(-1, -1, 2, -1))


def test_one_entry_and_repeated_ones():
    assert kept((4, 6, 1), [2]).sum(1).flatten().tolist() == [2, 2, 2, 2]
    assert kept((6, 6, 1), [2, 0, 4]).sum(1).flatten().tolist() == [2, 2, 0, 0, 4, 4]
    assert kept((6, 1), [2]).flatten().tolist() == [0, 0, 0, 0, 1, 1]
    assert kept((3,), [1]).tolist() == [1, 1, 1]
    assert kept((3,), [0]).tolist() == [0, 0, 0]


def test_what_is_off_is_not_looked_at():
    outs, ys = torch.full((2, 3, 4), torch.nan), torch.randn(2, 3, 4)
    assert torch.equal(keep_base([outs], [ys], *tables([0, 0]))[0], ys)
