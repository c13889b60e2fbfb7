"""``model.lora``: the adapters that are loaded, and which of them is in use."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorafx.adapters import AdapterOutline, AdapterWeights
from lorafx.choosing import Choosing
from lorafx.dora import check_layers
from lorafx.errors import AdapterMismatchError, CapacityError, LorafxError, UnsupportedModelError
from lorafx.growing import larger, why_larger
from lorafx.interrupts import uninterrupted
from lorafx.passes.naming import last_name
from lorafx.saved_modules import Copies, copies_for
from lorafx.selection import NOTHING, Selection, names_in
from lorafx.store import PackedStore

if TYPE_CHECKING:
    from lorafx.reading import AdapterReader

_keys = itertools.count(1)
_banks: weakref.WeakValueDictionary[int, AdapterBank] = weakref.WeakValueDictionary()


class AdapterBank(Choosing):
    """The adapters of one model, packed, and which of them the next call uses.

    ``use`` and ``using`` choose; ``load``, ``replace`` and ``unload`` change what is there while the model runs.
    Changes wait for the forwards that are under way, and are all or nothing.
    """

    def __init__(
        self,
        store: PackedStore,
        *,
        lowering: str = "auto",
        max_adapters: int | None = None,
        max_rank: int | None = None,
    ) -> None:
        super().__init__(store)
        self.lowering = lowering
        self.max_adapters = max_adapters
        self.max_rank = max_rank
        self._read: AdapterReader | None = None  # how adapters are read for this model
        self._root: nn.Module | None = None  # whose layers these are
        self._peft: Any = None  # on a PeftModel: a PeftLoader, since PEFT's layers hold the adapters too
        self._changing_peft: Callable[[str], AbstractContextManager[None]] = nullcontext  # with the bank after them
        self._on_new_store: Callable[[str | None], None] = lambda reason: None

    def _begin(self) -> None:
        super()._begin()
        self._renew_key()

    def _renew_key(self, key: int | None = None) -> None:
        self.key = next(_keys) if key is None else key
        _banks[self.key] = self

    def __getstate__(self) -> dict:
        left_out = ("_lock", "_counting", "_call", "_routings", "key")
        return {**{k: v for k, v in vars(self).items() if k not in left_out}, "_held": Counter(), "_shelf": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._begin()

    # ------------------------------------------------------------------------------------------ changing

    def read(self, source: Any, name: str = "adapter") -> AdapterWeights:
        """An adapter's weights, read and checked but not loaded; ``load`` and ``replace`` take them as a source, and
        then cost little more than a copy of their bytes."""
        return self._reader().open(name, source).read()

    def load(self, name: str, source: Any) -> None:
        """Load an adapter under a new name: a PEFT folder, a state dict, a (state dict, config) pair, or what ``read``
        gave.

        Where there is no room it is made, which costs one trace of the model, unless ``max_adapters`` or ``max_rank``
        forbid it. After an error nothing has changed.

        AdapterFormatError: not an adapter
        AdapterMismatchError: does not fit the model, or the name is taken
        CapacityError: more adapters than ``max_adapters``, or a rank above ``max_rank``
        """
        self._follow()
        self._check_free(name)
        if self._peft is not None:
            self._peft.load(name, source)
            return
        outline = self._reader().open(name, source)
        self._admit(outline)  # before any weight is read
        self.add(outline.read())

    def replace(self, name: str, source: Any) -> None:
        """Put another adapter in the place of ``name``, which may be in use; its rank and layers may differ.

        AdapterMismatchError: ``name`` is not loaded; and the errors of ``load``
        """
        self._follow()
        slot = self._slot(name)
        if self._peft is not None:
            self._peft.replace(name, source)
            return
        outline = self._reader().open(name, source)
        if not self.store.holds(slot, outline.layout):
            self._admit(outline, slot)  # before any weight is read
        adapter = outline.read()
        if self.store.holds(slot, adapter.layout) and self._rewrite(name, adapter):
            return
        with self._changing():
            slot = self._slot(name)
            if not self.store.holds(slot, adapter.layout):
                self._admit(outline, slot)  # again: other threads may have taken the room
            self._commit(self._slots, lambda: self._place(adapter, slot), self._with_copies(adapter))

    def unload(self, name: str) -> None:
        """Forget an adapter and free its rows.

        AdapterMismatchError: not loaded, or in use
        """
        self._follow()
        self._slot(name)
        if self._peft is not None:
            self._peft.unload(name)
            return
        with self._changing():
            slot = self._slot(name)
            self._check_unused(name)
            slots = {k: v for k, v in self._slots.items() if k != name}
            own = {k: v for k, v in self.saved.own.items() if k != name}
            self._commit(slots, lambda: self.store.clear(slot), own)

    def add(self, adapter: AdapterWeights) -> None:
        """``load`` for an adapter that is read already."""
        with self._changing():
            self._check_free(adapter.name)
            self._admit(adapter.outline)
            slot = self.store.free_slot(self._slots.values())
            after = {**self._slots, adapter.name: self.store.slots if slot is None else slot}
            self._commit(after, lambda: self._place(adapter, slot), self._with_copies(adapter))

    def room_without(self, leaving: Collection[str], coming: Sequence[AdapterOutline]) -> bool:
        """Whether ``coming`` would fit, all of them, once the adapters named in ``leaving`` are gone."""
        used = {slot for name, slot in self._slots.items() if name not in leaving}
        free = [slot for slot in range(self.store.slots) if slot not in used]
        fits = len(free) >= len(coming) and self.store.fits(free, [adapter.sites for adapter in coming])
        return fits and all(map(self.store.takes_late, coming))

    def exchange(
        self,
        leaving: Sequence[str],
        coming: Sequence[AdapterWeights],
        choice: tuple[Selection | None] | None = None,
    ) -> None:
        """Some adapters for others, and with ``choice`` another selection in use, in one step, all or nothing.

        CapacityError: no room; AdapterMismatchError: ``choice`` names one that is not there then
        """
        with self._changing():
            before, chosen = self._slots, self._chosen
            after = {name: slot for name, slot in before.items() if name not in leaving}
            slots = [before[name] for name in leaving]
            slots += [slot for slot in range(self.store.slots) if slot not in before.values()]
            if len(slots) < len(coming):
                raise CapacityError(f"no slots for {len(coming)} adapters: {len(slots)} are free or to be freed")
            after.update(zip([adapter.name for adapter in coming], slots, strict=False))
            kept = [
                self.weights_of(name).packed(self.store.storage.dtype, self.store.storage.device) for name in leaving
            ]
            touched = slots[: max(len(leaving), len(coming))]
            try:
                for slot, adapter in zip_longest(touched, coming):
                    if adapter is None or not self.store.holds(slot, adapter.layout):
                        self.store.clear(slot)  # all of them first: any may need the rows of any
                for slot, adapter in zip(slots, coming, strict=False):
                    self.store.put(slot, adapter)
                self._slots = after
                if choice is not None:
                    self.check_rows(choice[0] or NOTHING)
                    self._chosen = self._known(choice[0]) if choice[0] is not None else None
            except BaseException:
                self._slots, self._chosen = before, chosen
                for slot in touched:
                    self.store.clear(slot)
                for name, weights in zip(leaving, kept, strict=True):
                    self.store.put(before[name], weights)
                raise

    def _reader(self) -> AdapterReader:
        if self._read is None:
            raise UnsupportedModelError(
                "this model's adapters are PEFT's; give load and replace a PEFT folder, a state dict or a pair (state"
                " dict, config)"
            )
        return self._read

    def _rewrite(self, name: str, adapter: AdapterWeights) -> bool:
        """``replace`` where nothing but the numbers of rank rows changes, if it is so. Ctrl-C need not wait for one
        call, and seeing to that costs a third of what Python does here."""
        with self._alone():
            copies = adapter.saved or name in self.saved.own
            return not copies and self.store.rewrite(self._slot(name), adapter)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Alone with the bank, and Ctrl-C waits."""
        with self._alone(), uninterrupted():
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Forwards are waited for. What is made outlives inference mode.

        On a GPU, what forwards have launched is waited for too, and they for what is written: threads may use streams
        of their own, which nothing else puts in order.
        """
        with self._lock.writing(), torch.inference_mode(False), torch.no_grad():
            _finish_launched(self.store.storage.device)
            try:
                yield
                _finish_launched(self.store.storage.device)
            finally:
                self._routings.forget()

    def _commit(self, slots: dict[str, int], write: Callable[[], None], own: Copies | None = None) -> None:
        """Names and memory change together: ``write`` is all or nothing, and nothing comes after it."""
        before = self._slots, self.saved.own
        try:
            self._slots, self.saved.own = slots, self.saved.own if own is None else own
            write()
        except BaseException:
            self._slots, self.saved.own = before
            raise

    def _with_copies(self, adapter: AdapterWeights) -> Copies:
        """All copies of modules, with those of ``adapter``; places for them are made, which costs one trace."""
        copies = copies_for(self._root, adapter.name, adapter.saved) if adapter.saved else {}
        before, new = self.saved.paths, [path for path in copies if path not in self.saved.paths]
        if new:
            try:
                self.saved.paths = before + new
                self._switch_to(self.store, f"adapter {adapter.name!r} is the first to bring its own {new[0]}")
            except BaseException:
                self.saved.paths = before
                raise
        own = {name: held for name, held in self.saved.own.items() if name != adapter.name}
        return {**own, adapter.name: copies} if copies else own

    def _slot(self, name: str) -> int:
        slot = self._slots.get(name) if isinstance(name, str) else None
        if slot is None:
            self._known((((name, 1.0),),))
        return slot

    def _check_free(self, name: str) -> None:
        if not isinstance(name, str) or not name or name == "__base__":
            raise AdapterMismatchError(f"got {name!r} as the name of an adapter; expected a text other than '__base__'")
        if name in self._slots:
            raise AdapterMismatchError(
                f"an adapter {name!r} is loaded already; use model.lora.replace, or another name"
            )

    def _check_unused(self, name: str) -> None:
        if name in names_in(self._chosen or self._fallback):
            raise AdapterMismatchError(f"adapter {name!r} is in use; call model.lora.use(None) or use another first")
        if self._held[name] > 0:
            raise AdapterMismatchError(f"adapter {name!r} is in use by a generate that is under way; wait for its end")

    def _place(self, adapter: AdapterWeights, slot: int | None) -> None:
        """Write ``adapter`` into ``slot`` (None: a new one), with a larger store if it does not fit this one."""
        if (slot is not None and self.store.takes_late(adapter)) and (
            self.store.holds(slot, adapter.layout) or self.store.find_room(adapter.shapes, instead_of=slot)
        ):
            return self.store.put(slot, adapter)  # nothing comes after it: see _commit
        reason = why_larger(self.store, adapter)
        names = {at: name for name, at in self._slots.items() if at != slot and name != adapter.name}
        return self._switch_to(larger(self.store, names, adapter, slot, self._root), reason)

    def _switch_to(self, store: PackedStore, reason: str) -> None:
        """All or nothing, as ``PackedStore.put`` is."""
        old, key = self.store, self.key
        try:
            self.store = store
            self._renew_key()
            self._on_new_store(reason)
        except BaseException:
            self.store = old
            self._renew_key(key)
            self._on_new_store(None)
            raise

    def _admit(self, adapter: AdapterOutline, slot: int | None = None) -> None:
        """Nothing, where ``adapter`` fits or room may be made; ``slot``: the one that it is to replace.

        CapacityError: max_adapters or max_rank says no
        """
        check_layers(self._root, adapter.sites)
        if slot is None:
            slot = self.store.free_slot(self._slots.values())
        if slot is None and self.max_adapters is not None:
            raise CapacityError(
                f"no room for adapter {adapter.name!r}: {len(self._slots)} are loaded and max_adapters is"
                f" {self.max_adapters}. Unload one, or compile with a larger max_adapters."
            )
        too_large = self.max_rank is not None and adapter.ranks and adapter.ranks[-1] > self.max_rank
        if too_large and (slot is None or self.store.find_room(adapter.sites, instead_of=slot) is None):
            raise CapacityError(
                f"adapter {adapter.name!r} has rank {adapter.ranks[-1]}, max_rank is {self.max_rank}."
                " Compile with a larger max_rank."
            )

    def weights_of(self, name: str) -> AdapterWeights:
        """What the bank holds of ``name``: views of its memory."""
        return self.store.adapter(self._slot(name), name)

    def move(self, device: torch.device) -> None:
        """Follow the model to another device."""
        with self._changing():
            self.store.to(device)
            self._renew_key()

    # ------------------------------------------------------------------------------------------ looking

    @property
    def names(self) -> list[str]:
        """Loaded adapters, in the order of loading."""
        self._catch_up()
        return list(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes of all storage that the bank holds, reserved room included."""
        self._catch_up()
        return self.store.nbytes + self.saved.nbytes

    @property
    def reserved(self) -> int:
        """Bytes of ``nbytes`` that no adapter has taken yet."""
        self._catch_up()
        return self.store.reserved

    @property
    def window(self) -> int:
        """Bytes of ``nbytes`` in fold windows: none, since the C++ lowering folds without copying anything."""
        return 0

    def _catch_up(self) -> None:
        """With what PEFT's verbs have done since the last call. What is refused is refused at the next one."""
        with suppress(LorafxError):
            self._follow()

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def table(self) -> list[dict[str, Any]]:
        """One dict for each adapter: name, rank (all of them, where layers differ), targets, layers, bytes, in use; and
        kind, where any is more than plain LoRA."""
        self._catch_up()
        with self.reading():
            rows = [self._row(name) for name in self._slots]
            kinds = [self._kind(name) for name in self._slots]
        return [{**row, "kind": kind} for row, kind in zip(rows, kinds, strict=True)] if any(kinds) else rows

    def _row(self, name: str) -> dict[str, Any]:
        weights = self.weights_of(name)
        return {
            "name": name,
            "rank": ", ".join(map(str, weights.ranks)),
            "targets": ", ".join(dict.fromkeys(map(last_name, weights.sites))),
            "layers": len(weights.sites),
            "bytes": weights.elements() * self.store.storage.element_size(),
            "in use": "yes" if name in names_in(self.in_use) else "",
        }

    def _kind(self, name: str) -> str:
        """What an adapter is besides plain LoRA; an empty text if it is nothing else."""
        weights = self.weights_of(name)
        kinds = ["DoRA"] * any(site.magnitude is not None for site in weights.sites.values())
        kinds += ["aLoRA"] * bool(weights.invocation)
        own = [path.rpartition(".")[2] for path in self.saved.paths if name in self.saved.copies(path)]
        return ", ".join([*kinds, *(f"its own {last}" for last in dict.fromkeys(own))])

    def __repr__(self) -> str:
        from lorafx.tables import format_table

        rows = self.table()
        head = f"AdapterBank: {len(rows)} adapter(s), {self.nbytes:,} bytes, {self.reserved:,} of them reserved"
        return head + ("\n" + format_table(rows) if rows else "")

    def _repr_html_(self) -> str:
        from lorafx.tables import html_table

        return f"<p>AdapterBank: {self.nbytes:,} bytes, {self.reserved:,} reserved</p>" + html_table(self.table())


def bank_of(key: int) -> AdapterBank:
    """The bank whose markers carry ``key``.

    LorafxError: that bank is gone, or has been packed anew since
    """
    bank = _banks.get(key)
    if bank is None or bank.key != key:
        raise LorafxError(
            "a graph was made for a bank that is gone: the model was uncompiled or its bank packed anew. Call the model"
            " itself, not something compiled from it earlier."
        )
    return bank


def _finish_launched(device: torch.device) -> None:
    """Wait for all streams of a GPU."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
