"""Sets up each contender of the CPU benchmark, once, for its time and for its memory; checks what it computes."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

import lorafx
from benchmarks.cpu_cases import BASE, BASE_EAGER, IDLE, LORAFX, MERGED, PEFT_COMPILED, POLYLORA, Entry
from benchmarks.forward_pass import (
    ALL,
    LLAMA_8B,
    TINY,
    Case,
    Past,
    make_base,
    make_step,
    past_of,
    sharing,
    with_adapters,
)

# rel-L2 of a row's logits. In bfloat16 the base model itself is up to 1.3e-2 off at 30 layers, more than adapters of a
# trained one's size change, so these have to be stronger there to be seen.
LIMIT = {torch.float32: 5e-4, torch.bfloat16: 0.03}
STRENGTH = {torch.float32: 0.1, torch.bfloat16: 4.0}  # half of it where all layers are adapted


class ContenderError(Exception):
    """A contender computes something else than the others: its time would say nothing."""


@dataclass(frozen=True)
class Contender:
    """step: one forward pass, returns logits, takes further arguments of the model; nbytes: of parameters, buffers and
    lorafx's bank; None where it keeps them elsewhere"""

    step: Callable[..., Tensor]
    nbytes: int | None


def load_base(name: str, layers: int | None, dtype: torch.dtype) -> PreTrainedModel:
    """``smollm2``, the demo's model, ``llama-8b``, one layer of that shape, or ``tiny``, for tests."""
    if name == "llama-8b":
        return make_base(layers or 1, LLAMA_8B, "cpu", dtype, vocabulary=256)
    if name == "tiny":
        return make_base(layers or 2, TINY, "cpu", dtype, vocabulary=256)
    from demo.model import load

    model, _ = load()  # float32: transformers would keep another dtype's weights packed as they are in the file
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = len(model.model.layers)
    return model


def nbytes_of(model: nn.Module) -> int:
    """Of parameters and buffers, shared ones once, and of lorafx's bank."""
    held = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    bank = getattr(model, "lora", None)
    return sum(held.values()) + (bank.nbytes if bank is not None else 0)


def available(kind: str) -> bool:
    return kind != POLYLORA or importlib.util.find_spec("polylora") is not None


def visible(forward: Case, base: PreTrainedModel) -> Case:
    """With adapters that change the logits by more than rounding does."""
    return replace(forward, strength=STRENGTH[base.dtype] / (2 if forward.targets == ALL else 1))


def peft_names(forward: Case) -> dict[str, list[str]]:
    """What PEFT is told: with one adapter, nothing, since it is active."""
    if len(forward.ranks) == 1 or forward.in_use == 0:
        return {}
    return {"adapter_names": [name or "__base__" for name in forward.names]}


class Workshop:
    """Makes contenders around one base model, whose parameters they share.

    inductor: False runs the traced graphs as they are, which is quick to set up and slow to run: for tests
    """

    def __init__(self, base: PreTrainedModel, inductor: bool = True) -> None:
        self.base, self.inductor = base, inductor
        self.lorafx_model = lru_cache(maxsize=None)(self._lorafx_model)  # idle or not, it is the same one
        self.past = lru_cache(maxsize=None)(self._past)

    def make(self, entry: Entry) -> Contender:
        forward, kind = entry.forward, entry.kind
        if kind in (BASE, BASE_EAGER):
            model = sharing(self.base)
            if kind == BASE:
                self.compile(model)
            return self._contender(model, forward)
        if kind in (LORAFX, IDLE):
            idle = kind == IDLE
            model = self.lorafx_model(replace(forward, in_use=None))
            names = [None] * forward.rows if idle else forward.names
            return self._contender(model, forward, adapter_names=names)
        if kind == MERGED:
            model = with_adapters(copy.deepcopy(self.base), forward).merge_and_unload()
            self.compile(model)
            return self._contender(model, forward)
        model = with_adapters(sharing(self.base), forward)
        if kind == PEFT_COMPILED:
            self.compile(model.get_base_model())
        if kind == POLYLORA:
            return self._polylora(model, forward)
        return self._contender(model, forward, **peft_names(forward))

    def compile(self, model: nn.Module) -> None:
        model.compile(dynamic=False, backend="inductor" if self.inductor else "eager")

    def adapters(self, forward: Case) -> dict[str, tuple[dict[str, Tensor], object]]:
        """As PEFT would save them: what lorafx is given."""
        peft = with_adapters(sharing(self.base), forward)
        return {
            name: (get_peft_model_state_dict(peft, adapter_name=name), config)
            for name, config in peft.peft_config.items()
        }

    def _lorafx_model(self, forward: Case) -> nn.Module:
        options = None if self.inductor else {"inductor": False}
        return lorafx.compile(sharing(self.base), self.adapters(forward), dynamic=False, options=options)

    def _polylora(self, peft: nn.Module, forward: Case) -> Contender:
        from polylora import PolyLoraConfig, PolyLoraModel

        config = PolyLoraConfig(len(forward.ranks), max(forward.ranks), list(forward.targets))
        model = PolyLoraModel(sharing(self.base), config).eval()
        for name in peft.peft_config:
            model.add_adapter_from_peft_model(name, peft)
        names = [name or "__base__" for name in forward.names]
        past = self.past(forward.rows)
        return Contender(make_step(self.base, forward, model, past, adapter_ids=names, **_last_only(forward)), None)

    def _past(self, rows: int) -> Past:
        """In the base's dtype, so that the reference sees the same."""
        past = past_of(copy.deepcopy(self.base).double(), rows)
        return [(keys.to(self.base.dtype), values.to(self.base.dtype)) for keys, values in past]

    def _contender(self, model: nn.Module, forward: Case, **more: object) -> Contender:
        step = make_step(model, forward, past=self.past(forward.rows), **more, **_last_only(forward))
        return Contender(step, nbytes_of(model))


def _last_only(forward: Case) -> dict[str, Any]:
    """generate wants no other logits of a prefill either."""
    return {} if forward.tokens == 1 else {"logits_to_keep": 1}


class Reference:
    """PEFT in float64, run eagerly: what every contender of ``forward`` is held against."""

    def __init__(self, workshop: Workshop, forward: Case) -> None:
        base = workshop.base
        self.limit = LIMIT[base.dtype]
        self.rows = torch.tensor([name is not None for name in forward.names])
        more = {"past": workshop.past(forward.rows), **_last_only(forward)}
        self.base = make_step(copy.deepcopy(base).double(), forward, **more)()
        self.adapted = self.base
        if self.rows.any():
            exact = with_adapters(copy.deepcopy(base), forward).double()  # drawn in float32 first, as the others are
            self.adapted = make_step(exact, forward, **peft_names(forward), **more)()
            weakest = distances(self.adapted, self.base)[self.rows].min().item()
            if weakest < 1.5 * self.limit:
                raise ContenderError(f"an adapter changes the logits by {weakest:.1e} only; too little to see it lost")

    def check(self, entry: Entry, logits: Tensor) -> float:
        """Distance of the worst row. ContenderError: too far"""
        plain = entry.kind in (BASE, BASE_EAGER, IDLE)
        worst = distances(logits, self.base if plain else self.adapted).max().item()
        if not worst <= self.limit:
            raise ContenderError(
                f"{entry.name} is {worst:.1e} (rel-L2 of the worst row's logits) away from"
                f" {'the base' if plain else 'PEFT'} in float64; expected at most {self.limit:.0e}"
            )
        return worst


def distances(logits: Tensor, reference: Tensor) -> Tensor:
    """Of each row, rel-L2. A tensor: its ``max`` keeps a NaN, Python's loses it."""
    rows, exact = logits.double().flatten(1), reference.flatten(1)
    return (rows - exact).norm(dim=1) / exact.norm(dim=1)


def adapter_bytes(base: PreTrainedModel, forward: Case) -> int:
    """Of the adapters' own numbers, float32 as PEFT keeps them."""
    widths = {
        name.rpartition(".")[2]: module.in_features + module.out_features
        for name, module in base.model.layers[0].named_modules()
        if name.rpartition(".")[2] in ALL
    }
    return 4 * len(base.model.layers) * sum(forward.ranks) * sum(widths[target] for target in forward.targets)
