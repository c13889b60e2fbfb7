"""An adapter in one piece of memory, and how it is copied into the bank in few, large steps.

A layer's rows are small (16 x 576 numbers) and there are hundreds of them; copied one by one they cost several times
what their bytes cost. But the layers of a model are alike, so the same projection's rows stand at even distances in the
bank, and next to each other in the packed adapter: a **run** of them is one strided copy, which reads memory in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lorafx.adapters import SiteShape

Key = tuple[tuple[str, int, int, int, bool, bool], ...]
_interned: WeakValueDictionary[Key, Layout] = WeakValueDictionary()


class Layout:
    """Where the rows of each site stand in a packed adapter: A ``[rank, in]``, B ``[rank, out]``, bias ``[out]``.

    All of one kind and length stand together, layer after layer, as a run copies them. Equal layouts are one object
    (``layout_of``), so ``is`` compares them.
    """

    def __init__(self, key: Key) -> None:
        self.key = key
        starts: dict[str, list[int]] = {path: [] for path, *_ in key}  # of A, B and bias
        together: dict[tuple[tuple, int], list[str]] = {}
        for path, rank, in_features, out_features, bias, _ in key:
            for part, length in enumerate((rank * in_features, rank * out_features, bias * out_features)):
                together.setdefault((kind_of(path, part), length), []).append(path)
        self.size = 0
        for (_, length), paths in sorted(together.items(), key=lambda item: item[0][0][1]):  # bias after B after A
            for path in paths:
                starts[path].append(self.size)
                self.size += length
        self.offsets: dict[str, tuple[int, ...]] = {path: tuple(three) for path, three in starts.items()}

    def __reduce__(self) -> tuple:
        return _intern, (self.key,)


def layout_of(shapes: Mapping[str, SiteShape]) -> Layout:
    """The layout of an adapter with these shapes, in their order; of one with DoRA another one than without, since a
    slot that holds the one may have no place for the other's factors."""
    return _intern(tuple((path, s.rank, s.in_features, s.out_features, s.bias, s.dora) for path, s in shapes.items()))


def _intern(key: Key) -> Layout:
    return _interned.setdefault(key, Layout(key))


def kind_of(path: str, part: int) -> tuple[str, int]:
    """What the rows of one layer may be in a run with; ``part``: 0 for A, 1 for B, 2 for the bias."""
    return path.rpartition(".")[2], part


@dataclass(frozen=True)
class Piece:
    """``length`` numbers that go from ``source`` to ``target``; ``kind``: what may be in one run with it."""

    kind: tuple
    target: int
    source: int
    length: int


@dataclass(frozen=True)
class Run:
    """``count`` pieces of ``length`` numbers, at even distances on both sides."""

    target: int
    source: int
    length: int
    count: int = 1
    target_step: int = 0
    source_step: int = 0


def find_runs(pieces: Iterable[Piece]) -> list[Run]:
    """The fewest runs that pieces of one kind make, taken in order. Pure."""
    runs: dict[tuple, list[Run]] = {}
    for piece in pieces:
        same = runs.setdefault((piece.kind, piece.length), [])
        if same and (longer := _extended(same[-1], piece)):
            same[-1] = longer
        else:
            same.append(Run(piece.target, piece.source, piece.length))
    return [run for same in runs.values() for run in same]


def _extended(run: Run, piece: Piece) -> Run | None:
    """``run`` with one more piece, or None if it stands at another distance."""
    last = run.count - 1
    target_step = piece.target - (run.target + last * run.target_step)
    source_step = piece.source - (run.source + last * run.source_step)
    if min(target_step, source_step) < run.length:
        return None
    if run.count > 1 and (target_step, source_step) != (run.target_step, run.source_step):
        return None
    return Run(run.target, run.source, run.length, run.count + 1, target_step, source_step)


def targets(storage: Tensor, runs: Iterable[Run]) -> list[Tensor]:
    """Views ``[count, length]`` of the flat ``storage``."""
    return [storage.as_strided((r.count, r.length), (r.target_step, 1), r.target) for r in runs]


def sources(flat: Tensor, runs: Iterable[Run]) -> list[Tensor]:
    """The same of a packed adapter."""
    start = flat.storage_offset()
    return [flat.as_strided((r.count, r.length), (r.source_step, 1), start + r.source) for r in runs]


def copy_all(into: list[Tensor], source: list[Tensor]) -> None:
    """Every copy in one call, which Python can't interrupt half-way."""
    if into:
        torch._foreach_copy_(into, source)
