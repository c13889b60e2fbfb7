"""Loads adapters onto a model that has PEFT's layers already: read and checked first, then PEFT's own methods."""

from __future__ import annotations

import copy
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import delete_adapter
from torch import nn

from lorafx.adapters import AdapterWeights
from lorafx.errors import AdapterMismatchError, UnsupportedModelError
from lorafx.experts import layer_at, named_as
from lorafx.peft_tensors import parameters_of, shaped
from lorafx.reading import AdapterReader
from lorafx.saved_modules import has_rows
from lorafx.token_rows import ROWS

if TYPE_CHECKING:
    from lorafx.bank import AdapterBank


class PeftLoader:
    """model: a PeftModel, or a transformers model with adapters added by its own methods; root: its base;
    bank: follows its layers; None while there is none yet"""

    def __init__(self, model: nn.Module, root: nn.Module, bank: AdapterBank | None = None) -> None:
        self.model, self.root, self.bank = model, root, bank
        self.reader = AdapterReader(root, torch.float32)

    def load(self, name: str, source: Any) -> None:
        self._check_is_peft_model()
        config, weights = self._read(name, source)
        with self._changing(name):
            if name in self.model.peft_config:
                raise AdapterMismatchError(f"the PeftModel has an adapter {name!r} already; choose another name")
            if self.bank is not None:
                self.bank._admit(weights.outline)
            self._add(name, config, weights)

    def replace(self, name: str, source: Any) -> None:
        """The new adapter is read and checked before the old one goes; what was active stays active."""
        self._check_is_peft_model()
        config, weights = self._read(name, source)
        with self._changing(name):
            self.bank._admit(weights.outline, self.bank._slot(name))
            active = list(self.model.active_adapters)
            self._take_off(name)
            self._add(name, config, weights)
            self.model.base_model.set_adapter(active, inference_mode=True)

    def unload(self, name: str) -> None:
        self._check_is_peft_model()
        with self._changing(name):
            self.bank._check_unused(name)
            self.model.delete_adapter(name)

    def _changing(self, name: str) -> AbstractContextManager[None]:
        return self.bank._changing_peft(name) if self.bank is not None else nullcontext()

    def _read(self, name: str, source: Any) -> tuple[Any, AdapterWeights]:
        with self.bank.reading() if self.bank is not None else nullcontext():  # a change would change what is read
            config, outline = self.reader.open_with_config(name, source)
            return config, outline.read()

    def _take_off(self, name: str) -> None:
        """PEFT's ``delete_adapter``, but the config stays until another takes its place: PEFT's own forward looks the
        active adapter's up before it comes to where calls wait for a change."""
        tuner = self.model.base_model
        if merged := [
            path for path, layer in tuner.model.named_modules() if name in getattr(layer, "merged_adapters", ())
        ]:
            raise UnsupportedModelError(
                f"adapter {name!r} is merged into {len(merged)} base weight(s), such as that of {merged[0]};"
                " unmerge_adapter() before replacing it"
            )
        delete_adapter(tuner.model, name, prefix=tuner.prefix, layer_cls=tuner.tuner_layer_cls)

    def _add(self, name: str, config: Any, weights: AdapterWeights) -> None:
        config = copy.deepcopy(config)
        config.inference_mode, config.init_lora_weights = True, False
        if config.target_parameters:
            config.target_parameters = named_as(name, config.target_parameters, self.model.peft_config.values())
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            self.model.peft_config[name] = config  # what PEFT's add_adapter does, which wants a new name
            try:
                self.model.base_model.inject_adapter(self.model.base_model.model, name)
            except ValueError as error:
                raise AdapterMismatchError(
                    f"adapter {name!r} can't stand beside the others on this PeftModel, as PEFT says: {error} Compile"
                    " the base model without PEFT, which takes any."
                ) from error
            self.model.base_model._cast_adapter_dtype(name)
            for path, site in weights.sites.items():
                layer = layer_at(self.root, path)
                layer.train(layer.base_layer.training)  # PEFT makes its modules in training mode
                layer.scaling[name] = site.scale  # of weights that come without a config, to the bit
                tensors = {"A": site.a, "B": site.b, "bias": site.bias}
                for role, parameter in parameters_of(layer, name).items():
                    parameter.copy_(shaped(tensors[role], parameter))
                if site.magnitude is not None:
                    layer.lora_magnitude_vector[name].weight.copy_(site.magnitude.weight)
            for path, copied in weights.saved.items():
                wrapper = self.root.get_submodule(path)
                if has_rows(wrapper):
                    wrapper.token_adapter.trainable_tokens_delta[name].requires_grad_(False).copy_(copied[ROWS])
                    continue
                module = wrapper.modules_to_save[name]
                module.load_state_dict(copied, strict=True)
                module.requires_grad_(False)

    def _check_is_peft_model(self) -> None:
        if not isinstance(self.model, PeftModel):
            raise UnsupportedModelError(
                "this model carries PEFT layers without being a PeftModel; load adapters with its own load_adapter,"
                " which lorafx follows."
            )
