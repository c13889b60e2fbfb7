"""The console script ``lorafx``. A package of its own: importing ``lorafx`` imports torch, which takes seconds, and
neither ``--help`` nor a wrong option should wait for that. What the commands do is in ``lorafx/cli``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
MESSAGE_LIMIT = 1000  # letters of an error that come to the terminal


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 the job failed, 2 wrong usage, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from lorafx_cli.app import app
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        return say("lorafx's command line needs typer and rich: pip install 'lorafx[cli]'", USAGE)
    debug = "--debug" in given or os.environ.get("LORAFX_DEBUG", "") not in ("", "0")
    try:
        done = app(given or ["--help"], prog_name="lorafx", standalone_mode=False) or DONE
        sys.stdout.flush()
        return done
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has gone; nor may Python complain when it flushes at the end
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        return _failed(error, debug)


def _failed(error: Exception, debug: bool) -> int:
    import typer

    if isinstance(error, typer.Abort):  # what typer makes of Ctrl-C
        return INTERRUPTED
    if isinstance(error, typer.BadParameter.__bases__):  # the class of all that is wrong with a command line
        return say(error.format_message().removeprefix("Invalid value: "), USAGE)
    if debug:
        raise error
    from lorafx_cli.expected import is_expected

    if is_expected(error):
        return say(str(error) or type(error).__name__, FAILED)
    return say(f"unexpected {type(error).__name__}: {error} (LORAFX_DEBUG=1 shows where)", FAILED)


def say(message: str, code: int) -> int:
    """``error: message`` on stderr, in one line that holds no control characters. Returns ``code``."""
    line = " ".join(message.split())
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)
    if len(line) > MESSAGE_LIMIT:
        line = f"{line[:MESSAGE_LIMIT]}..."
    with suppress(OSError, ValueError):
        encoding = sys.stderr.encoding or "utf-8"
        print(f"error: {line}".encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr)
    return code
