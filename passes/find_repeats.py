"""Finds stretches of a graph that are the same work on other values: the layers of a model. Reads, never writes.

    embed  n l a m | n l a m | n l a m | n l a m  norm head        ->   Repeat(start=1, period=4, count=4)

Two nodes are alike if they call the same thing with the same constants on values of the same kind (shape, strides,
dtype, device) and give the same kind. A stretch repeats if it is alike node by node, and wired alike: what comes from
inside it comes from the same place in it; what comes from outside may be anything of the same kind.

Where in the period a cut is made is free. Taken is the place where the fewest values are alive.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lorafx.passes.graph_values import Values, is_bank_view
from lorafx.passes.memory import is_in_place, written_by

MINIMUM = 4  # repeats: below that, compiling parts apart gains too little
SPARED = 8  # at least one node in so many is compiled no more: a mask made in equal steps is not worth a part
PERIODS = 12  # distances tried
CUTS = 8  # places tried for each distance


@dataclass(frozen=True)
class Repeat:
    """``count`` stretches of ``period`` rows each, the first at ``start``, one right behind the other."""

    start: int
    period: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.period * self.count

    def bounds(self) -> list[tuple[int, int]]:
        return [(self.start + i * self.period, self.start + (i + 1) * self.period) for i in range(self.count)]


class Rows:
    """The nodes of a graph that compute, in order, without constant windows of the bank, which whoever calls makes.

    nodes: the rows; args: the nodes each reads, as often as it does; at: the row of a node
    """

    def __init__(self, graph: fx.Graph, values: Values) -> None:
        self.values = values
        self.nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output") and not is_bank_view(n)]
        self.at = {node: i for i, node in enumerate(self.nodes)}
        self.args: list[list[fx.Node]] = []
        self.last_use: dict[fx.Node, int] = {}
        self._kinds: dict[fx.Node, Any] = {}
        self._symbols: dict[fx.Node, list[Any]] = {}
        numbers: dict[Any, int] = {}
        self.signatures: list[int] = []
        for i, node in enumerate(self.nodes):
            read: list[fx.Node] = []
            key = (node.op, node.target, self._constants(node.args, read), self._constants(node.kwargs, read))
            if _reads_offset(node):  # what it reads depends on where its input begins in memory, which no kind tells
                key = (*key, node)
            key = (*key, tuple(map(self.kind, read)), self.kind(node))
            self.signatures.append(numbers.setdefault(key, len(numbers)))
            self.args.append(read)
            for arg in read:
                self.last_use[arg] = i
        for arg in graph.output_node().all_input_nodes:
            self.last_use[arg] = len(self.nodes)
        # memory written to -> rows that write
        self.writes: dict[int, list[int]] = defaultdict(list)
        for i, node in enumerate(self.nodes):
            if is_in_place(node):
                for target in written_by(node):
                    for key in values.storages(target):
                        self.writes[key].append(i)

    def kind(self, node: fx.Node) -> Any:
        """Equal for values that one compiled part can take in turn, sizes that are symbols left out."""
        if node not in self._kinds:
            symbols: list[Any] = []
            self._kinds[node] = _kind(self.values[node], symbols)
            if symbols:
                self._symbols[node] = symbols
        return self._kinds[node]

    def symbols(self, start: int, stop: int) -> list[Any]:
        """The symbols in the sizes of what these rows read and make, in order, as often as they are there.

        Where they stand in the same order, each symbol of one repeat has its counterpart in the other: caches that
        grow have lengths with names of their own, layer by layer.
        """
        if not self._symbols:
            return []
        nodes = itertools.chain.from_iterable((*self.args[i], self.nodes[i]) for i in range(start, stop))
        return [symbol for node in nodes for symbol in self._symbols.get(node, ())]

    def can_cross(self, node: fx.Node, start: int, stop: int) -> bool:
        """Whether ``node``, one of these rows, may be handed on: a tensor or a size, to which nobody writes afterwards.

        Only an input of the graph may be written to in several parts: each of them then sees the same tensor.
        """
        value = self.values[node]
        if isinstance(value, (int, torch.SymInt)):
            return not isinstance(value, bool)
        return isinstance(value, Tensor) and all(
            start <= row < stop for key in self.values.storages(node) for row in self.writes.get(key, ())
        )

    def _constants(self, arg: Any, read: list[fx.Node]) -> Any:
        """``arg`` with a mark in the place of each node; the nodes go into ``read``."""
        if isinstance(arg, fx.Node):
            read.append(arg)
            return fx.Node
        if isinstance(arg, (list, tuple)):
            return type(arg).__name__, *(self._constants(item, read) for item in arg)
        if isinstance(arg, dict):
            return "dict", *((key, self._constants(item, read)) for key, item in arg.items())
        if isinstance(arg, slice):
            return "slice", *(self._constants(item, read) for item in (arg.start, arg.stop, arg.step))
        if isinstance(arg, float):
            return float, arg.hex()  # -0.0 is not 0.0, and nan is nan
        try:
            hash(arg)
        except TypeError:
            return type(arg), repr(arg)
        return type(arg), arg  # 1, 1.0 and True are equal


def find_repeats(rows: Rows, minimum: int = MINIMUM) -> list[Repeat]:
    """Stretches that repeat at least ``minimum`` times, in order; those first taken spare the most nodes."""
    found: list[Repeat] = []
    gaps = [(0, len(rows.nodes))]
    while gaps:
        start, stop = gaps.pop()
        best = _best(rows, start, stop, minimum)
        if best is not None and (best.count - 1) * best.period * SPARED >= len(rows.nodes):
            found.append(best)
            gaps += [(start, best.start), (best.stop, stop)]
    return sorted(found, key=lambda repeat: repeat.start)


def _best(rows: Rows, start: int, stop: int, minimum: int) -> Repeat | None:
    best: Repeat | None = None
    for first, last, period in _stretches(rows.signatures, start, stop, minimum):
        spared = (best.count - 1) * best.period if best is not None else 0
        if (last - first) - period <= spared:
            continue
        repeat = _cut(rows, first, last, period, minimum)
        if repeat is not None and (repeat.count - 1) * repeat.period > spared:
            best = repeat
    return best


def _stretches(signatures: Sequence[int], start: int, stop: int, minimum: int) -> list[tuple[int, int, int]]:
    """(first, last, period) of stretches alike node by node, the ones that spare most first."""
    seen: dict[int, tuple[int, ...]] = {}
    distances: Counter[int] = Counter()
    for i in range(start, stop):
        # to the one before last too: layers of two kinds in turn have most of their nodes in common
        before = seen.get(signatures[i], ())
        distances.update(i - j for j in before)
        seen[signatures[i]] = (i, *before[:1])
    found = []
    for period, _ in distances.most_common(PERIODS):
        run = 0
        for i in range(start, stop - period + 1):
            if i < stop - period and signatures[i] == signatures[i + period]:
                run += 1
                continue
            if run >= period * (minimum - 1):
                found.append((i - run, i + period, period))
            run = 0
    return sorted(found, key=lambda stretch: (stretch[0] - stretch[1] + stretch[2], stretch[2]))


def _cut(rows: Rows, first: int, last: int, period: int, minimum: int) -> Repeat | None:
    """The stretch cut into repeats, where the fewest values cross."""
    alive = _alive(rows)
    candidates = []
    most = (last - first) // period
    for start in range(first, min(first + 2 * period, last)):
        count = (last - start) // period
        if count < max(minimum, most - 1):
            break
        # the ends matter less: values for all repeats, such as a mask, cross there too
        crossing = sum(alive[start + i * period] for i in range(1, count)) / (count - 1)
        candidates.append((crossing, -count, start))
    best: Repeat | None = None
    for _, count, start in sorted(candidates)[:CUTS]:
        repeat = _same_wiring(rows, Repeat(start, period, -count), minimum)
        if repeat is not None and (best is None or repeat.count > best.count + 1):
            best = repeat
        if best is not None and best.count >= most - 1:
            break
    return best


def _alive(rows: Rows) -> list[int]:
    """How many computed values are alive between a row and the one before; very many if one can't be handed on."""
    change = [0] * (len(rows.nodes) + 2)
    for node, last in rows.last_use.items():
        if node in rows.at:
            weight = 1 if isinstance(rows.values[node], (Tensor, int, torch.SymInt)) else 1 << 20
            change[rows.at[node] + 1] += weight
            change[last + 1] -= weight
    return list(itertools.accumulate(change))


def _same_wiring(rows: Rows, repeat: Repeat, minimum: int) -> Repeat | None:
    """The longest run of repeats that are wired alike and can be called apart."""
    best: Repeat | None = None
    wirings = (_wiring(rows, *bounds) for bounds in repeat.bounds())
    position = 0
    for wiring, group in itertools.groupby(wirings):
        count = len(list(group))
        if wiring is not None and count >= max(minimum, best.count + 1 if best is not None else 0):
            best = Repeat(repeat.start + position * repeat.period, repeat.period, count)
        position += count
    return best


def _wiring(rows: Rows, start: int, stop: int) -> tuple[Any, ...] | None:
    """Where each argument comes from: a row of the stretch, or -1 for outside. None: can't be called apart."""
    wiring: list[Any] = []
    outside: dict[fx.Node, None] = {}
    for arg in reads(rows, start, stop):
        at = rows.at.get(arg, -1)
        wiring.append(at - start if at >= start else -1)
        if at < start:
            outside[arg] = None
    sharing: dict[int, list[fx.Node]] = defaultdict(list)
    for node in outside:
        for key in rows.values.storages(node):
            sharing[key].append(node)
    # in another repeat other inputs could share memory, and what was compiled would not know
    if any(len(sharing[key]) > 1 and any(start <= i < stop for i in rows.writes.get(key, ())) for key in sharing):
        return None
    for i in range(start, stop):
        node = rows.nodes[i]
        if rows.last_use.get(node, -1) < stop:
            continue
        if not rows.can_cross(node, start, stop):
            return None
        for other in (other for key in rows.values.storages(node) for other in sharing.get(key, ())):
            # a view of an input: what was compiled makes it anew at the same place in memory
            wiring.append((i - start, _offset(rows.values[node]), _offset(rows.values[other])))
    numbers: dict[Any, int] = {}
    wiring += (("symbol", numbers.setdefault(symbol, len(numbers))) for symbol in rows.symbols(start, stop))
    return tuple(wiring)


def _offset(value: Any) -> str:
    return str(value.storage_offset()) if isinstance(value, Tensor) else ""


def _kind(value: Any, symbols: list[Any]) -> Any:
    def plain(size: Any) -> Any:
        if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            found = sorted(size.node.expr.free_symbols, key=str)
            if isinstance(size, torch.SymInt):
                symbols.extend(found)
            return str(size.node.expr.xreplace({symbol: type(symbol)(f"_{i}") for i, symbol in enumerate(found)}))
        return size

    if isinstance(value, Tensor):
        sizes = (*value.shape, *value.stride()) if value.layout == torch.strided else value.shape
        return value.dtype, value.device, value.layout, tuple(map(plain, sizes)), value.is_neg(), value.is_conj()
    if isinstance(value, (list, tuple)):
        return type(value).__name__, *(_kind(item, symbols) for item in value)
    return type(value).__name__, str(plain(value))


def _reads_offset(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return "as_strided" in name or "storage_offset" in name or "data_ptr" in name


def reads(rows: Rows, start: int, stop: int) -> Iterator[fx.Node]:
    """Each argument of the rows, in order, as often as it is one."""
    return itertools.chain.from_iterable(rows.args[start:stop])


__all__ = ["MINIMUM", "Repeat", "Rows", "find_repeats", "reads"]
