"""One model type in a sweep: two adapters by PEFT, the same through lorafx both ways, and how far apart they are."""

from __future__ import annotations

import ast
import contextlib
import itertools
import logging
import re
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lorafx
from tests import tiny_models
from tests.integration.models import EAGER_GRAPH, site_of

NAMES = ["a", "__base__", "b"]  # of a mixed batch
PLAIN = "plain linear layers"  # where PEFT can't run what it makes of "all-linear", such as a router that is one
TARGETS = ("all-linear", PLAIN)
WAYS = ("in place", "files")
TOLERANCE = 2e-4  # of what adapters change
NOISE = 3e-6  # of the whole, which is rounded too
NOTHING = 1e-30  # numbers so small are rounded to few digits


class Unsuitable(Exception):
    """Not lorafx's to answer for: the model can't be made tiny, or it or PEFT can't run."""


# ------------------------------------------------------------------------------------------------ one type


def run_case(model_type: str, library: ModuleType = tiny_models) -> dict[str, Any]:
    """All that the sweep keeps of one type; "stage" says how far it came, "compared" where all was.

    library: ``tiny_models`` or ``tiny_diffusers``
    """
    entry: dict[str, Any] = {"stage": "not built"}
    started = time.perf_counter()
    try:
        make, inputs = found_model(model_type, entry, library)
        entry["stage"] = "not run by PEFT"
        reference, truth, entry["targets"] = judged(make, inputs)
    except Unsuitable as error:
        return {**entry, "reason": str(error)}
    entry["stage"] = "compared"
    expected = truth["groups"]
    entry["peft"] = {"layers": len(list(adapted(reference))), "mixed": truth["refused"]}
    with tempfile.TemporaryDirectory() as folder:
        quiet(reference.save_pretrained, folder)
        files = {name: f"{folder}/{name}" for name in ("a", "b")}
        entry["in place"] = one_way(
            lambda: lorafx.compile(with_adapters(make, entry["targets"]), options=EAGER_GRAPH), inputs, truth, expected
        )
        torch._dynamo.reset()
        entry["files"] = one_way(lambda: lorafx.compile(make(), files, options=EAGER_GRAPH), inputs, truth, expected)
    if any(is_odd(entry[way]) for way in WAYS):
        torch._dynamo.reset()
        entry["torch.compile alone"] = without_lorafx(make(), inputs, truth["base"])
    entry["seconds"] = round(time.perf_counter() - started, 1)
    return entry


def judged(make: Callable[[], nn.Module], inputs: Mapping[str, Tensor]) -> tuple[PeftModel, dict[str, Any], str]:
    """PEFT's model, what it gives, and the first targets with which it gives anything. Unsuitable: none"""
    reason = ""
    for targets in TARGETS:
        try:
            reference = with_adapters(make, targets)
            return reference, truth_of(make(), reference, inputs), targets
        except Unsuitable as error:
            reason = reason or str(error)
    raise Unsuitable(reason)


def is_odd(way: Mapping[str, Any]) -> bool:
    """Whether a call gave something else, or the model's graph has breaks, which may be torch's doing."""
    return way.get("graphs", 0) > 1 or any("off by" in str(said) for said in way.get("calls", {}).values())


def without_lorafx(model: nn.Module, inputs: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, Any]:
    """How many graphs Dynamo makes of the plain model, and whether they compute what it does."""
    counters["stats"].clear()
    try:
        compiled = torch.compile(model, backend="eager")
        got, _ = (flat(call(compiled, inputs)) for _ in range(2))
    except Exception as error:
        return {"raised": told(error)}
    off = [path for path in want if path not in got or not close(got[path], want[path])]
    return {"graphs": counters["stats"]["unique_graphs"], "differs": off}


def close(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and torch.allclose(got.double(), want.double(), rtol=1e-3, atol=1e-4, equal_nan=True)


def found_model(
    model_type: str, entry: dict[str, Any], library: ModuleType = tiny_models
) -> tuple[Callable[[], nn.Module], dict[str, Tensor]]:
    """The first class, recipe and inputs that work. Unsuitable: none does"""
    problems: dict[str, str] = {}
    for name, recipe in itertools.product(library.class_names(model_type)[:3], range(3)):
        try:
            model = quiet(library.build, model_type, name, recipe)
        except Exception as error:
            problems.setdefault("building", told(error))
            continue
        for inputs in each_of(partial(library.inputs, model), problems):
            try:
                if flat(call(model, inputs)):
                    entry.update(model=name, parameters=sum(p.numel() for p in model.parameters()))
                    entry["inputs"] = {key: list(value.shape) for key, value in inputs.items()}
                    return partial(quiet, library.build, model_type, name, recipe), inputs
            except Exception as error:
                problems.setdefault("calling", told(error))
    raise Unsuitable("; ".join(f"{what}: {why}" for what, why in problems.items()) or "no rule for its inputs")


def each_of(make: Callable[[], Iterator[Any]], problems: dict[str, str]) -> Iterator[Any]:
    try:
        yield from make()
    except Exception as error:
        problems.setdefault("inputs", told(error))


def with_adapters(make: Callable[[], nn.Module], targets: str) -> PeftModel:
    """PEFT's model with two random adapters, "a" active. targets: of ``TARGETS``. Unsuitable: PEFT refuses"""
    try:
        return _with_adapters(make(), targets)
    except Exception as error:
        refused = re.search(r"Incompatible modules: ({.*?})", str(error))
        if refused is None:
            raise Unsuitable(f"PEFT refuses: {told(error)}") from error
    return _with_adapters(make(), PLAIN, ast.literal_eval(refused[1]))  # PEFT says what it takes in no Mamba


def _with_adapters(model: nn.Module, targets: str, but: Collection[str] = ()) -> PeftModel:
    chosen: Any = targets
    if targets == PLAIN:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        linear = [path for path, module in model.named_modules() if type(module) is nn.Linear and module is not head]
        chosen = [path for path in linear if path.rpartition(".")[2] not in but]
    torch.manual_seed(7)
    common = {"target_modules": chosen, "init_lora_weights": False, "lora_dropout": 0.0}
    peft_model = quiet(get_peft_model, model, LoraConfig(r=4, lora_alpha=8, **common), adapter_name="a")
    quiet(peft_model.add_adapter, "b", LoraConfig(r=7, lora_alpha=10, **common))
    return peft_model.eval()


def truth_of(plain: nn.Module, reference: PeftModel, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """{"base" | "a" | "b" | "mixed": tensors by path}, and "refused": why PEFT can't mix. Unsuitable: it can't run"""
    try:
        found: dict[str, Any] = {"base": flat(call(plain, inputs))}
        for name in ("a", "b"):
            reference.set_adapter(name)
            found[name] = flat(call(reference, inputs))
        reference.set_adapter("a")
        again = flat(call(reference, inputs))
    except Exception as error:
        raise Unsuitable(f"PEFT fails: {told(error)}") from error
    if any(not torch.equal(again[path], found["a"][path]) for path in again):
        raise Unsuitable("two calls of PEFT give different results")
    if all(torch.equal(found["a"][path], found["base"][path]) for path in found["base"]):
        raise Unsuitable("adapters change nothing in what it gives")
    of_name = {"a": found["a"], "__base__": found["base"], "b": found["b"]}
    found["rows"] = {
        path: torch.stack([of_name[name][path][i] for i, name in enumerate(NAMES)])
        for path in rows_alone(plain, inputs, found["base"])
    }
    found["groups"] = shared_inputs(reference, inputs)
    found["refused"] = ""  # asked last: PEFT leaves its hooks where such a call fails
    try:
        found["mixed"] = flat(call(reference, {**inputs, "adapter_names": NAMES}))
    except Exception as error:
        found["mixed"], found["refused"] = None, told(error)
    return found


def rows_alone(model: nn.Module, inputs: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> list[str]:
    """Outputs of which each row depends on the same row of the inputs alone: where those are turned, these turn."""
    rows = tiny_models.ROWS
    if any(value.shape[0] != rows for value in inputs.values()):  # patches of pictures: which are whose is not known
        return []
    turned = flat(call(model, {key: value.roll(1, 0) for key, value in inputs.items()}))
    paths = [path for path, value in base.items() if value.ndim and value.shape[0] == rows and path in turned]
    return [path for path in paths if close(turned[path], base[path].roll(1, 0))]


def one_way(
    compiled: Callable[[], Any], inputs: Mapping[str, Tensor], truth: Mapping[str, Any], expected: list[tuple[str, ...]]
) -> dict[str, Any]:
    """What lorafx did: errors of every kind of call, what was fused, what was said."""
    entry: dict[str, Any] = {"calls": {}}
    said: list[str] = []
    with hearing(said):
        try:
            model = compiled()
        except Exception as error:
            return {"refused" if isinstance(error, lorafx.LorafxError) else "raised": told(error), "said": said}
        for what, run in calls_of(model, inputs).items():
            try:
                got = flat(run())
            except Exception as error:
                entry["calls"][what] = told(error)
                continue
            entry["calls"][what] = compared(got, what, truth)
        report = lorafx.explain(model)
    groups = [tuple(sorted(branch.name for branch in group.branches)) for group in report.groups]
    fused = {name for group in groups for name in group}
    entry["source"] = report.source
    entry["groups"], entry["branches"] = len(groups), len(fused)
    entry["graphs"] = len(report.graphs)
    entry["recompiles"] = report.recompiles
    entry["retraces"] = list(report.retraces)
    entry["skipped"] = dict(Counter(item.reason for item in report.skipped))
    left = {item.name for item in report.skipped}
    entry["called"] = sum(map(len, expected))
    entry["missing"] = sorted({n for group in expected for n in group} - fused - left)
    entry["apart"] = [
        " + ".join(group) for group in expected if len(group) > 1 and group not in groups and set(group) <= fused
    ][:4]
    entry["said"] = said
    return entry


def calls_of(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Callable[[], Any]]:
    def one(name: str) -> Any:
        if isinstance(model, PeftModel):
            model.set_adapter(name)
            return call(model, inputs)
        with model.lora.using(name):
            return call(model, inputs)

    def idle() -> Any:
        with model.disable_adapter() if isinstance(model, PeftModel) else model.lora.using(None):
            return call(model, inputs)

    return {
        "a": lambda: one("a"),
        "b": lambda: one("b"),
        "base": idle,
        "mixed": lambda: call(model, {**inputs, "adapter_names": NAMES}),
    }


def compared(got: Mapping[str, Tensor], what: str, truth: Mapping[str, Any]) -> float | str:
    """The largest error of what the adapters change, over all tensors; a text says what differs."""
    want = truth["rows"] if what == "mixed" and truth["mixed"] is None else truth[what]
    worst = 0.0
    for path, tensor in want.items():
        if path not in got or got[path].shape != tensor.shape or got[path].dtype != tensor.dtype:
            return f"{path}: got {describe(got.get(path))}, expected {describe(tensor)}"
        if torch.equal(got[path], tensor):
            continue
        if bool((got[path].isfinite() != tensor.isfinite()).any()):
            return f"{path}: other elements are not finite"
        if not tensor.is_floating_point():
            return f"{path}: {int((got[path] != tensor).sum())} of {tensor.numel()} numbers differ"
        mine, its, base = (t.double().nan_to_num(0, 0, 0) for t in (got[path], tensor, truth["base"][path]))
        off, delta = float((mine - its).norm()), float((its - base).norm())
        if off > TOLERANCE * delta + NOISE * float(its.norm()) + NOTHING:
            return f"{path}: off by {off:.2e}, where adapters change {delta:.2e} of {float(its.norm()):.2e}"
        worst = max(worst, off / delta if delta else 0.0)
    return float(f"{worst:.1e}")


# ------------------------------------------------------------------------------------------------ helpers


def shared_inputs(model: PeftModel, inputs: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """The adapted layers of one module that were called with the very same tensor, in an eager call, sorted."""
    seen: list[tuple[str, Any]] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda m, args, kwargs, path=path: seen.append((path, next(iter([*args, *kwargs.values()]), None))),
            with_kwargs=True,
        )
        for path, module in adapted(model)
        if isinstance(module.get_base_layer(), nn.Linear)
    ]
    call(model, inputs)
    for hook in hooks:
        hook.remove()
    groups: dict[tuple[int, str], list[str]] = {}
    for path, x in seen:
        groups.setdefault((id(x), path.rpartition(".")[0]), []).append(path)
    return sorted({tuple(sorted(set(group))) for group in groups.values()})


def adapted(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield site_of(path, module), module


@torch.no_grad()
def call(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    torch.manual_seed(0)  # for those that draw random numbers
    copies = {key: value.clone() if isinstance(value, Tensor) else value for key, value in inputs.items()}
    return quiet(model, **copies)


def flat(output: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor of an output, by path, but for caches."""
    if isinstance(output, Tensor):
        return {path or "output": output.detach().clone()}
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, (list, tuple)):
        items = enumerate(output)
    else:
        return {}
    return {k: v for name, value in items for k, v in flat(value, f"{path}.{name}".strip(".")).items()}


def describe(value: Tensor | None) -> str:
    return "nothing" if value is None else f"{tuple(value.shape)} {value.dtype}"


def told(error: BaseException) -> str:
    """An exception in one line, with the line of code that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = (
        f" ({last[0].filename.rpartition('site-packages/')[2].rpartition('/wt-sweep/')[2]}:{last[0].name})"
        if last
        else ""
    )
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"


def quiet(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Without the warnings of others; those of lorafx are let through."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message="lorafx")
        return function(*args, **kwargs)


@contextlib.contextmanager
def hearing(said: list[str]) -> Iterator[None]:
    """What lorafx warns of meanwhile goes to ``said``."""

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage()[:300])

    ear, log = Ear(level=logging.WARNING), logging.getLogger("lorafx")
    before, warnings.showwarning = warnings.showwarning, lambda message, *_: said.append(str(message)[:300])
    log.addHandler(ear)
    try:
        yield
    finally:
        log.removeHandler(ear)
        warnings.showwarning = before
