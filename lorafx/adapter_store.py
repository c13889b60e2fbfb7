"""More adapters than there is room for: on disk, in host memory, on the device, moved as batches need them."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from lorafx.adapters import AdapterOutline, AdapterWeights
from lorafx.bank import AdapterBank
from lorafx.errors import AdapterMismatchError, CapacityError, LorafxError, UnsupportedModelError
from lorafx.file_paths import inside
from lorafx.host_cache import HostCache
from lorafx.progress import bar
from lorafx.selection import Choice, Selection, names_in

log = logging.getLogger("lorafx")

FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass
class StoreStats:
    """Counts since the store was made.

    hits, misses: names that a call asked for and that were, or were not, on the device
    host_hits: misses that were in host memory
    evictions: adapters that left the device
    bytes_read: from disk, or from what the dict holds, into host memory
    bytes_copied: to the device
    seconds_reading, seconds_copying: spent on that, over all threads
    seconds_waiting: for other calls to end, since they held the room
    """

    hits: int = 0
    misses: int = 0
    host_hits: int = 0
    evictions: int = 0
    bytes_read: int = 0
    bytes_copied: int = 0
    seconds_reading: float = 0.0
    seconds_copying: float = 0.0
    seconds_waiting: float = 0.0


class Call:
    """One call under way: something that a dictionary can hold weakly."""


class AdapterStore:
    """Many adapters by name, of which a compiled model holds those that its batches need.

    adapters: a folder with one PEFT adapter folder for each name, or a dict name -> source (as ``lorafx.compile``
        takes them); a folder is looked at when a name is asked for, so adapters may be added while it is in use
    host_bytes: how much host memory adapters may take that are not on the device

        store = lorafx.AdapterStore("adapters/")
        model = lorafx.compile(model, store, max_adapters=16)       # room for 16 of them
        store.prefetch(["sql", "json"])                             # into host memory, in the background
        model(ids, adapter_names=["sql", None, "json"])             # brings in what is missing, the oldest leave
        store.use(["sql", None, "json"])                            # the same for calls without adapter_names

    Names may be used from several threads. What a call names stays on the device until it ends; where other calls hold
    all the room, it waits for them. Nothing is ever packed anew or compiled for a change of adapters.
    """

    def __init__(self, adapters: str | os.PathLike | Mapping[str, Any], *, host_bytes: int = 1 << 30) -> None:
        if isinstance(adapters, Mapping):
            self._sources: Mapping[str, Any] | Path = adapters
        elif isinstance(adapters, (str, os.PathLike)) and Path(adapters).is_dir():
            self._sources = Path(adapters)
        else:
            raise AdapterMismatchError(
                f"got {adapters!r}; expected a folder that holds adapter folders, or a dict name -> source"
            )
        self.stats = StoreStats()
        self.model: nn.Module | None = None  # that it serves
        self._bank: AdapterBank | None = None
        self._host = HostCache(host_bytes, self._read)
        self._changed = threading.Condition(threading.RLock())
        self._counting = threading.Lock()
        # What is on the device, and in use, is the bank's to say. Here: what this store has brought, oldest use first,
        # and what each call under way has named, which is forgotten with the call, however it ends.
        self._brought: OrderedDict[str, None] = OrderedDict()
        self._refreshed: Counter[str] = Counter()  # how often
        self._pinned: WeakKeyDictionary[Call, list[str]] = WeakKeyDictionary()
        self._worker: ThreadPoolExecutor | None = None

    # ------------------------------------------------------------------------------------------ names

    @property
    def names(self) -> list[str]:
        """Every adapter that can be asked for."""
        if isinstance(self._sources, Path):
            return sorted(path.name for path in self._sources.iterdir() if (path / FILES[0]).is_file())
        return list(self._sources)

    @property
    def resident(self) -> list[str]:
        """Those that this store has put on the device, the least recently used first."""
        return [name for name in list(self._brought) if self._bank is not None and name in self._bank]

    def __contains__(self, name: object) -> bool:
        try:
            self._source(name)
        except LorafxError:
            return False
        return True

    def __len__(self) -> int:
        return len(self.names)

    def _source(self, name: Any) -> Any:
        """AdapterMismatchError: no such adapter here, or a name that leads out of the folder"""
        if isinstance(self._sources, Path):
            folder = inside(self._sources, name, FILES)
            if (folder / FILES[0]).exists():
                return folder
        elif name in self._sources:
            return self._sources[name]
        raise AdapterMismatchError(
            f"no adapter {name!r} in this store of {len(self)}; expected one of its names, such as"
            f" {', '.join(map(repr, self.names[:3])) or 'none: it is empty'}"
        )

    # ------------------------------------------------------------------------------------------ its model

    def attach(self, model: nn.Module) -> AdapterStore:
        """Serve a model that is compiled already, with ``max_adapters``; ``lorafx.compile(model, store)`` does both.

        UnsupportedModelError: not such a model, a PeftModel, or one that another store serves
        """
        bank = vars(model).get("lora")
        if not isinstance(bank, AdapterBank) or bank._read is None:
            raise UnsupportedModelError(
                f"got {type(model).__name__}; expected a model compiled by lorafx that is no PeftModel, since PEFT"
                " keeps every adapter on its layers: lorafx.compile(base_model, store, max_adapters=...)"
            )
        if bank.max_adapters is None:
            raise UnsupportedModelError(
                "this model was compiled without max_adapters, so there is no room to move adapters in and out."
                " lorafx.compile(model, store, max_adapters=...)"
            )
        if bank._shelf is not None or self.model is not None:
            raise UnsupportedModelError("this store, or this model, is attached already; a store serves one model")
        self.model, self._bank, bank._shelf = model, bank, self
        return self

    def detach(self) -> None:
        """Leave the model; what is on the device stays there. Called by ``lorafx.uncompile``."""
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
        if self._bank is not None:
            self._bank._shelf = None
        self.model = self._bank = self._worker = None
        self._brought.clear()

    def outlines(self, open_one: Any) -> Iterator[AdapterOutline]:
        """Of every adapter, for ``compile`` to reserve room by; one that can't be read is reported, and left out."""
        for name in bar(self.names, "looking at adapters"):
            try:
                yield open_one(name, self._source(name))
            except LorafxError as error:
                log.warning("left out of the room that is reserved: %s", error)

    def _attached(self) -> AdapterBank:
        if self._bank is None:
            raise UnsupportedModelError(
                "this store serves no model yet: lorafx.compile(model, store, max_adapters=...)"
            )
        return self._bank

    # ------------------------------------------------------------------------------------------ using

    def use(self, choice: Choice) -> None:
        """As ``model.lora.use``: brings in what is missing, and uses it from the next call on."""
        self._attached().use(choice)

    def using(self, choice: Choice) -> AbstractContextManager[AdapterBank]:
        """As ``model.lora.using``."""
        return self._attached().using(choice)

    def prefetch(self, names: Iterable[str], wait: bool = False) -> list[Future[AdapterWeights]]:
        """Read these into host memory, in the background; what goes wrong is raised where they are used.

        AdapterMismatchError: no such adapter
        """
        self._attached()
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            self._source(name)
        with self._counting:
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, thread_name_prefix="lorafx-prefetch")
        futures = [self._worker.submit(self._host.get, name) for name in names]
        for future in bar(futures, "reading adapters") if wait else ():
            future.result()
        return futures

    def refresh(self, name: str) -> None:
        """Read ``name`` anew from its source, whose files or entry have changed."""
        bank = self._attached()
        self._host.forget(name)
        with self._changed:
            self._refreshed[name] += 1  # what calls under way have read before is not brought in any more
            mine, resident = self._refreshed[name], name in self.resident
        weights = self._host.get(name) if resident else None  # outside the lock: it may take long
        with self._changed:
            if weights is not None and name in self.resident and mine == self._refreshed[name]:
                bank.replace(name, weights)

    @contextmanager
    def holding(self, names: Collection[str]) -> Iterator[None]:
        """These are on the device until the end of the block. CapacityError: more than fit at once"""
        call = Call()
        try:
            self._acquire(names, call)
            yield
        finally:
            with self._changed:
                self._pinned.pop(call, None)
                self._changed.notify_all()

    def choose(self, selection: Selection | None) -> None:
        """For ``AdapterBank.use``: bring in what ``selection`` names and make it what is in use, in one step."""
        self._acquire(names_in(selection or ()), choice=(selection,))
        with self._changed:
            self._changed.notify_all()  # what was in use before may leave now

    # ------------------------------------------------------------------------------------------ moving

    def _acquire(
        self, names: Collection[str], call: Call | None = None, choice: tuple[Selection | None] | None = None
    ) -> None:
        """Bring in what is missing. Pin it to ``call``, or, with ``choice``, have the bank use it from now on."""
        bank = self._attached()
        with self._changed:
            mine = [name for name in names if name in self._brought or name not in bank]  # others are the user's own
        weights: dict[str, AdapterWeights] = {}
        read: dict[str, int] = {}
        first = True
        while True:
            for name in mine:
                if name not in bank and read.get(name) != self._refreshed[name]:
                    read[name] = self._refreshed[name]
                    weights[name] = self._from_host(name)  # outside the lock: it may take long
            with self._changed:
                missing = [name for name in mine if name not in bank]
                if any(read.get(name) != self._refreshed[name] for name in missing):
                    continue  # another thread has put it out meanwhile, or refreshed it
                if first:
                    self.stats.hits += len(mine) - len(missing)
                    self.stats.misses += len(missing)
                    first = False
                staying = {*mine} if choice is not None else {*mine, *names_in(bank._chosen or ())}
                leaving = self._make_room(bank, [weights[name].outline for name in missing], staying)
                if leaving is not None:
                    self._exchange(bank, leaving, [weights[name] for name in missing], choice)
                    for name in mine:
                        self._brought.move_to_end(name)
                    if choice is None:
                        self._pinned[call] = mine
                    return
                started = time.perf_counter()
                self._changed.wait(timeout=1)  # a call that was interrupted at its last line has told nobody
                self.stats.seconds_waiting += time.perf_counter() - started

    def _make_room(self, bank: AdapterBank, coming: list[AdapterOutline], staying: Collection[str]) -> list[str] | None:
        """Who has to leave for these, the least recently used first; None: those who may leave now are not enough.

        CapacityError: nor would all others be
        """
        if not coming:
            return []
        for adapter in coming:
            bank.store.check_late(adapter)
        others = [name for name in self.resident if name not in staying]
        pinned = {name for names in list(self._pinned.values()) for name in names}
        free = [name for name in others if name not in pinned]
        for count in range(len(free) + 1):
            if bank.room_without(free[:count], coming):
                return free[:count]
        if len(others) > len(free) and bank.room_without(others, coming):
            return None
        raise CapacityError(
            f"no room for {len(coming)} more adapter(s), such as {coming[0].name!r} (rank"
            f" {coming[0].ranks[-1] if coming[0].ranks else 0}), beside {len(bank) - len(others)} that have to stay;"
            f" max_adapters is {bank.max_adapters}, max_rank {bank.max_rank}. Name fewer adapters in one batch, or"
            " compile with more room."
        )

    def _exchange(
        self,
        bank: AdapterBank,
        leaving: list[str],
        coming: list[AdapterWeights],
        choice: tuple[Selection | None] | None,
    ) -> None:
        if not coming and choice is None:
            return
        started = time.perf_counter()
        self._brought.update(dict.fromkeys(adapter.name for adapter in coming))
        bank.exchange(leaving, coming, choice)
        for name in leaving:
            del self._brought[name]
        self.stats.evictions += len(leaving)
        self.stats.bytes_copied += sum(adapter.nbytes for adapter in coming)
        self.stats.seconds_copying += time.perf_counter() - started

    def _from_host(self, name: str) -> AdapterWeights:
        if name in self._host:
            with self._counting:
                self.stats.host_hits += 1
        return self._host.get(name)

    def _read(self, name: str) -> AdapterWeights:
        source, started = self._source(name), time.perf_counter()
        weights = self._attached().read(source, name)
        if weights.saved:
            raise UnsupportedModelError(
                f"adapter {name!r} brings its own {next(iter(weights.saved))} (modules_to_save, or trainable"
                " tokens), which an AdapterStore does not move: load it with model.lora.load, where it stays."
            )
        with self._counting:
            self.stats.bytes_read += weights.nbytes
            self.stats.seconds_reading += time.perf_counter() - started
        return weights

    # ------------------------------------------------------------------------------------------ looking

    def table(self) -> list[dict[str, Any]]:
        """One row: where the adapters are, and the counts of ``stats``."""
        where = {"adapters": len(self), "on the device": len(self.resident), "in host memory": len(self._host)}
        counts = {key.replace("_", " "): value for key, value in asdict(self.stats).items()}
        return [{**where, "host bytes": self._host.nbytes, **counts}]

    def __repr__(self) -> str:
        row = self.table()[0]
        lines = [
            f"  {key}: {value:,.3f}" if isinstance(value, float) else f"  {key}: {value:,}"
            for key, value in row.items()
        ]
        return "\n".join(["AdapterStore", *lines])

    def _repr_html_(self) -> str:
        from lorafx.tables import html_table

        return html_table(self.table())
