"""Things that few models do, as toys; each was found by ``python -m tests.sweep`` in one of transformers' models."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import lorafx

from .models import EAGER_GRAPH, assert_close, config, noise

WAYS = {
    "to": (lambda x: x.to(torch.float32), [2]),
    "float": (lambda x: x.float(), [2]),
    "twice": (lambda x: x.float().to(dtype=torch.float32), [2]),
    "dropout": (lambda x: nn.functional.dropout(x, 0.1, training=False), [2]),
    "copy": (lambda x: x.to(torch.float32, copy=True), [1, 1]),
    "clone": (lambda x: x.clone(), [1, 1]),
    "rounded": (lambda x: x.bfloat16().float(), [1, 1]),
}


class Pair(nn.Module):
    """As the indexer of DeepSeek-V3.2, which casts its input to the dtype of one layer's weight."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.k, self.weights, self.same = nn.Linear(8, 6), nn.Linear(8, 4), WAYS[way][0]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.tanh(self.k(x)), self.weights(self.same(x))], -1)


@pytest.mark.parametrize("way", WAYS)
def test_siblings_that_read_their_input_through_something_idle(way):
    torch.manual_seed(1)
    reference = get_peft_model(Pair(way), config(target_modules=["k", "weights"])).eval()
    x = noise(3, 5, 8)
    with torch.no_grad():
        want, base = reference(x), Pair(way)(x)
        model = lorafx.compile(reference, options=EAGER_GRAPH)
        assert_close(model(x) - base, want - base)
    report = lorafx.explain(model)
    assert [len(group.branches) for group in report.groups] == WAYS[way][1]
    assert not report.skipped


class Exchanging(nn.Module):
    """As BigBird, whose attention, at its first short input, is another module with the same layers in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.ModuleDict({"q": nn.Linear(8, 8)}), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "exchanged"):
            self.inner, self.exchanged = nn.ModuleDict({"q": self.inner["q"]}), True
        return self.head(torch.tanh(self.inner["q"](x)))


@pytest.mark.parametrize("mode", [None, "eager"])
def test_layers_that_a_forward_puts_in_another_module(mode):
    """They are where they were; the adapters on them can be chosen as before, and PEFT's taking them off is seen."""
    torch.manual_seed(1)
    reference = get_peft_model(Exchanging(), config(target_modules=["q"])).eval()
    model = lorafx.compile(copy.deepcopy(reference), mode=mode, options=EAGER_GRAPH)
    x = noise(3, 5, 8)
    with torch.no_grad():
        want, base = reference(x), Exchanging()(x)
        for _ in range(2):
            assert_close(model(x) - base, want - base)
        names = ["default", "__base__", "default"]
        rows = [want[0], base[1], want[2]]
        assert_close(model(x, adapter_names=names) - base, torch.stack(rows) - base)
        assert not lorafx.explain(model).uncompiled
        model.unload()
        assert_close(model.base_model(x), base)
    assert "taken its layers off" in lorafx.explain(model).uncompiled


class Queries(nn.Module):
    """As DETR's decoder, whose queries begin as zeros, so that the first layer's v adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.k, self.v, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        queries = torch.zeros_like(x)
        return self.out(torch.tanh(self.k(queries + x)) + self.v(queries))


def test_what_reads_zeros_is_proved_on_noise():
    torch.manual_seed(1)
    reference = get_peft_model(Queries(), config(target_modules=["k", "v", "out"])).eval()
    x = noise(3, 5, 8)
    with torch.no_grad():
        want, base = reference(x), Queries()(x)
        model = lorafx.compile(copy.deepcopy(reference), options=EAGER_GRAPH, validate=True)
        assert_close(model(x) - base, want - base)
    report = lorafx.explain(model)
    assert not report.skipped
    assert [graph.passes.proved for graph in report.graphs] == [3]


class Towers(nn.Module):
    """As GLM-OCR: what is one fused layer in one tower stands apart in the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text = nn.ModuleDict({"gate_up_proj": nn.Linear(8, 12)})
        self.picture = nn.ModuleDict({"gate_proj": nn.Linear(12, 6), "up_proj": nn.Linear(12, 6)})

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.text["gate_up_proj"](x))
        return self.picture["gate_proj"](x) * self.picture["up_proj"](x)


@pytest.mark.parametrize("targets", [["gate_up_proj", "gate_proj", "up_proj"], ["gate_proj", "up_proj"]])
def test_layers_that_are_called_as_parts_of_another_towers_fused_layer(targets, tmp_path):
    torch.manual_seed(1)
    reference = get_peft_model(Towers(), config(target_modules=targets)).eval()
    reference.save_pretrained(str(tmp_path))
    x = noise(3, 5, 8)
    with torch.no_grad():
        want, base = reference(x), Towers()(x)
        model = lorafx.compile(Towers(), str(tmp_path), options=EAGER_GRAPH)
        assert_close(model(x) - base, want - base)
    assert sum(len(group.branches) for group in lorafx.explain(model).groups) == len(targets)


class Choosing(nn.Module):
    """As Switch Transformers: each expert is a layer that gets the tokens that were chosen for it, from any row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        flat, out = x.reshape(-1, 8), torch.zeros_like(x.reshape(-1, 8))
        for i, expert in enumerate(self.experts):
            places = torch.where(which.reshape(-1) == i)[0]
            out[places] = expert(flat[places])
        return out.view(x.shape)


@pytest.mark.parametrize("mode", [None, "eager"])
def test_chosen_tokens_are_no_rows_of_the_batch(mode):
    """Six tokens of a batch of three: two of each row, as far as the number goes, and they are three, two and one."""
    torch.manual_seed(1)
    reference = get_peft_model(Choosing(), config(target_modules=["experts.0", "experts.1"])).eval()
    model = lorafx.compile(copy.deepcopy(reference), mode=mode, options=EAGER_GRAPH)
    x, which = noise(3, 4, 8), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    with torch.no_grad():
        assert_close(model(x, which), reference(x, which))
        with pytest.raises(lorafx.UnsupportedModelError, match=r"\[6, 8\] is not known to hold 2 of each"):
            model(x, which, adapter_names=["default", "__base__", "default"])
