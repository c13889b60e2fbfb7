"""What the passes are told besides the graph: how to lower, and where the bank keeps each site."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from lorafx.passes.record import PassRecord


@dataclass(frozen=True)
class SiteGeometry:
    """Where one adapted layer stands in the bank's flat storage and tables. Offsets are in elements."""

    name: str
    parent: str
    in_features: int
    out_features: int
    capacity: int  # rank rows
    biases: int  # LoRA bias rows, which stand after the rank rows of B
    a_offset: int  # A: [capacity, in_features]
    b_offset: int  # B: [capacity + biases, out_features]
    lane: int  # first entry in the table `owner`: capacity + biases entries
    column: int  # the site's column in the tables of windows and scales

    @property
    def lanes(self) -> int:
        return self.capacity + self.biases


@dataclass
class PassContext:
    """One compilation: options in, record out. ``fold``: layers may be folded into the op that adapts them;
    ``bank_key`` is the number that this bank's markers carry; ``factors``: of sites that DoRA may stand on, how many
    rows their table of factors has, and where in the bank's it begins; ``late``: sites that an adapter may
    have from a position on only; ``refused``: sums and site markers, by the names of their nodes, that are to stay."""

    lowering: str = "auto"
    bank_key: int | None = None
    sites: Sequence[SiteGeometry] = ()
    factors: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    late: Collection[str] = ()
    fold: bool = True
    refused: Collection[str] = ()
    record: PassRecord = field(default_factory=PassRecord)
