"""Prompts that no adapter was trained on, and simple checks of each adapter's style."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

DATA = Path(__file__).parent / "data"

PROMPTS = [
    "What is the capital of Italy?",
    "What colour is the sky?",
    "What does a cow eat?",
    "How do I make a cup of tea?",
    "Suggest a place to visit in Japan.",
    "How many legs does a spider have?",
    "I feel tired today.",
    "How can I sleep better?",
    "Name a yellow fruit.",
    "Why is exercise important?",
]

# Words that the two languages share ("on", "a", "an", "me", "fruit") are in neither set.
FRENCH = set(
    "le la les l un une des du de d au aux et ou est sont c ce cette ces il elle ils elles je j vous nous tu se s "
    "votre vos mon ma mes son sa ses ne n pas que qu qui dans sur pour avec par sans plus très bien faut avez avoir "
    "être fait faites font peut pouvez devez prenez buvez mettez en y oui non bonjour merci quatre huit eau".split()
)
ENGLISH = set(
    "the of and is are to in it that this you your i my we our they he she with for from by at as be can should have "
    "has not do does what how why which there here would will like some about into or if but eat drink make".split()
)
PIRATE = re.compile(r"\b(arr+|matey|mateys|aye|ahoy|ye|yer|avast|landlubber|scurvy|cap'n|fer|'em)\b", re.IGNORECASE)


def is_json(text: str) -> bool:
    """One valid JSON object and nothing else."""
    try:
        return isinstance(json.loads(text.strip()), dict)
    except ValueError:
        return False


def is_french(text: str) -> bool:
    """Of the words that tell the two languages apart, at least two and at least three quarters are French."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    french = sum(word in FRENCH or re.search("[àâçéèêëîïôûùœ]", word) is not None for word in words)
    english = sum(word in ENGLISH for word in words)
    return french >= 2 and french >= 3 * english


def is_pirate(text: str) -> bool:
    """Some word that only a pirate says."""
    return PIRATE.search(text) is not None


CHECKS: dict[str, Callable[[str], bool]] = {
    "json": is_json,
    "french": is_french,
    "pirate": is_pirate,
    "upper": str.isupper,
}


def plain(prompt: str) -> str:
    """The prompt without what does not make it another question: case, punctuation, spaces."""
    return " ".join(re.findall(r"\w+", prompt.casefold()))


@cache
def trained() -> frozenset[str]:
    """Every prompt in the data files, made plain."""
    lines = (line for name in CHECKS for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    return frozenset(plain(json.loads(line)["prompt"]) for line in lines)


def unseen(prompt: str) -> bool:
    """Whether no adapter was trained on this prompt."""
    return plain(prompt) not in trained()
