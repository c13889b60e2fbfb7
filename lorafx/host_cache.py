"""Adapters in host memory: those used least recently go first, and each is read once, however many wait for it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from lorafx.adapters import AdapterWeights


class HostCache:
    """``limit``: bytes; an adapter that is larger is handed on and not kept."""

    def __init__(self, limit: int, read: Callable[[str], AdapterWeights]) -> None:
        self.limit = limit
        self._read = read
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, AdapterWeights] = OrderedDict()
        self._under_way: dict[str, Future[AdapterWeights | None]] = {}

    def get(self, name: str) -> AdapterWeights:
        """From memory, or read now, or by whoever reads it already. What reading raises is raised, and not kept."""
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
            future = self._under_way.get(name)
            mine = future is None
            if mine:
                future = self._under_way[name] = Future()
        if not mine:
            read = future.result()
            return read if read is not None else self.get(name)
        try:
            weights = self._read(name)
        except BaseException as error:
            with self._lock:
                self._under_way.pop(name, None)
            if isinstance(error, Exception):
                future.set_exception(error)
            else:
                future.set_result(None)  # the reading thread was interrupted: those who wait read themselves
            raise
        with self._lock:
            if self._under_way.pop(name, None) is future:  # nobody has said forget() meanwhile
                self._keep(name, weights)
        future.set_result(weights)
        return weights

    def _keep(self, name: str, weights: AdapterWeights) -> None:
        if weights.nbytes > self.limit:
            return
        self._kept[name] = weights
        while self.nbytes > self.limit:
            self._kept.popitem(last=False)

    def forget(self, name: str) -> None:
        """Read it anew next time."""
        with self._lock:
            self._kept.pop(name, None)
            self._under_way.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return sum(weights.nbytes for weights in list(self._kept.values()))
