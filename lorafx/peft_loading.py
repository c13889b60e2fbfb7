"""Loads adapters onto a model that has PEFT's layers already: read and checked first, then PEFT's own methods."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from lorafx.adapters import AdapterWeights
from lorafx.errors import AdapterMismatchError, UnsupportedModelError
from lorafx.reading import AdapterReader


class PeftLoader:
    """``model``: a PeftModel, or a transformers model with adapters added by its own methods; ``root``: its base."""

    def __init__(self, model: nn.Module, root: nn.Module) -> None:
        self.model, self.root = model, root
        self.reader = AdapterReader(root, torch.float32)

    def load_all(self, sources: Mapping[str, Any]) -> list[str]:
        """Load each; on an error, none. Returns their names."""
        loaded: list[str] = []
        try:
            for name, source in sources.items():
                self.load(name, source)
                loaded.append(name)
        except BaseException:
            self.unload_all(loaded)
            raise
        return loaded

    def unload_all(self, names: list[str]) -> None:
        for name in names:
            self.model.delete_adapter(name)

    def load(self, name: str, source: Any, admit: Callable[[AdapterWeights], None] = lambda adapter: None) -> None:
        """``admit`` raises for an adapter that must not be added; then nothing was."""
        self._check_is_peft_model()
        if name in self.model.peft_config:
            raise AdapterMismatchError(f"the PeftModel has an adapter {name!r} already; choose another name")
        config, weights = self._read(name, source)
        admit(weights)
        self._add(name, config, weights)

    def replace(self, name: str, source: Any, admit: Callable[[AdapterWeights], None]) -> None:
        """The new adapter is read and checked before the old one goes; what was active stays active."""
        self._check_is_peft_model()
        config, weights = self._read(name, source)
        admit(weights)
        active = list(self.model.active_adapters)
        self.model.delete_adapter(name)
        self._add(name, config, weights)
        self.model.base_model.set_adapter(active, inference_mode=True)

    def unload(self, name: str) -> None:
        self._check_is_peft_model()
        self.model.delete_adapter(name)

    def _read(self, name: str, source: Any) -> tuple[Any, AdapterWeights]:
        config, outline = self.reader.open_with_config(name, source)
        return config, outline.read()

    def _add(self, name: str, config: Any, weights: AdapterWeights) -> None:
        config = copy.deepcopy(config)
        config.inference_mode, config.init_lora_weights = True, False
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            self.model.add_adapter(name, config)
            for path, site in weights.sites.items():
                layer = self.root.get_submodule(path)
                layer.train(layer.base_layer.training)  # PEFT makes its modules in training mode
                layer.scaling[name] = site.scale  # of weights that come without a config, to the bit
                layer.lora_A[name].weight.copy_(site.a)
                layer.lora_B[name].weight.copy_(site.b)
                if site.bias is not None:
                    layer.lora_B[name].bias.copy_(site.bias)

    def _check_is_peft_model(self) -> None:
        if not isinstance(self.model, PeftModel):
            raise UnsupportedModelError(
                "this model carries PEFT layers without being a PeftModel; load adapters with its own load_adapter,"
                " which lorafx follows."
            )
