"""``model.lora``: the adapters that are loaded, and which of them is in use."""

from __future__ import annotations

import contextvars
import itertools
import logging
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lorafx.adapters import AdapterWeights
from lorafx.errors import AdapterMismatchError, CapacityError, LorafxError
from lorafx.locking import ReadWriteLock
from lorafx.routing import Routing, make_routing
from lorafx.selection import NOTHING, Choice, Selection, names_in, normalize
from lorafx.store import PackedStore, Site

log = logging.getLogger("lorafx")

_keys = itertools.count(1)
_banks: weakref.WeakValueDictionary[int, AdapterBank] = weakref.WeakValueDictionary()
ROUTINGS_KEPT = 256  # made routings, by selection


@dataclass(frozen=True)
class CallState:
    """What belongs to one call: its selection if it has one of its own, and how many rows its batch has."""

    selection: Selection | None
    batch: int | None


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
        self._read: Callable[[str, Any], AdapterWeights] | None = None  # how adapters are read for this model
        self._peft: Any = None  # on a PeftModel: a PeftLoader, since PEFT's layers hold the adapters too
        self._follow: Callable[[], None] = lambda: None  # brings the bank up to PEFT's layers
        self._on_new_store: Callable[[str], None] = lambda reason: None
        self._guard_use: Callable[[Selection], None] = lambda selection: None
        self._begin()

    def _begin(self) -> None:
        """What can't be copied or pickled, and is made anew in a copy."""
        self._lock = ReadWriteLock()
        self._call: contextvars.ContextVar[CallState | None] = contextvars.ContextVar("lorafx_call", default=None)
        self._routings: OrderedDict[Selection, Routing] = OrderedDict()
        self._renew_key()

    def _renew_key(self) -> None:
        self.key = next(_keys)
        _banks[self.key] = self

    def __getstate__(self) -> dict:
        return {k: v for k, v in vars(self).items() if k not in ("_lock", "_call", "_routings", "key")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._begin()

    # ------------------------------------------------------------------------------------------ choosing

    def use(self, choice: Choice) -> None:
        """Use an adapter from the next call on: a name, None (the base model), ``{name: weight}``, or a list of these,
        one for each row of the batch (rows that generate repeats for beams follow).

        AdapterMismatchError: an adapter that is not loaded
        """
        self._follow()
        selection = self._known(normalize(choice))
        self._guard_use(selection)
        self._chosen = selection

    @contextmanager
    def using(self, choice: Choice) -> Iterator[AdapterBank]:
        """``use`` for the length of a ``with`` block; then what was in use before."""
        before = self._chosen
        self.use(choice)
        try:
            yield self
        finally:
            self._chosen = before

    @property
    def in_use(self) -> Selection:
        """The selection that a call without ``adapter_names`` takes now."""
        chosen = self.chosen
        return chosen if chosen is not None else self._fallback

    @property
    def chosen(self) -> Selection | None:
        """``in_use`` where it was said through lorafx; None where PEFT's own switches decide."""
        if self._disabled:
            return NOTHING
        state = self._call.get()
        return state.selection if state is not None and state.selection is not None else self._chosen

    def _known(self, selection: Selection) -> Selection:
        unknown = names_in(selection) - self._slots.keys()
        if unknown:
            raise AdapterMismatchError(
                f"no adapter {', '.join(map(repr, sorted(unknown)))} is loaded; there are"
                f" {', '.join(map(repr, self._slots)) or 'none'}. Load it with model.lora.load(name, source)."
            )
        return selection

    @contextmanager
    def calling(self, selection: Selection | None, batch: int | None) -> Iterator[None]:
        """One call: its own selection (None: as outside it) and its number of rows."""
        outer = self._call.get()
        if selection is None and outer is not None:
            selection = outer.selection
        token = self._call.set(CallState(selection, batch))
        try:
            yield
        finally:
            self._call.reset(token)

    def routing(self) -> Routing:
        """The routing of the call that is under way."""
        selection = self.in_use
        made = self._routings.get(selection)
        if made is None:
            self._known(selection)
            rows = [tuple((self._slots[name], weight) for name, weight in row) for row in selection]
            made = make_routing(rows, self.store.storage.device)
            self._routings[selection] = made
            while len(self._routings) > ROUTINGS_KEPT:
                self._routings.pop(next(iter(self._routings)), None)
        return made

    @property
    def batch(self) -> int | None:
        """Rows of the batch of the call that is under way, where known."""
        state = self._call.get()
        return state.batch if state is not None else None

    def reading(self):
        """Hold off changes of the bank, as a forward does."""
        return self._lock.reading()

    # ------------------------------------------------------------------------------------------ changing

    def load(self, name: str, source: Any) -> None:
        """Load an adapter under a new name: a PEFT folder, a state dict, or a (state dict, config) pair.

        AdapterFormatError: not an adapter; AdapterMismatchError: does not fit the model, or the name is taken;
        CapacityError: more adapters than ``max_adapters``. In each case nothing has changed.
        """
        self._check_free(name)
        if self._peft is not None:
            with self._changing_peft():
                self._peft.load(name, source, self._admit)
        else:
            self.add(self._read(name, source))

    def replace(self, name: str, source: Any) -> None:
        """Put another adapter in the place of ``name``, which may be in use; its rank and layers may differ."""
        if name not in self._slots:
            self._known((((name, 1.0),),))
        if self._peft is not None:
            with self._changing_peft():
                self._peft.replace(name, source, lambda adapter: self._admit(adapter, self._slots[name]))
            return
        adapter = self._read(name, source)
        with self._lock.writing():
            self._admit(adapter, self._slots[name])
            self._place(adapter, self._slots[name])

    def unload(self, name: str) -> None:
        """Forget an adapter and free its rows.

        AdapterMismatchError: not loaded, or in use
        """
        self._known((((name, 1.0),),))
        if name in names_in(self._chosen or self._fallback):
            raise AdapterMismatchError(f"adapter {name!r} is in use; call model.lora.use(None) or use another first")
        if self._peft is not None:
            with self._changing_peft():
                self._peft.unload(name)
            return
        with self._lock.writing():
            self.store.clear(self._slots[name])
            del self._slots[name]
            self._routings.clear()

    def add(self, adapter: AdapterWeights) -> None:
        """``load`` for an adapter that is read already."""
        self._check_free(adapter.name)
        with self._lock.writing():
            self._admit(adapter)
            slot = self._place(adapter, self.store.free_slot(self._slots.values()))
            self._slots[adapter.name] = slot
            self._routings.clear()

    @contextmanager
    def _changing_peft(self) -> Iterator[None]:
        """PEFT's layers change inside, and the bank after them; what ``use`` chose stays."""
        self._follow()
        chosen = self._chosen
        with self._lock.writing():
            yield
        self._follow()
        self._chosen = chosen

    def _check_free(self, name: str) -> None:
        if not isinstance(name, str) or not name or name == "__base__":
            raise AdapterMismatchError(f"got {name!r} as the name of an adapter; expected a text other than '__base__'")
        if name in self._slots:
            raise AdapterMismatchError(
                f"an adapter {name!r} is loaded already; use model.lora.replace, or another name"
            )

    def _place(self, adapter: AdapterWeights, slot: int | None) -> int:
        """Write ``adapter`` into ``slot`` (None: a new one), with a larger store if it does not fit this one."""
        if slot is not None and self.store.find_room(adapter, instead_of=slot) is not None:
            self.store.put(slot, adapter)
            return slot
        old = self.store
        store, slot = self._larger(adapter, slot)
        missing = [path for path in adapter.sites if path not in old.index]
        reason = (
            f"adapter {adapter.name!r} adapts {len(missing)} layer(s) that none did before, such as {missing[0]}"
            if missing
            else f"adapter {adapter.name!r} needs more room than was reserved (max_adapters, max_rank reserve it)"
        )
        self.store = store
        self._renew_key()
        self._routings.clear()
        try:
            self._on_new_store(reason)
        except BaseException:
            self.store = old
            raise
        return slot

    def _admit(self, adapter: AdapterWeights, slot: int | None = None) -> None:
        """Nothing, where ``adapter`` fits or room may be made; ``slot``: the one that it is to replace.

        CapacityError: max_adapters or max_rank says no
        """
        if slot is None:
            slot = self.store.free_slot(self._slots.values())
        if slot is None and self.max_adapters is not None:
            raise CapacityError(
                f"no room for adapter {adapter.name!r}: {len(self._slots)} are loaded and max_adapters is"
                f" {self.max_adapters}. Unload one, or compile with a larger max_adapters."
            )
        fits = slot is not None and self.store.find_room(adapter, instead_of=slot) is not None
        if not fits and self.max_rank is not None and adapter.ranks and adapter.ranks[-1] > self.max_rank:
            raise CapacityError(
                f"adapter {adapter.name!r} has rank {adapter.ranks[-1]}, max_rank is {self.max_rank}."
                " Compile with a larger max_rank."
            )

    def _larger(self, adapter: AdapterWeights, slot: int | None) -> tuple[PackedStore, int]:
        """A new store with what this one holds, except slot ``slot``, and with ``adapter``."""
        old = self.store
        held = {name: at for name, at in self._slots.items() if at != slot}
        weights = {at: self.weights_of(name) for name, at in held.items()}
        slots = old.slots if slot is not None or old.free_slot(self._slots.values()) is not None else old.slots + 1
        slot = slot if slot is not None else next(i for i in range(slots) if i not in self._slots.values())
        weights[slot] = adapter
        sites = {site.name: site for site in old.sites}
        for path, site in adapter.sites.items():
            sites.setdefault(path, Site(path, site.a.shape[1], site.b.shape[0]))
        capacities = {g.name: g.capacity for g in old.geometry}
        biases = {g.name: g.biases for g in old.geometry}
        for path in sites:
            here = [w.sites[path] for w in weights.values() if path in w.sites]
            capacities[path] = max(capacities.get(path, 0), sum(s.rank for s in here))
            biases[path] = max(biases.get(path, 0), sum(s.bias is not None for s in here))
        store = PackedStore(list(sites.values()), capacities, biases, slots, old.storage.dtype, old.storage.device)
        for at, held_weights in weights.items():
            store.put(at, held_weights)
        return store, slot

    def weights_of(self, name: str) -> AdapterWeights:
        """What the bank holds of ``name``: views of its memory."""
        from lorafx.adapters import SiteWeights

        slot = self._slots[name]
        sites = {}
        scales = self.store.scale[slot].tolist()
        for path in self.store.taken[slot]:
            sites[path] = SiteWeights(*self.store.views(slot, path), scales[self.store.index[path]])
        return AdapterWeights(name, sites)

    def move(self, device: torch.device) -> None:
        """Follow the model to another device."""
        with self._lock.writing():
            for field in ("storage", "owner", "scale", "windows"):
                setattr(self.store, field, getattr(self.store, field).to(device))
            self._renew_key()
            self._routings.clear()

    # ------------------------------------------------------------------------------------------ looking

    @property
    def names(self) -> list[str]:
        """Loaded adapters, in the order of loading."""
        return list(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes of all storage that the bank holds, reserved room included."""
        return self.store.nbytes

    @property
    def reserved(self) -> int:
        """Bytes of ``nbytes`` that no adapter has taken yet."""
        return self.store.reserved

    @property
    def window(self) -> int:
        """Bytes of ``nbytes`` in fold windows: none, nothing is folded yet."""
        return 0

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def table(self) -> list[dict[str, Any]]:
        """One dict for each adapter: name, ranks, targets, layers, bytes, in use."""
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


def as_mapping(adapters: Any) -> Mapping[str, Any]:
    """``adapters`` of ``compile`` as name -> source; a path alone is named after its folder."""
    from pathlib import Path

    if adapters is None:
        return {}
    if isinstance(adapters, Mapping) and not (adapters and all(isinstance(v, torch.Tensor) for v in adapters.values())):
        return adapters
    if isinstance(adapters, (list, tuple)) and all(isinstance(item, (str, Path)) for item in adapters):
        names = [Path(item).name for item in adapters]
        if len(set(names)) < len(names):
            raise AdapterMismatchError(f"two of these folders have one name: {names}; pass a dict name -> path")
        return dict(zip(names, adapters, strict=True))
    if isinstance(adapters, (str, Path)):
        return {Path(adapters).name: adapters}
    return {"default": adapters}
