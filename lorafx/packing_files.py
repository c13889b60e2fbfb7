"""A mapped file straight into packed weights, in few and large steps.

A file has a layer's A and B for each of hundreds of layers; taken one by one, their views alone cost several times
what the bytes cost. As in ``packing.py`` the same projection's weights stand at even distances, so a run of layers is
one copy; B's is turned on the way, from the file's ``[out, rank]`` to rank rows ``[rank, out]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafx.adapters import AdapterWeights, SiteShape, SiteWeights
from lorafx.packing import Layout, Piece, find_runs, layout_of


@dataclass(frozen=True)
class Move:
    """``count`` matrices ``[rows, columns]``, at ``steps`` numbers from each other, read as ``strides`` say.

    target, source: where the first stands
    """

    count: int
    rows: int
    columns: int
    target: int
    target_step: int
    source: int
    source_step: int
    strides: tuple[int, int]

    def run(self, into: Tensor, flat: Tensor) -> None:
        size = self.count, self.rows, self.columns
        rows = flat.as_strided(size, (self.source_step, *self.strides), flat.storage_offset() + self.source)
        into.as_strided(size, (self.target_step, self.columns, 1), self.target).copy_(rows)


@dataclass(frozen=True)
class Packing:
    """How a file of one structure is packed. ``shapes``: of the layers, in the order of ``layout``."""

    shapes: Mapping[str, SiteShape]
    layout: Layout
    moves: tuple[Move, ...]

    @torch.no_grad()
    def pack(self, name: str, flat: Tensor, dtype: torch.dtype) -> AdapterWeights:
        """``flat``: the numbers of the file."""
        into = torch.empty(self.layout.size, dtype=dtype)
        for move in self.moves:
            move.run(into, flat)
        return AdapterWeights(name, dict(self._sites(into)), into, self.layout)

    def _sites(self, flat: Tensor) -> Iterator[tuple[str, SiteWeights]]:
        for path, shape in self.shapes.items():
            at_a, at_b, at_bias = self.layout.offsets[path]
            a = flat.as_strided((shape.rank, shape.in_features), (shape.in_features, 1), at_a)
            b = flat.as_strided((shape.out_features, shape.rank), (1, shape.out_features), at_b)
            bias = flat.as_strided((shape.out_features,), (1,), at_bias) if shape.bias else None
            yield path, SiteWeights(a, b, bias, shape.scale, None, shape.experts)


def packing_of(shapes: Mapping[str, SiteShape], places: Mapping[str, tuple[int, int, int]]) -> Packing:
    """``places``: where A, B and bias of each layer begin in the file, in numbers."""
    layout = layout_of(shapes)
    straight: list[Piece] = []
    turned: dict[tuple[int, int], list[Piece]] = {}
    for path, shape in shapes.items():
        (to_a, to_b, to_bias), (a, b, bias) = layout.offsets[path], places[path]
        projection = path.rpartition(".")[2]  # those of one name stand at even distances
        straight.append(Piece(("a", projection, shape.in_features), to_a, a, shape.rank * shape.in_features))
        if shape.bias:
            straight.append(Piece(("bias", projection), to_bias, bias, shape.out_features))
        size = shape.rank, shape.out_features
        turned.setdefault(size, []).append(Piece((projection,), to_b, b, shape.rank * shape.out_features))
    moves = [
        Move(r.count, 1, r.length, r.target, r.target_step, r.source, r.source_step, (0, 1))
        for r in find_runs(straight)
    ]
    for (rank, out), pieces in turned.items():
        moves += [
            Move(r.count, rank, out, r.target, r.target_step, r.source, r.source_step, (1, rank))
            for r in find_runs(pieces)
        ]
    return Packing(shapes, layout, tuple(moves))
