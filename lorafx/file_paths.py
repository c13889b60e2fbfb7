"""Which files are opened at all: regular ones, and under a root folder only those that lie in it."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lorafx.errors import AdapterFormatError, AdapterMismatchError

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def find_regular(name: str, path: Path) -> os.stat_result | None:
    """What the system knows of the file at ``path``, links followed; None: there is none.

    AdapterFormatError: no regular file (nothing is opened: a pipe would wait for ever), or it can't be reached
    """
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise AdapterFormatError(
                f"adapter {name!r}: {str(path)!r} is a link to {os.readlink(path)!r}, which is not there. Expected a"
                " file: download the adapter again, or mend the link."
            ) from error
        return None
    except (OSError, ValueError) as error:  # a loop of links, no permission, a path that no system takes
        raise AdapterFormatError(
            f"adapter {name!r}: {str(path)!r} can't be reached ({error}). Expected a file that this process may read."
        ) from error
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
        raise AdapterFormatError(f"adapter {name!r}: {str(path)!r} is {kind}; expected a regular file.")
    return found


def read_bytes(name: str, path: Path, limit: int) -> bytes:
    """The content of the regular file at ``path``, which may have ``limit`` bytes.

    AdapterFormatError: it has more, or can't be read
    """
    content = read_start(name, path, limit + 1)
    if len(content) > limit:
        raise AdapterFormatError(
            f"adapter {name!r}: {str(path)!r} has more than {limit:,} bytes; expected a few thousand. Is it another"
            " file?"
        )
    return content


def read_start(name: str, path: Path, count: int) -> bytes:
    """The first ``count`` bytes of the regular file at ``path``, or all where it has fewer."""
    try:
        # without O_NONBLOCK a file that has just become a pipe would wait for ever
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise AdapterFormatError(f"adapter {name!r}: {str(path)!r} is no regular file; expected one.")
            return file.read(count)
    except OSError as error:
        raise AdapterFormatError(f"adapter {name!r}: {str(path)!r} can't be read: {error}") from error


def inside(root: Path, name: Any, files: tuple[str, ...] = ()) -> Path:
    """The folder called ``name`` under ``root``: the way from a name that a request brings to a folder on disk.

    files: in that folder; each must lie under ``root`` too, where it is there

    AdapterMismatchError: not a name of something under ``root``, be it by ``..`` or by a link
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise AdapterMismatchError(f"got {name!r} as the name of an adapter; expected the name of a folder in {root}")
    parts = name.split("/")
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or "\\" in name
    if absolute or any(part in ("", ".", "..") for part in parts):
        raise AdapterMismatchError(
            f"got {name!r} as the name of an adapter; expected the name of a folder in {root}, without '..', and"
            " relative to it"
        )
    folder = Path(root, *parts)
    try:
        base = Path(root).resolve()
        for path in (folder, *(folder / file for file in files)):
            end = path.resolve()
            if not end.is_relative_to(base):
                raise AdapterMismatchError(
                    f"adapter {name!r}: {str(path)!r} is a link out of {root}, to {str(end)!r}. Only what lies under"
                    " that folder is served: copy the adapter into it."
                )
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise AdapterMismatchError(f"adapter {name!r}: {str(folder)!r} can't be reached: {error}") from error
    return folder
