"""The forward hook of a fused layer: each adapted part of its output gets a marker of its own.

y = qkv_proj(x)          ->     q, k, v = y.split(...)
                                y = cat([site(q, x), k, site(v, x)])
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorafx import adapted, experts
from lorafx.bank import AdapterBank
from lorafx.errors import UnsupportedModelError
from lorafx.fused_layers import Fusions, Part
from lorafx.sites import apply_dora, apply_site, check_one_place, marked

if TYPE_CHECKING:
    from lorafx.runtime import Runtime


class FusedHook:
    """parts: (site, start, width) of each adapted one, from left to right; refusal: why a call can't be served, of a
    layer whose parts are PEFT's; dora: sites that DoRA may stand on, by the weights of the part's own module"""

    def __init__(
        self,
        bank: AdapterBank,
        parts: list[tuple[int, int, int]],
        refusal: Callable[[], str | None],
        dora: Collection[int] = (),
    ) -> None:
        self.bank, self.parts, self.refusal, self.dora = bank, parts, refusal, tuple(dora)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        tracing = torch.compiler.is_compiling()
        if not tracing:
            if (reason := self.refusal()) is not None:
                raise UnsupportedModelError(
                    f"PEFT's layers stand beside a fused projection, which only lorafx adapts, and {reason}. Call the"
                    " model's unfuse_qkv_projections(), or end that."
                )
            if self.bank.routing().idle:
                return output
        pieces, at = [], 0
        for site, start, width in self.parts:
            if start > at:
                pieces.append(output.narrow(-1, at, start - at))
            piece = output.narrow(-1, start, width)
            if site in self.dora:
                bias = None if module.bias is None else module.bias.narrow(0, start, width)
                pieces.append(
                    marked(piece, x, bias, self.bank.key, site)
                    if tracing
                    else apply_dora(self.bank, site, piece, x, bias)
                )
            elif tracing:
                pieces.append(torch.ops.lorafx.site.default(piece, x, self.bank.key, site))
            else:
                pieces.append(apply_site(self.bank, site, piece, x))
            at = start + width
        if at < output.shape[-1]:
            pieces.append(output.narrow(-1, at, output.shape[-1] - at))
        return torch.cat(pieces, dim=-1)


class Refusal:
    """What PEFT's own modules would do now, and lorafx's ops on the fused layer beside them can't."""

    def __init__(self, runtime: Runtime, paths: Iterable[str]) -> None:
        self.runtime, self.paths = runtime, list(paths)

    def __call__(self) -> str | None:
        layers = [self.runtime.peft[path] for path in self.paths if path in self.runtime.peft]
        if not layers:
            return None
        if self.runtime.follower.uncompiled is not None:
            return self.runtime.follower.uncompiled
        if any(adapted.needs_gradients(layer) for layer in layers):
            return "its adapters are being trained"
        return None


class FusedSites:
    """The hooks on fused layers of one model, and where each site that is a part stands."""

    def __init__(self, runtime: Runtime, fusions: Fusions) -> None:
        self.runtime, self.fusions = runtime, fusions
        self.parts: dict[str, Part] = {}
        self._watched: list[tuple[dict[str, Any], str]] | None = None
        self._seen: list[nn.Module | None] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_watched": None, "_seen": []}  # dicts of the model's own: a copy looks again

    def find(self) -> Mapping[str, Part]:
        """The parts among the bank's sites, after its store or the model's layers have changed."""
        sites = {site.name: site.out_features for site in self.runtime.bank.store.sites}
        self.parts = self.fusions.find(self.runtime.root, sites, "what is loaded")
        self._watched, self._seen = self._find_watched(), []
        self._seen = self._look()
        return self.parts

    def holds(self) -> bool:
        """diffusers' ``fuse_qkv_projections`` has made no fused layer since, nor has one gone."""
        if self._watched is None:
            self._watched = self._find_watched()
            self._seen = [module if self._has_hook(module) else None for module in self._look()]
        return self._look() == self._seen

    def _find_watched(self) -> list[tuple[dict[str, Any], str]]:
        parents = {site.parent for site in self.runtime.bank.store.sites}
        return [
            (module._modules, name)
            for path, module in self.runtime.root.named_modules()
            if path in parents and hasattr(module, "fuse_projections")
            for name in self.fusions.parts
        ]

    def _look(self) -> list[nn.Module | None]:
        return [modules.get(name) for modules, name in self._watched]

    def _has_hook(self, module: nn.Module | None) -> bool:
        hooks = () if module is None else module._forward_hooks.values()
        return any(isinstance(hook, FusedHook) and hook.bank is self.runtime.bank for hook in hooks)

    def attach(self) -> list[Any]:
        """Put the hooks on, in place of any that are there. Returns what takes them off."""
        root, bank = self.runtime.root, self.runtime.bank
        layers: dict[str, list[tuple[int, int, int]]] = {}
        paths: dict[str, list[str]] = {}
        for path, part in self.parts.items():
            layers.setdefault(part.layer, []).append((bank.store.index[path], part.start, part.width))
            paths.setdefault(part.layer, []).append(path)
        check_one_place(root, layers)
        dora = [] if bank.store.dora is None else [bank.store.index[path] for path in bank.store.dora.sites]
        for module in root.modules():
            self.drop(module)
        return [
            root.get_submodule(layer).register_forward_hook(
                FusedHook(bank, sorted(parts, key=lambda part: part[1]), Refusal(self.runtime, paths[layer]), dora),
                with_kwargs=True,
            )
            for layer, parts in layers.items()
        ]

    def drop(self, module: nn.Module) -> None:
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, FusedHook) and hook.bank is self.runtime.bank:
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)

    def module_of(self, site: str) -> nn.Module:
        """What computes the output that this site is added to, while nothing has fused it."""
        try:
            return self.runtime.root.get_submodule(site)
        except AttributeError:
            if site in self.parts:
                return self.runtime.root.get_submodule(self.parts[site].layer)
            return experts.module_of(self.runtime.root, site)
