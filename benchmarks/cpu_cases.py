"""What ``python -m benchmarks.cpu`` times: the cases, who takes part in each, and what lorafx must and should reach."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.forward_pass import ALL, QKV, Case
from benchmarks.gpu_kernels import MIXED

CACHE = 256  # positions of the static cache: the chats that people run on two cores are no longer
BASE, BASE_EAGER = "base, compiled", "base, eager"
LORAFX, IDLE = "lorafx", "lorafx, no adapter in use"
PEFT, PEFT_COMPILED, MERGED = "PEFT, eager", "PEFT, compiled", "PEFT, merged and compiled"
POLYLORA = "polylora, eager"
MIXED_PEFT_LAYERS = 4  # more are compiled for PEFT's mixed batches only when asked for
RECOMPILES, COMPILE_SECONDS = 9, 10  # the two cases that are no ``Timed``
TITLES = {
    RECOMPILES: "64 lists of adapter_names in turn, decode, 8 rows, on q,k,v, one layer",
    COMPILE_SECONDS: "first call with empty caches, decode, r 16 on all seven",
}


@dataclass(frozen=True)
class Target:
    """What ``of``'s time may be as a ratio to ``to``'s: at most ``must``, better ``aim``; or ``at_least`` that."""

    of: str
    to: str
    must: float
    aim: float
    at_least: bool = False

    def verdict(self, found: float) -> dict:
        """Plain data, for the results file."""

        def met(bound: float) -> bool:
            return found >= bound if self.at_least else found <= bound

        return {**vars(self), "found": found, "must_met": met(self.must), "aim_met": met(self.aim)}


@dataclass(frozen=True)
class Entry:
    """One contender: the name it has in the table, what it is, and of which forward pass."""

    name: str
    kind: str
    forward: Case


@dataclass(frozen=True)
class Timed:
    """Contenders that take turns; ratios are to the first's time."""

    title: str
    entries: tuple[Entry, ...]
    targets: tuple[Target, ...]


def _against_base(forward: Case, must: float, aim: float, *more: Target) -> Timed:
    kinds = [BASE, BASE_EAGER, LORAFX, IDLE, PEFT, PEFT_COMPILED, POLYLORA]
    if len(forward.ranks) == 1:
        kinds.append(MERGED)
    entries = tuple(Entry(kind, kind, forward) for kind in kinds)
    return Timed(str(forward), entries, (Target(LORAFX, BASE, must, aim), *more))


def _decode(rows: int, ranks: tuple[int, ...], targets: tuple[str, ...], in_use: int | None = None) -> Case:
    return Case(rows, 1, ranks, targets, in_use=in_use, cache=CACHE)


def _resident(title: str, few: tuple[str, Case], many: tuple[str, Case], must: float, aim: float) -> Timed:
    """What adapters cost that are loaded beside the one in use."""
    entries = tuple(Entry(f"{LORAFX}, {name}", LORAFX, forward) for name, forward in (few, many))
    return Timed(title, entries, (Target(entries[1].name, entries[0].name, must, aim),))


_ALL_IDLE = _decode(8, MIXED, ALL, in_use=0)

TIMED: dict[int, Timed] = {
    1: _against_base(_decode(1, (16,), QKV), 1.02, 0.98),
    2: _against_base(_decode(1, (16,), ALL), 1.07, 1.04),
    3: _against_base(_decode(8, MIXED, QKV), 1.08, 1.04, Target(PEFT, LORAFX, 1.45, 1.55, at_least=True)),
    4: _against_base(_decode(8, MIXED, ALL), 1.25, 1.15, Target(PEFT, LORAFX, 2.1, 2.5, at_least=True)),
    5: _against_base(Case(1, 512, (16,), ALL), 1.12, 1.06),
    6: _resident(
        "decode, 1 row, 1 of 64 resident adapters in use, r 16 on q,k,v",
        ("1 resident", _decode(1, (16,), QKV)),
        ("64 resident", _decode(1, (16,) * 64, QKV, in_use=1)),
        1.03,
        1.00,
    ),
    7: _resident(
        "decode, 1 row, r 8 on q,k,v in use, beside one of r 64",
        ("bank of r 8", _decode(1, (8,), QKV)),
        ("bank of r 8 and r 64", _decode(1, (8, 64), QKV, in_use=1)),
        1.05,
        1.00,
    ),
    8: Timed(
        str(_ALL_IDLE),
        (Entry(BASE, BASE, _ALL_IDLE), Entry(IDLE, IDLE, _ALL_IDLE)),
        (Target(IDLE, BASE, 1.01, 1.00),),
    ),
}
RECOMPILE_TARGET = Target(LORAFX, "recompiles", 0, 0)
COMPILE_TARGET = Target(LORAFX, BASE, 1.10, 0.30)


def too_slow(entry: Entry, layers: int) -> bool:
    """PEFT traces the branches of every adapter in a mixed batch: two layers of eight adapters compile for a minute."""
    return entry.kind == PEFT_COMPILED and len(entry.forward.ranks) > 1 and layers > MIXED_PEFT_LAYERS


def numbers() -> list[int]:
    """The cases there are."""
    return [*TIMED, *TITLES]


def title(number: int) -> str:
    return TITLES.get(number) or TIMED[number].title
