"""Files that are there whole or not at all: written into a new folder beside the place, then put there."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lorafx.errors import LorafxError


@contextmanager
def new_file(path: Path, overwrite: bool) -> Iterator[Path]:
    """Where to write what is the file ``path`` after the block.

    LorafxError: it is there and ``overwrite`` is not said, or the system refuses
    """
    _check_free([path], overwrite)
    with _beside(path) as written:
        yield written / path.name
        _check_free([path], overwrite)
        os.replace(written / path.name, path)


@contextmanager
def new_folder(folder: Path, first: str, others: Iterable[str], overwrite: bool) -> Iterator[Path]:
    """Where to write what is in ``folder`` after the block: the file ``first``, and any of ``others``.

    Of a folder that is there already only these are replaced. ``first`` leaves it before and comes back after the
    others: cut off in between, the folder has none, and nobody can read old and new files together.

    LorafxError: one of them is there and ``overwrite`` is not said, or the system refuses
    """
    ours = [folder / first, *(folder / other for other in others)]
    _check_free(ours, overwrite)
    with _beside(folder) as written:
        yield written
        _check_free(ours, overwrite)
        if not os.path.lexists(folder):
            os.rename(written, folder)
            return
        for path in ours:
            path.unlink(missing_ok=True)
        for path in reversed(ours):
            if (written / path.name).exists():
                os.replace(written / path.name, path)


def _check_free(paths: Iterable[Path], overwrite: bool) -> None:
    there = [path for path in paths if os.path.lexists(path)]
    if there and not overwrite:
        raise LorafxError(f"{str(there[0])!r} is there already; pass overwrite=True to replace it, or another place.")


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    written = place.parent / f".{place.name}-{uuid.uuid4().hex}"
    try:
        written.mkdir(parents=True)
        yield written
    except OSError as error:
        raise LorafxError(
            f"{str(place)!r} can't be written: {error}. Expected a place that this process may write, with room."
        ) from error
    finally:
        shutil.rmtree(written, ignore_errors=True)
