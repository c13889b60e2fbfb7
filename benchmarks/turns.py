"""Contenders take turns in one process: what disturbs a round disturbs all of it, and ratios within it stay."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

WARM_UP = 3  # rounds


@dataclass(frozen=True)
class Quartiles:
    low: float
    median: float
    high: float


def quartiles(values: Sequence[float]) -> Quartiles:
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def ratios(of: Sequence[float], to: Sequence[float]) -> Quartiles:
    """Of the two times of each round: what slows a whole round down then cancels."""
    return quartiles([a / b for a, b in zip(of, to, strict=True)])


def take_turns(contenders: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, in another order every round; the first rounds are not counted."""
    names, seconds = list(contenders), {name: [] for name in contenders}
    for i in range(-WARM_UP, rounds):
        random.shuffle(names)
        for name in names:
            spent = contenders[name](i)
            if i >= 0:
                seconds[name].append(spent)
    return seconds


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
