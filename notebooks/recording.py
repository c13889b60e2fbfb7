"""What the Triton kernels touch, written down while they run in Triton's interpreter.

Nothing here knows how the kernels cut their work: every lane that is noted was an address that a program asked for, and
its colour is what the bank's table says of that address.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import numpy
from triton.runtime.interpreter import GridExecutor, interpreter_builder

from lorafx.store import PackedStore

FREE, OFF = -1, -2  # what a lane may be besides a slot's: a free row of the bank, or masked


@dataclass
class Launch:
    """One kernel's launch. grid: programs along both axes; reads: by program, for each block of adapter weights that it
    loads ``[lanes]``, the slot that owns the row, or OFF; tiles: by program, the outputs ``[tokens, lanes]`` alike"""

    kernel: str
    grid: tuple[int, int]
    reads: dict[tuple[int, int], list[numpy.ndarray]] = field(default_factory=lambda: defaultdict(list))
    tiles: dict[tuple[int, int], list[numpy.ndarray]] = field(default_factory=lambda: defaultdict(list))
    elements: set[int] = field(default_factory=set)  # of the bank's storage, which were read

    def in_rows_of(self, width: int) -> Launch:
        """The same, where the programs count along one axis: ``width`` of them to a row."""
        height, depth = self.grid
        if depth == width:
            return self

        def turned(noted: dict[tuple[int, int], list[numpy.ndarray]]) -> dict[tuple[int, int], list[numpy.ndarray]]:
            return {divmod(program, width): blocks for (program, _), blocks in noted.items()}

        return Launch(self.kernel, (height // width, width), turned(self.reads), turned(self.tiles), self.elements)


@contextmanager
def recording(store: PackedStore) -> Iterator[list[Launch]]:
    """The launches made in here. Triton has to be interpreted: TRITON_INTERPRET=1 before lorafx is imported."""
    launches: list[Launch] = []
    owners = _owners(store)
    start, size = store.storage.data_ptr(), store.storage.element_size()
    launch_of = GridExecutor.__call__
    load, save = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def launching(self: GridExecutor, *args: object, **kwargs: object) -> None:
        grid = (*self.grid, 1)[:2]
        launches.append(Launch(self.fn.__name__.removesuffix("_kernel"), grid))
        launch_of(self, *args, **kwargs)

    def loading(ptrs: object, mask: object, *rest: object) -> object:
        live = mask.data
        if live.ndim == 2 and live.any():
            elements = (ptrs.data.astype(numpy.int64) - start) // size
            if elements[live].min() >= 0 and elements[live].max() < len(owners):
                launch = launches[-1]
                launch.elements.update(elements[live].tolist())
                lanes = numpy.where(live, owners[numpy.where(live, elements, 0)], OFF)
                # the axis along which addresses are neighbours is the width of the layer, the other is the lanes
                step = numpy.diff(elements, axis=0)
                launch.reads[interpreter_builder.grid_idx[:2]].append(lanes.max(axis=0 if (step == 1).all() else 1))
        return load(ptrs, mask, *rest)

    def storing(ptrs: object, value: object, mask: object, *rest: object) -> object:
        program = interpreter_builder.grid_idx[:2]
        if mask.data.ndim == 2 and launches[-1].kernel == "shrink":
            lanes = launches[-1].reads[program][-1]
            launches[-1].tiles[program].append(numpy.where(mask.data, lanes[None, :], OFF))
        return save(ptrs, value, mask, *rest)

    with (
        mock.patch.object(GridExecutor, "__call__", launching),
        mock.patch.object(interpreter_builder, "create_masked_load", loading),
        mock.patch.object(interpreter_builder, "create_masked_store", storing),
    ):
        yield launches


def _owners(store: PackedStore) -> numpy.ndarray:
    """The slot that owns each element of the storage, by the bank's tables."""
    owners = numpy.full(store.storage.numel(), FREE)
    for index in range(len(store.sites)):
        parts = store.site_tensors(index)
        rows = parts["owner"].numpy()
        for matrix in (parts["a"], parts["b"]):
            first, (count, width) = matrix.storage_offset(), matrix.shape
            owners[first : first + count * width] = rows[:count].repeat(width)
    return owners
