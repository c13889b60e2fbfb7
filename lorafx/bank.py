"""``model.lora``: the adapters that are loaded, and which of them is in use."""

from __future__ import annotations

import contextvars
import itertools
import logging
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorafx.adapters import AdapterOutline, AdapterWeights
from lorafx.dora import check_layers
from lorafx.errors import AdapterMismatchError, CapacityError, LorafxError, UnsupportedModelError
from lorafx.interrupts import uninterrupted
from lorafx.invocations import Prompt, Tokens, row_by_row
from lorafx.locking import ReadWriteLock
from lorafx.routing import Routing, Routings
from lorafx.saved_modules import Copies, SavedModules, copies_for
from lorafx.selection import NOTHING, Choice, Selection, names_in, normalize
from lorafx.store import PackedStore, Site

if TYPE_CHECKING:
    from lorafx.adapter_store import AdapterStore
    from lorafx.reading import AdapterReader

log = logging.getLogger("lorafx")

_keys = itertools.count(1)
_banks: weakref.WeakValueDictionary[int, AdapterBank] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class CallState:
    """What belongs to one call: its selection if it has one of its own, how many rows its batch has, while a forward
    runs, what that forward uses from its first layer to its last; and where aLoRA adapters are to begin."""

    selection: Selection | None
    batch: int | None
    pinned: Pinned | None = None
    prompt: Prompt | None = None


@dataclass(frozen=True)
class Pinned:
    """chosen, in_use: as the bank's properties of that name were when the forward began; and the routing of it."""

    chosen: Selection | None
    in_use: Selection
    routing: Routing


class AdapterBank:
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
        self.store = store
        self.lowering = lowering
        self.max_adapters = max_adapters
        self.max_rank = max_rank
        self._slots: dict[str, int] = {}
        self._chosen: Selection | None = None  # by use()
        self._fallback: Selection = NOTHING  # where nothing was chosen: what PEFT's switches say, on a PeftModel
        self._disabled = False  # by PEFT's disable_adapter
        self._held: Counter[str] = Counter()  # names that a generate under way has said
        self._read: AdapterReader | None = None  # how adapters are read for this model
        self.saved = SavedModules()  # modules that adapters have copies of
        self._root: nn.Module | None = None  # whose layers these are
        self._peft: Any = None  # on a PeftModel: a PeftLoader, since PEFT's layers hold the adapters too
        self._shelf: AdapterStore | None = None  # where adapters come from that are not loaded
        self._follow: Callable[[], None] = lambda: None  # brings the bank up to PEFT's layers
        self._changing_peft: Callable[[str], AbstractContextManager[None]] = nullcontext  # with the bank after them
        self._on_new_store: Callable[[str | None], None] = lambda reason: None
        self._guard_use: Callable[[Selection], None] = lambda selection: None
        self._begin()

    def _begin(self) -> None:
        """What can't be copied or pickled, and is made anew in a copy."""
        self._lock = ReadWriteLock()
        self._counting = threading.Lock()  # of what is held
        self._call: contextvars.ContextVar[CallState | None] = contextvars.ContextVar("lorafx_call", default=None)
        self._routings = Routings()
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

    # ------------------------------------------------------------------------------------------ choosing

    def use(self, choice: Choice) -> None:
        """Use an adapter from the next call on: a name, None (the base model), ``{name: weight}``, or a list of these,
        one for each row of the batch (rows that generate repeats for beams follow).

        AdapterMismatchError: an adapter that is not loaded, and that no AdapterStore has
        """
        self._follow()
        selection = normalize(choice)
        self._guard_use(selection)
        self._choose(selection)

    def _choose(self, selection: Selection | None) -> None:
        if self._shelf is not None:
            self._shelf.choose(selection)
            return
        with self._lock.reading():  # so that no other thread unloads it now
            self._chosen = self._known(selection) if selection is not None else None

    @contextmanager
    def using(self, choice: Choice) -> Iterator[AdapterBank]:
        """``use`` for the length of a ``with`` block; then what was in use before. It holds for all threads:
        ``adapter_names`` of a call is for that call alone."""
        before = self._chosen
        self.use(choice)
        try:
            yield self
        finally:
            self._choose(before)

    @property
    def in_use(self) -> Selection:
        """What a call without ``adapter_names`` takes now: for each row, or once for all, pairs (name, weight)."""
        state = self._call.get()
        if state is not None and state.pinned is not None:
            return state.pinned.in_use
        chosen = self.chosen
        return chosen if chosen is not None else self._fallback

    @property
    def chosen(self) -> Selection | None:
        """``in_use`` where it was said through lorafx; None where PEFT's own switches decide."""
        state = self._call.get()
        if state is not None and state.pinned is not None:
            return state.pinned.chosen
        if self._disabled:
            return NOTHING
        return state.selection if state is not None and state.selection is not None else self._chosen

    @property
    def chosen_by_call(self) -> bool:
        """The call that is under way has a selection of its own."""
        state = self._call.get()
        return state is not None and state.selection is not None

    def check_rows(self, selection: Selection) -> None:
        """UnsupportedModelError: adapters that can't share a row, or can't be weighted"""
        if reason := self.unfit(selection):
            raise UnsupportedModelError(f"{reason}. Use such an adapter alone on its row, and with weight 1.")

    def unfit(self, selection: Selection) -> str | None:
        """Why some row of ``selection`` asks for what can't be fused; None if none does."""
        if clash := self.saved.clash(selection):
            return clash
        for name in self._late_in(selection):
            if any(len(row) > 1 for row in selection if name in dict(row)):
                return f"{name} is aLoRA, which begins at a place of its own, and those beside it do not"
        if self.store.dora is None:
            return None
        for row in selection:
            dora = [name for name, _ in row if name in self._slots and self.store.dora.held[self._slots[name]]]
            if dora and len(row) > 1:
                return f"{dora[0]} has DoRA, which scales what the adapters beside it give"
            if dora and row[0][1] != 1.0:
                return f"{dora[0]} has DoRA, whose norms are those of weight 1"
        return None

    def _known(self, selection: Selection) -> Selection:
        unknown = names_in(selection) - self._slots.keys()
        if unknown:
            raise AdapterMismatchError(
                f"no adapter {', '.join(map(repr, sorted(unknown)))} is loaded; there are"
                f" {', '.join(map(repr, self._slots)) or 'none'}. Load it with model.lora.load(name, source)."
            )
        return selection

    # ------------------------------------------------------------------------------------------ calling

    @contextmanager
    def calling(self, selection: Selection | None, batch: int | None, prompt: Prompt | None = None) -> Iterator[None]:
        """Calls of the model with a selection of their own (None: as outside), the number of their rows, and where
        aLoRA adapters are to begin (None: as outside)."""
        outer = self._call.get() or CallState(None, None)
        prompt = prompt or outer.prompt
        holding: AbstractContextManager[None] = nullcontext()
        if selection is None:
            state = CallState(outer.selection, batch, outer.pinned, prompt)
        else:
            state = CallState(selection, batch, None, prompt)
            if self._shelf is not None and outer.pinned is None:  # a forward must not wait for a change
                holding = self._shelf.holding(names_in(selection))
        with holding:
            token = self._call.set(state)
            try:
                yield
            finally:
                self._call.reset(token)

    @contextmanager
    def held(self, selection: Selection) -> Iterator[None]:
        """These adapters can't be unloaded meanwhile, not even between two forwards, as those of generate are."""
        names = names_in(selection)
        with self._lock.reading(), self._counting:
            self._known(selection)
            self._held.update(names)
        try:
            yield
        finally:
            with self._counting:
                self._held.subtract(names)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """One forward: the bank can't change meanwhile, and what is in use now stays in use to the last layer."""
        with self._lock.reading():
            state = self._call.get() or CallState(None, None)
            if state.pinned is None:
                in_use = self.in_use
                pinned = Pinned(self.chosen, in_use, self._routing_now(in_use))
                state = CallState(state.selection, state.batch, pinned, state.prompt)
            token = self._call.set(state)
            try:
                yield
            finally:
                self._call.reset(token)

    def routing(self) -> Routing:
        """The routing of the forward that is under way; of what is in use, where a layer is called by itself."""
        state = self._call.get()
        if state is not None and state.pinned is not None:
            return state.pinned.routing
        with self._lock.reading():
            return self._routing_now(self.in_use)

    @property
    def needs_prompt(self) -> bool:
        """A call has to say where aLoRA adapters begin, and nothing around it has said so."""
        state = self._call.get()
        return bool(self.store.late) and (state is None or state.prompt is None)

    @property
    def late_in_use(self) -> bool:
        """The forward that is under way uses aLoRA adapters."""
        return bool(self.store.late) and bool(self._late_in(self.in_use))

    def _late_in(self, selection: Selection) -> dict[str, Tokens]:
        """The aLoRA adapters among those named, with their invocation tokens."""
        if not self.store.late:
            return {}
        named = [(name, self._slots[name]) for name in names_in(selection) if name in self._slots]
        return {name: self.store.invocations[slot] for name, slot in named if self.store.invocations[slot]}

    def _routing_now(self, selection: Selection) -> Routing:
        """Of the call that is under way: with aLoRA adapters that depends on its prompt."""
        late = self._late_in(selection)
        if not late:
            return self._routing_of(selection)
        state = self._call.get() or CallState(None, None)
        prompt = state.prompt or Prompt()
        if prompt.offsets is None and self.chosen is None:  # PEFT's switches decide, and PEFT has given no offsets
            prompt = Prompt(offsets=())
        elif prompt.offsets is None and prompt.ids is None:
            warn_once(
                f"lorafx: {next(iter(late))} is aLoRA, which begins at its invocation tokens, and a call without"
                " input_ids does not say where they are: it stays off. Pass input_ids, or alora_offsets."
            )
        return self._routing_of(*row_by_row(selection, state.batch or len(selection), late, prompt))

    def _routing_of(self, selection: Selection, last: tuple[int, ...] = ()) -> Routing:
        """Kept, since one selection often serves many calls; under the lock, since a change of the bank forgets it."""
        late = last if self.store.late else None
        made = self._routings.kept(selection, late)
        if made is None:
            self.check_rows(selection)
            try:
                made = self._routings.make(selection, self._slots, self.store.storage.device, late)
            except KeyError:
                self._known(selection)
                raise
        return made

    @property
    def batch(self) -> int | None:
        """Rows of the batch of the call that is under way, where known."""
        state = self._call.get()
        return state.batch if state is not None else None

    def reading(self) -> AbstractContextManager[None]:
        """Hold off changes of the bank, as a forward does."""
        return self._lock.reading()

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
        self._admit(outline, slot)  # before any weight is read
        adapter = outline.read()
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

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Alone with the bank: forwards are waited for, Ctrl-C waits. What is made outlives inference mode.

        On a GPU, what forwards have launched is waited for too, and they for what is written: threads may use streams
        of their own, which nothing else puts in order.
        """
        with self._lock.writing(), uninterrupted(), torch.inference_mode(False), torch.no_grad():
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
        late = self.store.takes_late(adapter)
        if (slot is not None and late) and (
            self.store.holds(slot, adapter.layout) or self.store.find_room(adapter.shapes, instead_of=slot)
        ):
            return self.store.put(slot, adapter)  # nothing comes after it: see _commit
        missing = [path for path in adapter.sites if path not in self.store.index]
        reason = (
            f"adapter {adapter.name!r} adapts {len(missing)} layer(s) that none did before, such as {missing[0]}"
            " (target_modules reserves room there)"
            if missing
            else f"adapter {adapter.name!r} has DoRA on layers where none had it before"
            if not self.store.takes_dora(adapter.shapes)
            else f"adapter {adapter.name!r} is aLoRA on layers where none was before"
            if not late
            else f"adapter {adapter.name!r} needs more room than was reserved (max_adapters, max_rank reserve it)"
        )
        return self._switch_to(self._larger(adapter, slot), reason)

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

    def _larger(self, adapter: AdapterWeights, slot: int | None) -> PackedStore:
        """A new store with what this one holds, except slot ``slot``, and with ``adapter``."""
        old = self.store
        names = {at: name for name, at in self._slots.items() if at != slot and name != adapter.name}
        weights = {at: self._weights_in(at, name) for at, name in names.items()}
        slots = old.slots if slot is not None else old.slots + 1
        slot = slot if slot is not None else old.slots
        weights[slot] = adapter
        sites = {site.name: site for site in old.sites}
        for path, site in adapter.sites.items():
            sites.setdefault(path, Site(path, site.a.shape[1], site.b.shape[0], site.experts))
        capacities = {g.name: g.capacity for g in old.geometry}
        biases = {g.name: g.biases for g in old.geometry}
        for path in sites:
            here = [w.sites[path] for w in weights.values() if path in w.sites]
            capacities[path] = max(capacities.get(path, 0), sum(s.rank for s in here))
            biases[path] = max(biases.get(path, 0), sum(s.bias is not None for s in here))
        dora = {*(old.dora.sites if old.dora is not None else ())}
        dora.update(path for path, shape in adapter.shapes.items() if shape.dora)
        late = old.late.union(adapter.sites if adapter.invocation else ())
        memory = old.storage.dtype, old.storage.device
        store = PackedStore(list(sites.values()), capacities, biases, slots, *memory, (self._root, dora), late)
        for at, held_weights in weights.items():
            store.put(at, held_weights)
        return store

    def weights_of(self, name: str) -> AdapterWeights:
        """What the bank holds of ``name``: views of its memory."""
        return self._weights_in(self._slot(name), name)

    def _weights_in(self, slot: int, name: str) -> AdapterWeights:
        scales = self.store.scale[slot].tolist()
        return AdapterWeights(
            name,
            {path: self.store.weights(slot, path, scales[self.store.index[path]]) for path in self.store.taken[slot]},
            invocation=self.store.invocations[slot],
        )

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
        """One dict for each adapter: name, rank (all of them, where layers differ), targets, layers, bytes, in use."""
        self._catch_up()
        item = self.store.storage.element_size()
        rows = []
        for name in self._slots:
            weights = self.weights_of(name)
            rows.append(
                {
                    "name": name,
                    "rank": ", ".join(map(str, weights.ranks)),
                    "targets": ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in weights.sites)),
                    "layers": len(weights.sites),
                    "bytes": weights.elements() * item,
                    "in use": "yes" if name in names_in(self.in_use) else "",
                }
            )
        return rows

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


def warn_once(message: str, seen: set[str] = set()) -> None:  # noqa: B006  (the memory of what was said)
    """One warning, once, for what costs a user speed."""
    if message not in seen:
        seen.add(message)
        warnings.warn(message, stacklevel=3)


def _finish_launched(device: torch.device) -> None:
    """Wait for all streams of a GPU."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def as_mapping(adapters: Any) -> Mapping[str, Any]:
    """``adapters`` of ``compile`` as name -> source; a path alone is named after its folder, a file without its end."""
    from pathlib import Path

    from lorafx.formats.opening import SUFFIXES

    def name_of(path: Any) -> str:
        return Path(path).stem if Path(path).suffix in SUFFIXES else Path(path).name

    if adapters is None:
        return {}
    if isinstance(adapters, Mapping) and not (adapters and all(isinstance(v, torch.Tensor) for v in adapters.values())):
        return adapters
    if isinstance(adapters, (list, tuple)) and all(isinstance(item, (str, Path)) for item in adapters):
        names = [name_of(item) for item in adapters]
        if len(set(names)) < len(names):
            raise AdapterMismatchError(f"two of these adapters have one name: {names}; pass a dict name -> path")
        return dict(zip(names, adapters, strict=True))
    if isinstance(adapters, (str, Path)):
        return {name_of(adapters): adapters}
    return {"default": adapters}
