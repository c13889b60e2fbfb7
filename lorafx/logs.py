"""What lorafx says: warnings, once each; and with ``LORAFX_LOGS``, for who has set up no logging, its work on stderr.

    LORAFX_LOGS=info           what is read, packed and compiled, and how long that takes
    LORAFX_LOGS=graph          each graph as traced, and as rewritten
    LORAFX_LOGS=debug          everything; several words are separated by commas

All of it goes through the logger "lorafx", the graphs through "lorafx.graphs" at level DEBUG. torch's own switch serves
too: ``TORCH_LOGS=lorafx`` is info, ``TORCH_LOGS=+lorafx`` everything.
"""

from __future__ import annotations

import logging
import warnings

NAME = "lorafx"
GRAPHS = "lorafx.graphs"
WORDS = {"info": (NAME, logging.INFO), "debug": (NAME, logging.DEBUG), "graph": (GRAPHS, logging.DEBUG)}


def switch_on(setting: str) -> None:
    """setting: words of ``WORDS``, separated by commas; an unknown one is said in a warning, and left out."""
    words = [word.strip().lower() for word in setting.split(",") if word.strip()]
    known = [word for word in words if word in WORDS]
    if unknown := [word for word in words if word not in WORDS]:
        warnings.warn(f"LORAFX_LOGS has {unknown[0]!r}; expected {', '.join(WORDS)}", stacklevel=3)
    for word in known:
        name, level = WORDS[word]
        logger = logging.getLogger(name)
        logger.setLevel(min(level, logger.level or level))
    if known:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s", "%H:%M:%S"))
        logging.getLogger(NAME).addHandler(handler)


def warn_once(message: str, seen: set[str] = set()) -> None:  # noqa: B006  (the memory of what was said)
    """One warning, once, for what costs a user speed."""
    if message not in seen:
        seen.add(message)
        warnings.warn(message, stacklevel=3)
