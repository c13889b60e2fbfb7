"""What the passes did to one graph: plain data, for logs, for ``lorafx.explain`` and for tests."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import fx

from lorafx.passes.branch import Skipped


@dataclass(frozen=True)
class FusedBranch:
    """One sibling of a fused group."""

    name: str
    in_features: int | None
    out_features: int | None
    rank: int | None = None  # of the branch that stood in the graph; None where a bank holds the adapters


@dataclass(frozen=True)
class FusedGroup:
    """One fused op: the module its siblings share, the siblings, what the op is to lower to and why."""

    parent: str
    branches: tuple[FusedBranch, ...]
    lowering: str
    op: str  # "routed_lora" or "fused_lora"
    reason: str = ""
    itemsize: int = 4  # bytes of an element of x


@dataclass(frozen=True)
class Box:
    """One step in a drawing of a layer.

    kind: "base" (a linear layer), "lora" (part of a branch), "fused", "other" (what else a module does), "edge" (where
    data comes in or goes out); inputs: positions of the boxes it reads, all of them before it
    """

    label: str
    kind: str
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Sketch:
    """One layer as boxes. ``layer`` is its path, "" where the whole graph is shown."""

    layer: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class StandIn:
    """What one output of a fused op replaces, in ``meta[STANDS_FOR]`` of the node that takes it out of the op.

    name: of the layer; result, out, y, inside: nodes of the graph as it was traced, by name: whose place the output
    takes, what computes the sum, the base output in it ("" for a site, which is all of this itself), and what is
    computed on the way from x, with x
    b, bias: the weights of the second half, as inputs or attributes; None for a site, whose weights a bank has
    factor: what the bias is multiplied by, as far as that is known
    """

    name: str
    result: str
    out: str
    y: str = ""
    inside: tuple[str, ...] = ()
    b: str | None = None
    bias: str | None = None
    factor: float = 1.0


STANDS_FOR = "lorafx_stands_for"


@dataclass
class PassRecord:
    """Counts and reasons of one run over one graph; op counts are by name, placeholders and outputs left out."""

    groups: list[FusedGroup] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    before: Counter[str] = field(default_factory=Counter)
    after: Counter[str] = field(default_factory=Counter)
    folded: int = 0  # layers of the model itself that went into a fused op
    sketches: tuple[Sketch, Sketch] | None = None  # the first layer with a branch, before and after
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # site -> shape of its input, as traced
    proved: int | None = None  # branches and sites that gave the same on probe inputs; None: that was not asked for


def count_ops(graph: fx.Graph) -> Counter[str]:
    """How often each op stands in ``graph``, by name."""
    return Counter(op_name(node) for node in graph.nodes if node.op.startswith("call_"))


def op_name(node: fx.Node) -> str:
    """A short name for what a node calls: ``linear``, ``lorafx.routed_lora``, ``view``."""
    target = node.target
    if isinstance(target, str):
        return target
    if hasattr(target, "overloadpacket"):  # an OpOverload
        namespace, _, name = target._schema.name.partition("::")
        return name if namespace == "aten" else f"{namespace}.{name}"
    return getattr(target, "__name__", str(target))
