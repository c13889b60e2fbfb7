"""Regular expressions that an adapter's config brings: which of them are safe to run.

PEFT runs them with Python's ``re``, which backtracks: ``(a+)+b`` on a layer's name of 60 letters takes longer than the
machine will live. A pattern is parsed, never run, and the steps that matching it may take are counted from above.

    .*\\.(q|k)_proj     1 star: as many ways as a name has letters; q and k exclude each other: 1 way
    (?:.|m)(?:.|o)     2 * 2 ways
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

try:
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_parse as parser

NAME = 64  # letters of a layer's name, about
STEPS_LIMIT = 4_000_000  # for one name, some 50 ms: four stars fit, five don't
FEW = 4  # a repeat of so many times more or less is no star
LENGTH_LIMIT = 16_384
DEPTH_LIMIT = 20

ONE_CHARACTER = {"ANY", "ANY_ALL", "LITERAL", "NOT_LITERAL", "IN", "RANGE", "CATEGORY"}
REPEATS = {"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"}
INSTEAD = "List the layers' names in its place, as in ['q_proj', 'v_proj']."


@dataclass(frozen=True)
class Cost:
    """Of matching a part of a pattern at one place.

    ways: in how many ways it may match, times those of its ``stars``; steps: to try them all, likewise
    lead: the text that it must begin with; exact: and it is nothing but that text
    """

    ways: int
    stars: int
    steps: int
    lead: str = ""
    exact: bool = False

    @property
    def all_ways(self) -> int:
        """Stars that stand behind each other share the letters of one name."""
        return self.ways * math.comb(NAME + self.stars, self.stars)


NOTHING = Cost(1, 0, 1, "", True)
NOWHERE = Cost(1, 0, 0, "", True)


def count_steps(pattern: str) -> int:
    """How many steps matching ``pattern`` against the name of a layer may take, from above.

    ValueError: it is no regular expression, or one that may take more than ``STEPS_LIMIT``
    """
    if len(pattern) > LENGTH_LIMIT:
        raise ValueError(f"it has {len(pattern):,} characters, at most {LENGTH_LIMIT:,} are taken. {INSTEAD}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parsed = parser.parse(pattern)
    except (parser.error, OverflowError, RecursionError) as error:
        raise ValueError(f"it is no regular expression: {error}") from error
    steps = _sequence(parsed, 0).steps
    if steps > STEPS_LIMIT:
        raise ValueError(f"matching it may take {steps:,} steps for each layer, at most {STEPS_LIMIT:,}. {INSTEAD}")
    return steps


def _sequence(items: Sequence[tuple[Any, Any]], depth: int) -> Cost:
    """One part after another: each is tried for every way in which those before it match."""
    total, before = NOTHING, ""
    for kind, argument in _without_groups(items, depth):
        part = _part(str(kind), argument, depth)
        ways = Cost(total.ways * part.ways, total.stars + part.stars, 0)
        steps = total.all_ways * part.steps
        if str(kind) == before == "LITERAL":
            steps = 0  # a text costs little more than its first letter
        if part.stars:
            steps += ways.all_ways  # a star goes from way to way
        total = Cost(
            ways.ways,
            ways.stars,
            total.steps + steps,
            total.lead + part.lead if total.exact else total.lead,
            total.exact and part.exact,
        )
        before = str(kind)
    return total


def _without_groups(items: Iterable[tuple[Any, Any]], depth: int) -> Iterator[tuple[Any, Any]]:
    """What stands in a group that is there once, in the group's place."""
    if depth > DEPTH_LIMIT:
        raise ValueError(f"its groups are nested more than {DEPTH_LIMIT} deep. {INSTEAD}")
    for kind, argument in items:
        if str(kind) == "SUBPATTERN":
            yield from _without_groups(argument[3], depth + 1)
        else:
            yield kind, argument


def _part(kind: str, argument: Any, depth: int) -> Cost:
    if kind == "LITERAL" and argument <= 0x7F:
        return Cost(1, 0, 1, chr(argument).lower(), True)  # M and m may be one: (?i)
    if kind == "IN":
        _check_set(argument)
    if kind in ONE_CHARACTER:
        return Cost(1, 0, 1)
    if kind == "AT":
        return NOWHERE
    if kind in REPEATS:
        return _repeat(*argument, depth)
    if kind == "ATOMIC_GROUP":
        return _sequence(argument, depth + 1)
    if kind in ("ASSERT", "ASSERT_NOT"):  # once it holds, it is not tried again
        return Cost(1, 0, _sequence(argument[1], depth + 1).steps)
    if kind == "BRANCH":
        return _branch([_sequence(items, depth + 1) for items in argument[1]])
    if kind == "FAILURE":
        return Cost(1, 0, 1)
    what = "refers back to a group" if kind.startswith("GROUPREF") else f"has a part of the kind {kind}"
    raise ValueError(f"it {what}, whose cost can't be told. {INSTEAD}")


def _repeat(least: int, most: int, items: Any, depth: int) -> Cost:
    """A star over one character, or a group that may be left out."""
    if len(items) == 1 and str(items[0][0]) in ONE_CHARACTER:
        _part(str(items[0][0]), items[0][1], depth)
        few = most - least < FEW
        return Cost(most - least + 1 if few else 1, 0 if few else 1, 1)
    if least == 0 and most == 1:
        inner = _sequence(items, depth + 1)
        return Cost(inner.ways + 1, inner.stars, inner.steps + 1)
    raise ValueError(f"it repeats a group, which may take for ever. {INSTEAD}")


def _branch(choices: list[Cost]) -> Cost:
    """Choices of which none begins like another exclude each other."""
    leads: dict[str, int] = {}
    for choice in choices:
        leads[choice.lead] = leads.get(choice.lead, 0) + choice.ways
    ways = max(sum(leads.get(lead[:end], 0) for end in range(len(lead) + 1)) for lead in leads)
    return Cost(ways, max(choice.stars for choice in choices), sum(choice.steps for choice in choices))


def _check_set(members: Sequence[tuple[Any, Any]]) -> None:
    for kind, argument in members:
        if str(kind) == "RANGE" and argument[1] > 0x7F:
            raise ValueError(f"it has a range of characters beyond ASCII. {INSTEAD}")
