"""Progress bars for what may take long, on stderr.

They are transformers' own, so what switches those off switches these off: ``disable_progress_bar()`` of
``transformers.utils.logging``, HF_HUB_DISABLE_PROGRESS_BARS, TQDM_DISABLE.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TypeVar

from transformers.utils import logging as transformers_logging

T = TypeVar("T")

DELAY = 2.0  # seconds: what is done by then needs no bar


def bar(items: Collection[T], title: str) -> Iterable[T]:
    """``items``, with a bar that comes if they take longer than ``DELAY``, and goes when they are done."""
    if len(items) < 2:
        return items
    # miniters: with anything else tqdm's monitor thread would write too
    return transformers_logging.tqdm(items, desc=f"lorafx: {title}", leave=False, delay=DELAY, miniters=1)
