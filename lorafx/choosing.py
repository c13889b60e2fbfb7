"""Which adapters a call of the model uses: what was chosen for all calls, what one call says for itself, and what the
forward that is under way holds on to from its first layer to its last."""

from __future__ import annotations

import contextvars
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafx.errors import AdapterMismatchError, UnsupportedModelError
from lorafx.invocations import Prompt, Tokens, row_by_row
from lorafx.locking import ReadWriteLock
from lorafx.logs import warn_once
from lorafx.routing import Routing, Routings
from lorafx.saved_modules import SavedModules
from lorafx.selection import NOTHING, Choice, Selection, names_in, normalize
from lorafx.store import PackedStore

if TYPE_CHECKING:
    from lorafx.adapter_store import AdapterStore


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


class Choosing:
    """The choosing half of ``AdapterBank``: nothing here changes an adapter."""

    def __init__(self, store: PackedStore) -> None:
        self.store = store
        self.saved = SavedModules()  # modules that adapters have copies of
        self._slots: dict[str, int] = {}
        self._chosen: Selection | None = None  # by use()
        self._fallback: Selection = NOTHING  # where nothing was chosen: what PEFT's switches say, on a PeftModel
        self._disabled = False  # by PEFT's disable_adapter
        self._held: Counter[str] = Counter()  # names that a generate under way has said
        self._shelf: AdapterStore | None = None  # where adapters come from that are not loaded
        self._follow: Callable[[], None] = lambda: None  # brings the bank up to PEFT's layers
        self._guard_use: Callable[[Selection], None] = lambda selection: None
        self._begin()

    def _begin(self) -> None:
        """What can't be copied or pickled, and is made anew in a copy."""
        self._lock = ReadWriteLock()
        self._counting = threading.Lock()  # of what is held
        self._call: contextvars.ContextVar[CallState | None] = contextvars.ContextVar("lorafx_call", default=None)
        self._routings = Routings()

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
    def using(self, choice: Choice) -> Iterator[Choosing]:
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
        return self._pinned_now()[1]

    def _pinned_now(self) -> tuple[Selection | None, Selection]:
        """``chosen`` and ``in_use``, of one moment: another thread may say ``use`` at any."""
        chosen = self.chosen
        return chosen, chosen if chosen is not None else self._fallback

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
        slots, dora_of = self._slots, self.store.dora
        if dora_of is None:
            return None
        for row in selection:
            named = [(name, slots[name]) for name, _ in row if name in slots]
            dora = [name for name, slot in named if slot < len(dora_of.held) and dora_of.held[slot]]
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
                chosen, in_use = self._pinned_now()
                pinned = Pinned(chosen, in_use, self._routing_now(chosen, in_use))
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
            return self._routing_now(*self._pinned_now())

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
        slots, invocations = (
            self._slots,
            self.store.invocations,
        )  # as they are now: names may be asked for at any moment
        named = [(name, slots[name]) for name in names_in(selection) if name in slots]
        return {name: invocations[slot] for name, slot in named if slot < len(invocations) and invocations[slot]}

    def _routing_now(self, chosen: Selection | None, selection: Selection) -> Routing:
        """Of the call that is under way: with aLoRA adapters that depends on its prompt."""
        late = self._late_in(selection)
        if not late:
            return self._routing_of(selection)
        state = self._call.get() or CallState(None, None)
        prompt = state.prompt or Prompt()
        if prompt.offsets is None and chosen is None:  # PEFT's switches decide, and PEFT has given no offsets
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

    def excluding(self) -> AbstractContextManager[None]:
        """Hold off the forwards of all other threads, too."""
        return self._lock.writing()
