"""A change of PEFT's layers and of the bank that follows them, all or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lorafx import peft_layers
from lorafx.module_snapshot import Snapshot, refill

if TYPE_CHECKING:
    from lorafx.following import Follower


@contextmanager
def changing_peft(follower: Follower, name: str) -> Iterator[None]:
    """PEFT's layers of adapter ``name`` are changed inside, and the bank after them; what ``use`` chose stays.

    What stops PEFT has all of it put back. Once PEFT is done the bank is brought up to it, whatever comes in between;
    only if that can't be is everything put back.
    """
    bank = follower.runtime.bank
    with bank._changing():
        if not follower.holds(None):
            follower.bring_up()
        before = Before(follower, name)
        done = False
        try:
            yield
            done = True
            follower.bring_up(heeding=False)
        except BaseException:
            if not done:
                before.put_back()
                raise
            try:
                follower.bring_up(heeding=False)  # an interrupt comes once
            except BaseException:
                before.put_back()
                before.put_back_rows()
            raise


class Before:
    """Everything that such a change touches, as it is now."""

    def __init__(self, follower: Follower, name: str) -> None:
        self.follower, self.name = follower, name
        runtime, bank = follower.runtime, follower.runtime.bank
        self.model = Snapshot(runtime.model)
        self.attributes = [
            (runtime, {part: getattr(runtime, part) for part in ("_entries", "unfused")}),
            (bank, {part: getattr(bank, part) for part in ("store", "_slots", "_chosen", "_fallback", "_disabled")}),
            (follower, vars(follower).copy()),
            (bank.saved, {"paths": bank.saved.paths}),
        ]
        self.containers = [
            (each, each.copy()) for each in (runtime.peft, runtime.retraces, runtime._hooks, bank.saved.wrappers)
        ]
        self.key = bank.key
        form = bank.store.storage.dtype, bank.store.storage.device
        self.weights = bank.weights_of(name).packed(*form) if name in bank else None

    def put_back(self) -> None:
        runtime, bank = self.follower.runtime, self.follower.runtime.bank
        self.model.restore()
        for owner, parts in self.attributes:
            vars(owner).update(parts)
        for each, content in self.containers:
            refill(each, content)
        bank._renew_key(self.key)
        runtime._on_new_store(None)
        peft_layers.share_memory(runtime.peft, bank)

    def put_back_rows(self) -> None:
        """What the bank may have written; other rows than before may be taken for it."""
        runtime, bank = self.follower.runtime, self.follower.runtime.bank
        for slot, windows in enumerate(bank.store.taken):
            if windows and slot not in bank._slots.values():
                bank.store.clear(slot)
        if self.weights is not None:
            bank.store.put(bank._slots[self.name], self.weights)
        peft_layers.share_memory(runtime.peft, bank)
