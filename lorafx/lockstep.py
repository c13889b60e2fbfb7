"""Runs a traced graph and what the passes made of it side by side, on the same inputs, and says where they part.

The traced graph runs first, and what matters of its values is kept. Then the rewritten one runs, and at each output of
a fused op its value is compared with the one that it stands for, and *replaced by it*: an error is seen where it is
made, never goes on, and each branch is judged by itself. The same for what reads such an output, so that an output that
went to the wrong reader is found; at the end what both return, and what they wrote into their inputs.

How much may differ: rounding. With ``e`` the largest rounding step among the dtypes on the way from x to the sum, and
``k`` the longest sum of products there, each row of a sum may be off by ``4 e + 8 e32 sqrt(k)`` of what was added up
(``e32``: that of float32, or of float64 where all is), as a ratio of 2-norms. What is added has to be larger than that
by far, or nothing was seen, and nothing is proved.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lorafx.passes.attach_inputs import KEY
from lorafx.passes.checkpointed import CHECKPOINT, bodies_of
from lorafx.passes.graph_reading import TRACED, traced_name
from lorafx.passes.record import STANDS_FOR, StandIn
from lorafx.probe_bank import SITES, ProbeBank
from lorafx.probe_inputs import noise_like, rms

VISIBLE = 4  # what is added is at least so many times as large as what may differ
FLOOR = 0.1  # of the average row: what a row may differ by, if it is smaller than that itself
MATMUL_STEPS = {"highest": 0.0, "high": torch.finfo(torch.half).eps, "medium": torch.finfo(torch.bfloat16).eps}
GROUP = "lorafx_group"
ZEROS = {torch.zeros, torch.zeros_like, torch.ops.aten.zeros.default, torch.ops.aten.zeros_like.default}
Blame = dict[str, str]  # why, by the traced name of the sum


@dataclass
class Truth:
    """What one output has to be. size: of each row, what was added up; delta, y: root mean squares; bound: see above"""

    value: Tensor
    size: Tensor
    delta: float
    y: float
    bound: float

    @property
    def is_visible(self) -> bool:
        return self.delta > VISIBLE * self.bound * rms(self.size) / self.value.shape[-1] ** 0.5


class _Run(fx.Interpreter):
    """One run on ``attributes`` in the place of what the module holds. path: of a body, in the graph that calls it;
    filled: the zeros that the graph makes are noise, the same in both runs"""

    def __init__(
        self, gm: fx.GraphModule, attributes: dict[str, Tensor], sites: ProbeBank | None, filled: bool = False
    ) -> None:
        super().__init__(gm)
        self.attributes, self.sites, self.filled, self.path = attributes, sites, filled, ""

    def body(self, gm: fx.GraphModule) -> _Run:
        """What runs a graph that this one calls, and adds to what is found here."""
        inner = copy.copy(self)
        fx.Interpreter.__init__(inner, gm)
        name = next(name for name, module in self.submodules.items() if module is gm)
        inner.path = f"{self.path}.{name}" if self.path else name
        return inner

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if target is not CHECKPOINT:
            return super().call_function(target, args, kwargs)
        return self.body(args[0]).run(*args[1:], enable_io_processing=False)

    def named(self, node: fx.Node) -> str:
        """As ``TRACED`` has it."""
        return f"{self.path}/{node.name}" if self.path else node.name

    def fetch_attr(self, target: str) -> Any:
        return self.attributes[target] if target in self.attributes else super().fetch_attr(target)

    def call_module(self, target: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        names = [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]
        held = {name: self.attributes[f"{target}.{name}"] for name in names}
        return torch.func.functional_call(module, held, args, kwargs) if held else module(*args, **kwargs)

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if self.filled and makes_zeros(node) and isinstance(value, Tensor) and value.is_floating_point():
            name = node.meta.get(TRACED, self.named(node))
            return noise_like(value, torch.Generator().manual_seed(crc32(name.encode())))
        return value

    def values_of(self, node: fx.Node) -> tuple:
        return fx.map_arg(node.args, lambda arg: self.env[arg])

    def site(self, node: fx.Node) -> tuple[Tensor, Tensor | None]:
        """The sum at a marker, and what was added; a marker that is none of ours adds nothing, in both runs."""
        y, *rest = self.values_of(node)
        if self.sites is None or not self.sites.knows(node):
            return y.clone(), None
        delta = self.sites.delta(node, y, *rest)
        return (y.double() + delta).to(y.dtype), delta


class Traced(_Run):
    """Runs the traced graph and keeps what ``stand_ins`` and ``readers`` (names of nodes) gave."""

    def __init__(
        self,
        gm: fx.GraphModule,
        attributes: dict[str, Tensor],
        sites: ProbeBank | None,
        stand_ins: Collection[StandIn],
        readers: Collection[str],
        filled: bool = False,
    ) -> None:
        super().__init__(gm, attributes, sites, filled)
        self._sums = {one.out: one for one in stand_ins}
        self._results = {one.result for one in stand_ins}
        self._readers = set(readers)
        self._kinds: dict[str, tuple[torch.dtype, int]] = {}  # dtype and width, by node
        self._sizes: dict[str, tuple[Tensor, float, float, float]] = {}  # by the sum
        self._stand_ins = stand_ins
        self._kept: dict[str, Any] = {}
        self.outputs: list[Any] = []

    def run_node(self, node: fx.Node) -> Any:
        name = self.named(node)
        one, y = self._sums.get(name), None
        if one is not None and one.y:
            y = next(self.env[arg] for arg in node.all_input_nodes if self.named(arg) == one.y)
            y = y.clone()  # it may be written to
        if node.target in SITES:
            value, delta = self.site(node)
            y = self.values_of(node)[0]
        else:
            value = super().run_node(node)
            delta = value.double() - y.double() if y is not None else None
        if isinstance(value, Tensor) and value.is_floating_point():
            width = value.shape[-1] if value.dim() else 1
            if self.sites is not None and self.sites.knows(node):
                width = max(width, self.sites.in_features(node))
            self._kinds[name] = value.dtype, width
        if one is not None and delta is not None:
            self._sizes[one.out] = (_rows(value) + _rows(delta), rms(delta), rms(y), self._bound(one, node, value))
        if name in self._results or name in self._readers:
            self._kept[name] = copied(value)
        if node.op == "output" and not self.path:
            self.outputs = [copied(self.env[leaf]) for leaf in leaves(node)]
        return value

    def truths(self) -> dict[str, Truth]:
        """By the sum."""
        return {
            one.out: Truth(self._kept[one.result], *self._sizes[one.out])
            for one in self._stand_ins
            if one.out in self._sizes and isinstance(self._kept.get(one.result), Tensor)
        }

    def hidden(self) -> int:
        """How many outputs show nothing of what was added."""
        return sum(not truth.is_visible for truth in self.truths().values())

    def reader(self, name: str) -> Any:
        return self._kept.get(name)

    def _bound(self, one: StandIn, out: fx.Node, value: Tensor) -> float:
        names = [*one.inside, *([one.y] if one.y else []), *(self.named(arg) for arg in out.all_input_nodes)]
        kinds = [self._kinds[name] for name in (*names, self.named(out)) if name in self._kinds]
        return bound([dtype for dtype, _ in kinds], max(width for _, width in kinds), value.device)


class Rewritten(_Run):
    """Runs the rewritten graph on the values of the traced one. ``blame``: who gave others, and why."""

    def __init__(
        self, gm: fx.GraphModule, attributes: dict[str, Tensor], sites: ProbeBank | None, traced: Traced
    ) -> None:
        super().__init__(gm, attributes, sites, traced.filled)
        self._traced, self._truths = traced, traced.truths()
        self.blame: Blame = {}

    def run_node(self, node: fx.Node) -> Any:
        if KEY in node.meta and not self.path:  # a body is given what the graph that calls it has
            return self.sites.inputs(node)
        if node.target in SITES:
            return self.site(node)[0]
        if GROUP in node.meta and STANDS_FOR not in node.meta:
            try:
                return super().run_node(node)
            except Exception as error:  # whatever a wrong rewrite may lead to
                return error
        if (one := node.meta.get(STANDS_FOR)) is not None:
            return self._judge(one, node)
        value = super().run_node(node)
        if node.op == "output" and not self.path:
            self._compare_outputs(node)
        read = stand_ins_of(node.all_input_nodes)
        truth = self._traced.reader(node.meta.get(TRACED, "")) if read else None
        if truth is None or alike(value, truth):
            return value
        self._accuse(read, "what reads its result gave other numbers on probe inputs")
        return copied(truth)

    def _judge(self, one: StandIn, node: fx.Node) -> Any:
        failed = next((v for v in map(self.env.get, node.all_input_nodes) if isinstance(v, Exception)), None)
        try:
            got = failed or super().run_node(node)
        except Exception as error:  # whatever a wrong rewrite may lead to
            got = error
        truth = self._truths.get(one.out)
        if truth is None:
            self._accuse([one], "nothing in the graph as it was traced is known to be what it stands for")
            return got
        if isinstance(got, Exception):
            self._accuse([one], f"its rewrite failed on probe inputs ({type(got).__name__})")
        elif not truth.is_visible:
            self._accuse([one], "its rewrite can't be proved: what it adds on probe inputs is zero or not finite")
        elif got.dtype != truth.value.dtype or got.shape != truth.value.shape:
            self._accuse([one], "its rewrite gave another shape or dtype on probe inputs")
        elif (error := worst(got, truth)) > truth.bound:
            said = f"relative error {error:.1e}, of which {truth.bound:.1e} may be rounding"
            self._accuse([one], f"its rewrite gave other numbers on probe inputs: {said}")
        return copied(truth.value)

    def _compare_outputs(self, node: fx.Node) -> None:
        pairs = zip(leaves(node), self._traced.outputs, strict=True)
        wrong = [leaf for leaf, truth in pairs if not alike(self.env[leaf], truth)]
        if wrong and not self.blame:
            self._accuse(stand_ins_of(ancestors(wrong)), "the graph's results are other ones on probe inputs")

    def _accuse(self, stand_ins: Collection[StandIn], reason: str) -> None:
        for one in stand_ins:
            self.blame.setdefault(one.out, reason)


def makes_zeros(node: fx.Node) -> bool:
    return (
        node.target in ZEROS if node.op == "call_function" else (node.op, node.target) == ("call_method", "new_zeros")
    )


def bound(dtypes: Collection[torch.dtype], width: int, device: torch.device) -> float:
    """How far apart rounding may bring two ways to compute a sum, as a ratio: see the top of this file."""
    steps = [torch.finfo(dtype).eps for dtype in dtypes]
    product = torch.finfo(torch.float32 if max(steps) > torch.finfo(torch.float64).eps else torch.float64).eps
    if device.type == "cuda":
        steps.append(MATMUL_STEPS[torch.get_float32_matmul_precision()])
    return 4 * max(steps) + 8 * product * width**0.5


def worst(got: Tensor, truth: Truth) -> float:
    """The largest error of a row, as a ratio to its size; infinite where what is not finite differs."""
    want, have = _with_rows(truth.value).double(), _with_rows(got).double()
    odd = ~want.isfinite()
    if not torch.equal(odd, ~have.isfinite()):
        return torch.inf
    error = (have - want).masked_fill(odd, 0.0).norm(dim=-1)
    size = truth.size + FLOOR * rms(truth.size)
    return float((error / size).max()) if error.numel() else 0.0


def alike(got: Any, want: Any) -> bool:
    """The same, up to the rounding of sums that are added up in another order."""
    if got is want:
        return True
    ours, theirs = pytree.tree_leaves(got), pytree.tree_leaves(want)
    return len(ours) == len(theirs) and all(map(_alike, ours, theirs))


def _alike(got: Any, want: Any) -> bool:
    if got is want:
        return True
    if not isinstance(want, Tensor):
        return not isinstance(want, (int, float)) or got == want or got != got
    if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return False
    if not want.is_floating_point():
        return torch.equal(got, want)
    odd = ~want.isfinite()
    if not torch.equal(odd, ~got.isfinite()):
        return False
    error = (got.double() - want.double()).masked_fill(odd, 0.0).norm()
    allowed = bound([want.dtype], max(want.shape, default=1), want.device)
    return bool(error <= allowed * want.double().masked_fill(odd, 0.0).norm())


def readers_of(gm: fx.GraphModule) -> set[str]:
    """Traced names of the nodes that read an output of a fused op."""
    outs = [node for node in all_nodes(gm) if STANDS_FOR in node.meta]
    return {traced_name(user) for out in outs for user in out.users if user.op != "output"}


def all_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """Those of the bodies that ``gm`` calls, and its own."""
    return [node for one in (*bodies_of(gm).values(), gm) for node in one.graph.nodes]


def stand_ins_of(nodes: Collection[fx.Node]) -> list[StandIn]:
    return [node.meta[STANDS_FOR] for node in nodes if STANDS_FOR in node.meta]


def ancestors(nodes: Collection[fx.Node]) -> set[fx.Node]:
    seen, stack = set(), list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return seen


def leaves(output: fx.Node) -> list[fx.Node]:
    """What is returned, each as often as it is."""
    found: list[fx.Node] = []
    fx.map_arg(output.args, found.append)
    return found


def copied(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)


def _rows(value: Tensor) -> Tensor:
    value = _with_rows(value).double()
    return value.masked_fill(~value.isfinite(), 0.0).norm(dim=-1)


def _with_rows(value: Tensor) -> Tensor:
    return value if value.dim() else value[None]
