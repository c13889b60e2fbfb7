"""Reads adapters for one model: a PEFT folder, tensors in memory, or weights that were read before.

``open`` checks all that can be known without the weights, and costs PEFT's work once for each structure of adapters;
``read`` of what it returns costs the bytes.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lorafx.adapters import AdapterOutline, AdapterWeights, SiteShape, tokens_of
from lorafx.config_fields import show
from lorafx.errors import AdapterFormatError, AdapterMismatchError
from lorafx.experts import widths_at
from lorafx.formats.base import Base, base_of
from lorafx.fused_layers import Fusions
from lorafx.grafting import graft
from lorafx.inferred_config import config_of_shapes
from lorafx.layer_kinds import why_not, widths_of
from lorafx.packing import Layout
from lorafx.plans import Plan, plan_of
from lorafx.quantised import features_of
from lorafx.skeletons import PREFIX, check_base, load_onto, skeleton, weights_on
from lorafx.sources import Source, load_source
from lorafx.tensor_files import TensorSet
from lorafx.token_rows import with_tokens

PLANS_KEPT = 64
# The fields of a config that make no difference to which layers it adapts, with which ranks and scales.
INDIFFERENT = {"base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode", "lora_dropout"}
LARGEST_SCALE = torch.finfo(torch.float32).max


class AdapterReader:
    """root: the model, without PEFT's wrapper; dtype: of the weights that are returned, on the CPU; fusions: adapters
    of the parts of these layers are read too (None: PEFT has to run what is read, and can't)"""

    def __init__(self, root: nn.Module, dtype: torch.dtype, fusions: Fusions | None = None) -> None:
        self.root, self.dtype, self.fusions = root, dtype, fusions
        self._begin()

    def _begin(self) -> None:
        """What can't be copied or pickled, and is made anew in a copy."""
        self._plans: OrderedDict[bytes, Plan] = OrderedDict()
        self._planning, self._looking = threading.Lock(), threading.Lock()
        self._bare: nn.Module | None = None
        # what was looked at: adapters that fit the model, with finite numbers of our dtype; layouts that fit it
        self._finite: weakref.WeakValueDictionary[int, AdapterWeights] = weakref.WeakValueDictionary()
        self._fitting: weakref.WeakSet[Layout] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "dtype": self.dtype, "fusions": self.fusions}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def open(self, name: str, source: Source) -> AdapterOutline:
        """The adapter at ``source`` as it would stand on the model, under ``name``, its weights still to be read.

        source: a folder with adapter_config.json and adapter_model.safetensors (or .bin, read with weights_only), a
            file of another format (``lorafx.formats``) or a folder with one, a (state dict, config) pair, a state
            dict alone, whose alpha is then taken to be its rank, or weights that were read before

        AdapterFormatError: not a LoRA adapter that can be read. AdapterMismatchError: does not fit the model.
        """
        if isinstance(source, (AdapterWeights, AdapterOutline)):
            return self._from_weights(name, source)
        with torch.inference_mode(False):  # what is read outlives the caller's mode
            return self._outline(name, *load_source(name, source, self._base))

    @torch.inference_mode(False)
    def open_with_config(self, name: str, source: Source) -> tuple[LoraConfig, AdapterOutline]:
        """The same, and the config that makes PEFT build such layers."""
        if isinstance(source, (AdapterWeights, AdapterOutline)):
            outline = self._from_weights(name, source)
            config = config_of_shapes(name, outline.sites)
            config.modules_to_save = [path for path, tokens in outline.saved.items() if not tokens] or None
            config.trainable_token_indices = {path: [*t] for path, t in outline.saved.items() if t} or None
            config.alora_invocation_tokens = list(outline.invocation) or None
            return config, outline
        config, tensors = load_source(name, source, self._base)
        return config, self._outline(name, config, tensors)

    def _outline(self, name: str, config: LoraConfig, tensors: TensorSet) -> AdapterOutline:
        plan, sites, held = self._plan(name, config, tensors)
        invocation = tuple(config.alora_invocation_tokens or ())
        _check_scales(name, sites)

        @torch.inference_mode(False)
        @torch.no_grad()
        def read() -> AdapterWeights:
            if plan is not None:
                check_base(name, self.root, {path: tensors.take(key) for key, path in plan.base.items()})
                if tensors.flat is not None:
                    packed = plan.packing.pack(name, tensors.flat(), self.dtype)
                    packed = replace(
                        plan.with_magnitudes(packed, tensors.take),
                        saved=plan.saved_from(tensors.take),
                        invocation=invocation,
                    )
                    return self._checked(packed)
                weights = {path: site.weights(tensors.take) for path, site in plan.sites.items()}
                saved = plan.saved_from(tensors.take)
            else:
                taken = {key: tensors.take(key) for key in tensors.shapes}
                loaded = load_onto(name, self._skeleton(name, config, tensors.shapes), config, taken)
                check_base(name, self.root, loaded.base)
                weights, saved = weights_on(loaded), with_tokens(loaded.saved, loaded.tokens)
            adapter = AdapterWeights(name, weights, saved=saved, invocation=invocation)
            return self._checked(adapter.packed(self.dtype))

        return AdapterOutline(name, sites, read, held, invocation)

    def _plan(
        self, name: str, config: LoraConfig, tensors: TensorSet
    ) -> tuple[Plan | None, Mapping[str, SiteShape], Mapping[str, tuple[int, ...]]]:
        """Where the tensors belong, kept for the next adapter of this structure, and what that makes of the layers."""
        fields = [(k, _in_order(v)) for k, v in sorted(vars(config).items()) if k not in INDIFFERENT]
        key = sha256(repr((fields, list(tensors.shapes.items()))).encode("utf-8", "surrogatepass")).digest()
        plan = self._known(key)
        if plan is not None:
            return plan, plan.shapes, plan.saved_outline
        with self._planning:  # threads that come first together share one
            plan = self._known(key)
            if plan is not None:
                return plan, plan.shapes, plan.saved_outline
            stand_ins = {key: torch.empty(shape, device="meta") for key, shape in tensors.shapes.items()}
            loaded = load_onto(name, self._skeleton(name, config, tensors.shapes), config, stand_ins)
            plan = plan_of(name, loaded, stand_ins)
            _check_prefixes(name, tensors.shapes)
            if plan is None:
                held = tokens_of(with_tokens(loaded.saved, loaded.tokens))
                return None, {path: site.shape for path, site in weights_on(loaded).items()}, held
            with self._looking:
                self._plans[key] = plan
                while len(self._plans) > PLANS_KEPT:
                    self._plans.popitem(last=False)
            return plan, plan.shapes, plan.saved_outline

    def _known(self, key: bytes) -> Plan | None:
        with self._looking:
            if key in self._plans:
                self._plans.move_to_end(key)
            return self._plans.get(key)

    def _skeleton(self, name: str, config: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
        """One to use up, with the layers that a file of these tensors may be for."""
        bare = copy.deepcopy(self._kept_skeleton())
        if self.fusions is not None:
            graft(name, bare, config, shapes, self.fusions)
        return bare

    def _base(self) -> Base:
        return base_of(self._kept_skeleton())

    def _kept_skeleton(self) -> nn.Module:
        """The first is kept: later the model itself may be in the middle of a forward."""
        if self._bare is None:
            self._bare = skeleton(self.root)
        return self._bare

    def _from_weights(self, name: str, source: AdapterWeights | AdapterOutline) -> AdapterOutline:
        """What was read for a model of this kind, under a name of its own; copied only into another dtype."""
        if isinstance(source, AdapterWeights) and self._finite.get(id(source)) is source:
            kept = tokens_of(source.saved), source.invocation, source.layout
            return AdapterOutline(name, source.shapes, lambda: _renamed(source, name), *kept)
        outline = source if isinstance(source, AdapterOutline) else source.outline
        layout = source.layout if isinstance(source, AdapterWeights) else None
        if layout is None or outline.saved or layout not in self._fitting:
            _check_fits(name, self.root, outline.sites, self.fusions or Fusions({}))
            _check_has_modules(name, self.root, outline.saved)
            if layout is not None:
                self._fitting.add(layout)
        _check_scales(name, outline.sites)

        @torch.inference_mode(False)
        @torch.no_grad()
        def read() -> AdapterWeights:
            weights = source if isinstance(source, AdapterWeights) else source.read()
            tensors = [weights.flat] if weights.flat is not None else _tensors(weights)
            if any(tensor.dtype != self.dtype for tensor in tensors):
                weights = weights.packed(self.dtype)
            return _renamed(self._checked(weights), name)

        return AdapterOutline(name, outline.sites, read, outline.saved, outline.invocation)

    def _checked(self, weights: AdapterWeights) -> AdapterWeights:
        """``weights``, whose numbers are looked at once."""
        if self._finite.get(id(weights)) is not weights:
            flat = weights.flat
            # a sum says it in one pass, but may overflow where no number does
            if flat is None or not torch.isfinite(flat.sum()) or any(site.dora for site in weights.shapes.values()):
                weights.check_finite()
            self._finite[id(weights)] = weights
        return weights


def _in_order(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def _tensors(weights: AdapterWeights) -> list[Tensor]:
    return [tensor for site in weights.sites.values() for tensor in site.tensors()]


def _renamed(weights: AdapterWeights, name: str) -> AdapterWeights:
    _ = weights.scales  # what an adapter has computed of itself goes with the copy
    renamed = object.__new__(AdapterWeights)  # copy.copy takes several times as long
    vars(renamed).update(vars(weights), name=name)
    return renamed


def _check_fits(name: str, root: nn.Module, sites: Mapping[str, SiteShape], fusions: Fusions) -> None:
    parts = fusions.find(root, {path: shape.out_features for path, shape in sites.items()}, f"adapter {name!r}")
    for path, shape in sites.items():
        if not _fits(root, path, shape) and not (
            path in parts and features_of(root.get_submodule(parts[path].layer))[0] == shape.in_features
        ):
            raise AdapterMismatchError(
                f"adapter {name!r} does not fit {type(root).__name__}: it has weights for a layer {path!r} from"
                f" {shape.in_features} to {shape.out_features} features, which the model has not. Is it an adapter of"
                " another model?"
            )


def _check_has_modules(name: str, root: nn.Module, paths: Iterable[str]) -> None:
    there = dict(root.named_modules())
    for path in paths:
        if path not in there:
            raise AdapterMismatchError(
                f"adapter {name!r} brings its own {path}, which {type(root).__name__} has not. Is it an adapter of"
                " another model?"
            )


def _fits(root: nn.Module, path: str, shape: SiteShape) -> bool:
    """Whether the model has this layer."""
    if shape.experts:
        return widths_at(root, path) == (shape.in_features, shape.out_features, shape.experts)
    try:
        module = root.get_submodule(path)
    except AttributeError:
        return False
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    return widths_of(base) == (shape.in_features, shape.out_features) and why_not(base) is None


def _check_prefixes(name: str, keys: Iterable[str]) -> None:
    """PEFT's loader takes names with its prefix, or without, as they come; but a PeftModel leaves the layers of those
    without it at random values, and warns. All of one kind say what is meant, a mixture does not."""
    weights = [key for key in keys if ".lora_" in key]
    without = [key for key in weights if not key.startswith(PREFIX)]
    if 0 < len(without) < len(weights):
        raise AdapterFormatError(
            f"adapter {name!r}: {len(without)} of its {len(weights)} names, for example {show(without[0])}, lack the"
            f" prefix {PREFIX!r} that the others have. Expected all with it, as save_pretrained writes them, or none."
        )


def _check_scales(name: str, sites: Mapping[str, SiteShape]) -> None:
    for path, site in sites.items():
        if not abs(site.scale) <= LARGEST_SCALE:
            raise AdapterFormatError(
                f"adapter {name!r}: alpha and rank of {path} make its scale {site.scale}; expected at most"
                f" {LARGEST_SCALE:.1e}, the largest number of the weights' dtype. Is its lora_alpha damaged?"
            )
