"""What PEFT's layers say now, kept so that each call can tell, in microseconds, whether anything has changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from operator import is_
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lorafx.peft_tensors import has_bare_parameters
from lorafx.saved_modules import has_rows


class PeftState:
    """A record of everything that PEFT's verbs, and moves of weights, change on ``layers``, which are in ``root``.

    It keeps what it compares with, so no identity can be used again for something else meanwhile. It is compared
    before every call, so loops are left to C where that is possible.
    """

    def __init__(self, root: nn.Module, layers: Mapping[str, Any], wrappers: Mapping[str, Any]) -> None:
        self._root = vars(root)
        self._wrappers = [vars(wrapper) for wrapper in wrappers.values()]
        self._path = next(iter(layers))
        self._way = _way_to(self._root["_modules"], self._path)
        self._layers = [vars(layer) for layer in layers.values()]
        self._tables = [part._modules for layer in layers.values() for part in (layer.lora_A, layer.lora_B)]
        tables = [*self._tables]
        self._tables += [_held_by(wrapper) for wrapper in wrappers.values()]
        embeddings = [layer for layer in layers.values() if has_bare_parameters(layer)]
        self._bare = [part._parameters for e in embeddings for part in (e.lora_embedding_A, e.lora_embedding_B)]
        self._modules = self._read_modules()
        self._parameters: dict[str, list[dict[str, Any]]] = {}
        for table in tables:
            for name, module in table.items():
                self._parameters.setdefault(name, []).append(module._parameters)
        names = dict.fromkeys(chain(self._parameters, *self._bare))
        self._addresses = {name: self._read_addresses(name) for name in names}
        self._scales = self._read_scales()
        # those that hotswapping made tensors are filled in place; reading their value would wait for the device
        self._tensors = [scale for scale in self._scales if isinstance(scale, Tensor)]
        self._versions = self._read_versions()
        self._names = list(self._read_names())
        self._spoken: object = None  # no switches are recorded yet

    def take_switches(self) -> None:
        """Record which adapters are active, disabled and merged."""
        self._active = [list(names) for names in self._read("_active_adapter")]
        self._disabled = self._read("_disable_adapters")
        self._merged = [list(names) for names in self._read("merged_adapters")]
        self._of_wrappers = self._read_wrappers()
        self._spoken = self.spoken

    @property
    def spoken(self) -> object:
        """Another object after each ``set_adapter``."""
        return self._layers[0]["_lorafx_spoken"]

    def switches_hold(self) -> bool:
        """The same adapters are active, disabled and merged."""
        return (
            self.spoken is self._spoken
            and self._read("_disable_adapters") == self._disabled
            and self._read("merged_adapters") == self._merged
            and list(map(list, self._read("_active_adapter"))) == self._active
            and self._read_wrappers() == self._of_wrappers
        )

    def adapters_hold(self, names: Iterable[str]) -> bool:
        """The same adapters, scaled the same; for ``names`` also: their weights have not moved."""
        return (
            self.attached()
            and list(self._read_names()) == self._names
            and _same_objects(self._read_modules(), self._modules)
            and _same_objects(self._read_scales(), self._scales)
            and self._read_versions() == self._versions
            and all(self._read_addresses(name) == self._addresses[name] for name in names if name in self._addresses)
        )

    def attached(self) -> bool:
        """The layers are in the model still, in the modules that they were in."""
        return all(children.get(name) is child for children, name, child in self._way)

    def find_again(self) -> bool:
        """Whether the layers stand where they stood, in modules that a forward has put in the place of others, as
        BigBird's attention does for a short input."""
        way = _way_to(self._root["_modules"], self._path)
        if way[-1][2] is not self._way[-1][2]:
            return False
        self._way = way
        return True

    def _read(self, name: str) -> list[Any]:
        return [layer[name] for layer in self._layers]

    def _read_wrappers(self) -> list[Any]:
        return [(str(each["_active_adapter"]), each["_disable_adapters"]) for each in self._wrappers]

    def _read_names(self) -> Iterable[str]:
        return self._root.get("peft_config", ())

    def _read_modules(self) -> list[nn.Module | nn.Parameter]:
        return list(chain.from_iterable(map(dict.values, chain(self._tables, self._bare))))

    def _read_scales(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._read("scaling"))))

    def _read_versions(self) -> list[int]:
        return [scale._version for scale in self._tensors]

    def _read_addresses(self, name: str) -> list[int]:
        parameters = self._parameters.get(name, ())
        biases = [each["bias"] for each in parameters if each.get("bias") is not None]
        bare = [each[name] for each in self._bare if name in each]
        return list(map(Tensor.data_ptr, [each["weight"] for each in parameters] + biases + bare))


def _held_by(wrapper: Any) -> dict[str, Any]:
    """Copies of a module, or parameters that are rows of its weight, by adapter."""
    return (
        wrapper.token_adapter.trainable_tokens_delta._parameters
        if has_rows(wrapper)
        else (wrapper.modules_to_save._modules)
    )


def _way_to(children: dict[str, Any], path: str) -> list[tuple[dict[str, Any], str, nn.Module | None]]:
    """Each step from ``children``, those of the root, to the module at ``path``; the last is None if it is gone."""
    steps: list[tuple[dict[str, Any], str, nn.Module | None]] = []
    for name in path.split("."):
        if name not in children and steps and isinstance(steps[-1][2], LoraLayer):
            break  # a parameter: PEFT's wrapper stands where its module did
        steps.append((children, name, children.get(name)))
        if steps[-1][2] is None:
            break
        children = steps[-1][2]._modules
    return steps


def _same_objects(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))
