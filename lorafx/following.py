"""Notices, before each call, what PEFT's verbs or the user have changed on the model, and brings the bank up to it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from lorafx import adapted, peft_layers
from lorafx.adapters import AdapterWeights
from lorafx.errors import UnsupportedModelError
from lorafx.logs import warn_once
from lorafx.offloading import check_in_place
from lorafx.peft_loading import PeftLoader
from lorafx.peft_state import PeftState
from lorafx.quantised import is_quantised
from lorafx.routing import MAX_PAIRS
from lorafx.saved_layers import AdaptedWrapper
from lorafx.saved_modules import disagreeing, suitable_wrappers
from lorafx.selection import NOTHING, Selection, names_in
from lorafx.store import PackedStore

if TYPE_CHECKING:
    from lorafx.runtime import Runtime


class Follower:
    """Keeps the bank of ``runtime`` in step with its model.

    gone: PEFT has taken its layers off the model; uncompiled: why calls run as PEFT computes them now, if they do
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.uncompiled: str | None = None
        self.gone = False
        self._state: PeftState | None = None
        self._spoken: object = None  # the last word of PEFT's set_adapter
        self._hooks: list[Any] = [None, None]  # accelerate's
        self._without: list[str] = []  # PEFT's adapters that are on no layer of ours
        self._anchor: tuple[PackedStore | None, dict[str, Any]] = None, {}  # parameters that say where the model is

    def follow(self, selection: Selection | None = None) -> None:
        """``selection``: adapters that the call to come may use, besides those in use; None: any.

        Read under the lock of the forwards, so that nothing is seen of a change of the bank that is under way.
        """
        bank = self.runtime.bank
        with bank.reading():
            if self.holds(selection):
                return
        with bank._changing():
            if not self.holds(selection):
                self.bring_up()

    def __getstate__(self) -> dict[str, Any]:
        return {"runtime": self.runtime}  # what was seen holds for one model only

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def agrees(self) -> bool:
        """What PEFT has set up for the call under way is something that the fused ops can do."""
        return self.uncompiled is None and not peft_layers.hooked_by_name(self.runtime.peft)

    def holds(self, selection: Selection | None) -> bool:
        runtime, bank = self.runtime, self.runtime.bank
        if not self._in_place() or not runtime.fused.holds():
            return False
        if self.gone:
            return True
        dora = bank.store.dora
        if dora is not None or self._state is not None:  # weights of adapters are watched: of those that count here
            used = bank._slots if selection is None else {*names_in(selection), *names_in(bank.in_use)}
            if dora is not None and dora.changed(self._slots_of(used)):
                return False
            if self._state is not None:
                return self._state.switches_hold() and self._state.adapters_hold(used)
        return list(vars(runtime.root).get("peft_config", ())) == self._without and not runtime.peft

    def _slots_of(self, names: Iterable[str]) -> list[int]:
        slots = self.runtime.bank._slots
        return [slots[name] for name in names if name in slots]

    def _in_place(self) -> bool:
        """The model is on the bank's device, and accelerate has put no hooks around it since."""
        return self._device() == self.runtime.bank.store.storage.device and self._read_hooks() == self._hooks

    def _read_hooks(self) -> list[Any]:
        return [vars(model).get("_hf_hook") for model in (self.runtime.model, self.runtime.root)]

    def _device(self) -> torch.device:
        """Where the first site's layer is; the bank's own if that can't be told."""
        store = self.runtime.bank.store
        if self._anchor[0] is not store:
            layer = self.runtime.fused.module_of(store.sites[0].name) if store.sites else nn.Module()
            base = getattr(layer, "base_layer", layer)
            self._anchor = store, base._parameters if any(True for _ in base.parameters()) else base._buffers
        weight = next((p for p in self._anchor[1].values() if p is not None), store.storage)
        return weight.device

    def bring_up(self, heeding: bool = True) -> None:
        """Alone with the bank; if stopped half-way it can be done again. ``heeding``: PEFT's ``set_adapter``."""
        runtime, bank = self.runtime, self.runtime.bank
        if not self._in_place():
            check_in_place(runtime.model, runtime.root)
            if self._device() != bank.store.storage.device:
                bank.move(self._device())
            runtime._entries, self._hooks = {}, self._read_hooks()
        if not runtime.fused.holds():
            runtime._on_new_projections()
        if self._state is not None and not self._state.attached() and not self._state.find_again():
            self.gone, self._state, bank._chosen, bank._fallback = True, None, None, NOTHING
            self._run_uncompiled("PEFT has taken its layers off (compile what is left anew)")
        if self.gone:
            return
        if self._state is None or not self._state.adapters_hold(bank._slots):
            self._bring_up_adapters()
        bank.store.follow_magnitudes()
        if self._state is not None:
            self._bring_up_switches(heeding)
        if self.uncompiled is None and (path := self._untraceable()) is not None:
            self._run_uncompiled(f"{path}: PEFT's DoRA unpacks the quantised weight, which can't be traced")

    def _untraceable(self) -> str | None:
        """A layer left to PEFT, of which Dynamo would make an error, not a break in its graph."""
        for path in self.runtime.unfused:
            layer = self.runtime.root.get_submodule(path)
            if isinstance(layer, LoraLayer) and adapted.has_dora(layer) and is_quantised(layer.get_base_layer()):
                return path
        return None

    def _bring_up_adapters(self) -> None:
        runtime, bank = self.runtime, self.runtime.bank
        self._check_no_other_adapters()
        self._find_new_layers()
        if not runtime.peft:
            self._without = list(vars(runtime.root).get("peft_config", ()))
            return
        check_in_place(runtime.model, runtime.root)
        if bank._peft is None:  # PEFT has come to a model that was compiled without it
            bank._peft, bank._read, bank._chosen = PeftLoader(runtime.model, runtime.root, bank), None, None
        self._follow_dtype()
        self._repack()
        new = [path for path, layer in runtime.peft.items() if not isinstance(layer, adapted.Adapted)]
        new += [path for path, each in bank.saved.wrappers.items() if not isinstance(each, AdaptedWrapper)]
        if new:  # room was reserved, so the bank is the same; but the layer is another object now
            runtime._on_new_store(f"PEFT has wrapped {len(new)} layer(s) that it had not, such as {new[0]}")
        peft_layers.note_dropout(runtime.peft)
        self._state = PeftState(runtime.root, runtime.peft, bank.saved.wrappers)

    def _bring_up_switches(self, heeding: bool) -> None:
        bank, layers, spoken = self.runtime.bank, self.runtime.peft, self._state.spoken
        names, reason = peft_layers.active_names(layers)
        ours = layers.keys() | bank.saved.wrappers.keys()
        if any(path in ours for path in self.runtime.unfused):
            reason = next(f"{path}: {why}" for path, why in self.runtime.unfused.items() if path in ours)
        if reason is None and len(names) > MAX_PAIRS:
            reason = f"{len(names)} adapters active, at most {MAX_PAIRS} can be fused (add_weighted_adapter makes one)"
        if reason is None:
            reason = bank.unfit((tuple((name, 1.0) for name in names),)) or disagreeing(bank.saved.wrappers, names)
        if heeding and self._spoken is not None and spoken is not self._spoken:
            bank._chosen = None  # PEFT's set_adapter spoke last
        self._spoken = spoken
        bank._disabled = reason is None and peft_layers.disabled(layers)
        bank._fallback = (tuple((name, 1.0) for name in names),) if reason is None else NOTHING
        self._run_uncompiled(reason)
        self._state.take_switches()

    def _run_uncompiled(self, reason: str | None) -> None:
        self.uncompiled = reason
        if reason is not None:
            warn_once(f"lorafx: {reason}: this model runs as PEFT computes it, uncompiled, until that ends.")

    def _check_no_other_adapters(self) -> None:
        bank, names = self.runtime.bank, list(vars(self.runtime.root).get("peft_config", ()))
        if names and bank._peft is None and (bank._slots or bank._shelf is not None):
            raise UnsupportedModelError(
                f"PEFT has put adapters ({', '.join(names)}) on a model that lorafx has given others"
                f" ({', '.join(bank._slots) or 'an AdapterStore'}). Take the former off with model.delete_adapter; or"
                " lorafx.uncompile(model), and compile it as it is now."
            )

    def _follow_dtype(self) -> None:
        """An empty store of another dtype, which is then filled from PEFT's layers."""
        bank, old = self.runtime.bank, self.runtime.bank.store
        dtype = peft_layers.dtype_of(self.runtime.peft)
        if dtype is None or dtype == old.storage.dtype:
            return
        capacities, biases = ({g.name: getattr(g, part) for g in old.geometry} for part in ("capacity", "biases"))
        dora = old.dora.sites if old.dora is not None else ()
        memory, factors = (dtype, old.storage.device), (self.runtime.root, dora)
        store = PackedStore(old.sites, capacities, biases, old.slots, *memory, factors, old.late)
        bank._commit({}, lambda: bank._switch_to(store, f"the adapters are {dtype} now"))

    def _find_new_layers(self) -> None:
        """PEFT's load_adapter may have adapted layers that no adapter did before."""
        runtime, bank = self.runtime, self.runtime.bank
        layers, unfused = peft_layers.supported_layers(runtime.root)
        new = {path: layer for path, layer in layers.items() if path not in runtime.peft}
        for layer in new.values():
            runtime.drop_hooks(layer.get_base_layer())  # which stood for room that was reserved
        runtime.peft.update(new)
        bank.saved.wrappers.update(suitable_wrappers(runtime.root)[0] if runtime.peft else {})
        bank.saved.paths = list(bank.saved.wrappers)
        runtime.unfused = {
            path: reason
            for path, reason in unfused.items()
            if path not in runtime.peft or adapted.other_variants(runtime.peft[path])
        }

    def _repack(self) -> None:
        """Bring the bank up to what stands in PEFT's layers now: adapters that came, went, were re-scaled or moved.

        What is to be written is copied first: it may be views of the very rows that are written.
        """
        bank, layers = self.runtime.bank, self.runtime.peft
        adapters = peft_layers.adapters_on(layers, vars(self.runtime.root).get("peft_config"))
        changed = {
            adapter.name: adapter.packed(bank.store.storage.dtype, bank.store.storage.device)
            for adapter in adapters
            if adapter.name not in bank._slots or not self._same(adapter)
        }
        for adapter in changed.values():
            adapter.check_finite()
        for name in bank._slots.keys() - {adapter.name for adapter in adapters}:
            slots = {k: v for k, v in bank._slots.items() if k != name}
            bank._commit(slots, lambda slot=bank._slots[name]: bank.store.clear(slot))
        try:
            while changed:
                self._put(next(iter(changed.values())))
                del changed[next(iter(changed))]
        finally:  # rows of other adapters may have moved
            peft_layers.share_memory(layers, bank, bank._slots.keys() - changed.keys())

    def _put(self, adapter: AdapterWeights) -> None:
        bank = self.runtime.bank
        slot = bank._slots.get(adapter.name)
        if slot is None:
            slot = bank.store.free_slot(bank._slots.values())
        slots = {**bank._slots, adapter.name: slot if slot is not None else bank.store.slots}
        bank._commit(slots, lambda: bank._place(adapter, slot))

    def _same(self, adapter: AdapterWeights) -> bool:
        """The bank's rows are this adapter's memory; scales are brought up to date on the way."""
        bank = self.runtime.bank
        held = bank.weights_of(adapter.name)
        if held.sites.keys() != adapter.sites.keys() or held.invocation != adapter.invocation:
            return False
        for path, site in adapter.sites.items():
            for mine, theirs in zip(held.sites[path].tensors(), site.tensors(), strict=True):
                if mine.data_ptr() != theirs.data_ptr() or mine.shape != theirs.shape:
                    return False
        for path, site in adapter.sites.items():
            if held.sites[path].scale != site.scale:
                bank.store.set_scale(bank._slots[adapter.name], path, site.scale)
        return True
