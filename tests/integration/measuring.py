"""One family, choice of targets and dtype: what lorafx fuses there, and how far it and PEFT are from float64.

The truth is the same PEFT model, its weights as rounded to the base's dtype, cast to double, and its inputs too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

import lorafx
from lorafx.passes.naming import last_name

from .families import FAMILIES
from .models import EAGER_GRAPH, difference, run, save_adapters, site_of, with_peft

KINDS = ("qkv", "default", "all-linear")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
NAMES = ["a", "__base__", "b", "a", None] * 4  # of a mixed batch; every batch has as many rows, so one graph serves all


@dataclass(frozen=True)
class Case:
    """The models of one case, with the same weights and the same two adapters, and one batch for them."""

    key: str  # "family/targets/dtype"
    family: str
    kind: str
    dtype: torch.dtype
    layers: int
    folders: dict[str, str]
    base: nn.Module
    reference: PeftModel
    model: Any  # compiled, not called yet

    def inputs(self) -> dict[str, Tensor]:
        return cast(FAMILIES[self.family].inputs(len(NAMES)), self.dtype)

    def one(self, name: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """The compiled model with one adapter for the whole batch."""
        with self.model.lora.using(name):
            return run(self.model, inputs)

    def truth(self) -> PeftModel:
        """The reference in double. The experts of a mixture take no double but by their plain implementation."""
        model = with_peft(FAMILIES[self.family].build(self.layers, self.dtype), self.folders)
        if FAMILIES[self.family].experts:
            model.get_base_model().set_experts_implementation("eager")
        return model.double()


def every_key() -> list[tuple[str, str, str]]:
    """(family, targets, dtype) of every case that there is. PEFT has a default for some kinds of models only."""
    return [
        (name, kind, dtype)
        for name, family in FAMILIES.items()
        for kind in KINDS
        if kind != "default" or family.default
        for dtype in DTYPES
    ]


def make_case(name: str, kind: str, dtype: str, folder: Path) -> Case:
    """Adapters of different ranks are written to ``folder`` by PEFT, read by PEFT and by lorafx."""
    family, wanted = FAMILIES[name], DTYPES[dtype]
    layers = family.layers if kind == "all-linear" else 1
    experts = family.experts and kind == "all-linear"
    common = {"lora_dropout": 0.0} if experts else {}  # PEFT allows nothing else there
    second = list(family.qkv[-1:]) if kind == "all-linear" else family.targets(kind)
    folders = save_adapters(
        family,
        folder,
        layers,
        a={"r": 4, "target_modules": family.targets(kind), **common},
        b={"r": 7, "lora_alpha": 10, "target_modules": second, **common},
    )
    reference = with_peft(family.build(layers, wanted), folders)
    model = lorafx.compile(family.build(layers, wanted), folders, options=EAGER_GRAPH)
    return Case(
        f"{name}/{kind}/{dtype}", name, kind, wanted, layers, folders, family.build(layers, wanted), reference, model
    )


def measured(case: Case) -> dict[str, Any]:
    """What the page tells of a case that was called: groups with how many there are, branches, layers left with the
    reason, and errors: rel-L2 of one row, the worst and the mean of all; None where the call is refused."""
    errors = errors_of(case)
    report = lorafx.explain(case.model)
    return {
        "model": type(case.base).__name__,
        "layers": case.layers,
        "groups": dict(Counter(" + ".join(last_name(branch.name) for branch in g.branches) for g in report.groups)),
        "branches": sum(len(group.branches) for group in report.groups),
        "skipped": dict(Counter(item.reason for item in report.skipped)),
        "errors": errors,
    }


def errors_of(case: Case) -> dict[str, dict[str, list[float] | None]]:
    """{"one" | "mixed": {"lorafx" | "peft": [worst, mean] or None}}"""
    inputs, truth = case.inputs(), case.truth()
    exact = {}
    for name in ("a", "b"):
        truth.set_adapter(name)
        exact[name] = run(truth, cast(inputs, torch.float64))
    with truth.disable_adapter():
        exact["__base__"] = run(truth, cast(inputs, torch.float64))
    names = [name or "__base__" for name in NAMES]
    mixed = torch.stack([exact[name][row] for row, name in enumerate(names)])
    case.reference.set_adapter("a")
    return {
        "one": {
            "lorafx": row_errors(case.one("a", inputs), exact["a"]),
            "peft": row_errors(run(case.reference, inputs), exact["a"]),
        },
        "mixed": {
            "lorafx": row_errors(attempt(case.model, inputs, names), mixed),
            "peft": row_errors(attempt(case.reference, inputs, names), mixed),
        },
    }


def attempt(model: nn.Module, inputs: Mapping[str, Tensor], names: Sequence[str]) -> Tensor | None:
    """None where PEFT says that its layers can't take a mixed batch: experts, and inputs without rows."""
    try:
        return run(model, inputs, names)
    except ValueError as error:
        if "mixed adapter batches" in str(error) or "Length of `adapter_names`" in str(error):
            return None
        raise


def row_errors(got: Tensor | None, want: Tensor) -> list[float] | None:
    if got is None:
        return None
    rows = [difference(*pair) for pair in zip(got, want, strict=True)]
    return [max(rows), sum(rows) / len(rows)]


def shared_inputs(model: PeftModel, inputs: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """The adapted linear layers of one module that were called with the very same tensor, seen while ``model`` runs
    eagerly: what has to be one group each. Each parameter, of experts or a router, is one by itself."""
    calls: list[tuple[str, Tensor]] = []

    def note(path: str) -> Any:
        return lambda module, args, kwargs: calls.append((path, [*args, *kwargs.values()][0]))

    hooks = [
        module.register_forward_pre_hook(note(path), with_kwargs=True)
        for path, module in model.get_base_model().named_modules()
        if type(module) is PeftLinear
    ]
    run(model, inputs)
    for hook in hooks:
        hook.remove()
    groups: dict[tuple[int, str], list[str]] = {}
    for path, x in calls:  # which keeps every x alive, so an id stands for one of them
        groups.setdefault((id(x), path.rpartition(".")[0]), []).append(path)
    wrapped = [(p, m) for p, m in model.get_base_model().named_modules() if isinstance(m, ParamWrapper)]
    parameters = [(site_of(path, module),) for path, module in wrapped]
    return sorted([*parameters, *(tuple(sorted(group)) for group in groups.values())])


def cast(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
