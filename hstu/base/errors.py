"""The errors that a user can cause, the exit codes of the programs, and text that a terminal can show safely.

Any other exception is a defect of the program: it shows a traceback and exits with code 1.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_BAD_CONFIG = 2
EXIT_BAD_DATA = 3
_TIME_TO_REPORT_S = 2.0
_TIME_TO_KILL_S = 0.5


class UserError(Exception):
    """Base of errors that are shown without a traceback. ``exit_code`` is that of the program."""

    exit_code = EXIT_FAILURE

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(UserError):
    """One or more mistakes in the configuration, one line each; ``warnings`` are what is allowed but looks wrong."""

    exit_code = EXIT_BAD_CONFIG

    def __init__(self, problems: str | list[str], warnings: Sequence[str] = ()) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.warnings = list(warnings)
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """Data that is missing, damaged or of another kind than expected. The text names the file and what to do."""

    exit_code = EXIT_BAD_DATA


def report_once(text: str) -> None:
    """Print the text of an error that all ranks may have, once per host.

    The first rank of a host prints at once and exits, whereupon torchrun kills the others. Another rank waits, and
    prints if it is still alive: it alone has the error.
    """
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))
    if local_rank.isdecimal() and int(local_rank) > 0:
        time.sleep(_TIME_TO_REPORT_S + int(local_rank) * _TIME_TO_KILL_S)
    report(text)


def report(text: str) -> None:
    """Print the text of an error of this rank, with its number unless that is 0."""
    rank = os.environ.get("RANK", "0")
    prefix = "" if rank == "0" else f"[rank {rank}] "
    print(f"{prefix}{text}", file=sys.stderr, flush=True)


def printable(text: str, keep: str = "\n\t") -> str:
    """Control, escape and other invisible characters as codes such as ``\\x1b``, except those in ``keep``.

    An id cannot then steer a terminal, turn the direction of writing or, without ``keep``, begin a line of its own.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text
    )


class PrintableFormatter(logging.Formatter):
    """A formatter whose messages are printable. Tracebacks stay as they are."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of a record without its traceback."""
        record.message = printable(record.message)
        return super().formatMessage(record)
