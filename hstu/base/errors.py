"""User errors, exit codes, and text that is safe for terminals. Other exceptions are defects and exit with code 1."""

import logging
import os
import sys
import time
from collections.abc import Sequence

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_BAD_CONFIG = 2
EXIT_BAD_DATA = 3
_TIME_TO_REPORT_S = 6.0  # a process takes seconds to end on a busy host
_TIME_TO_KILL_S = 0.5


class UserError(Exception):
    """Base of errors that are shown without a traceback. The program exits with ``exit_code``."""

    exit_code = EXIT_FAILURE

    def __str__(self) -> str:
        return printable(super().__str__())

    def _render_traceback_(self) -> list[str]:  # what IPython shows in a notebook
        return [f"{type(self).__name__}: {self}"]


class ConfigError(UserError):
    """Mistakes in the configuration, one line each. ``warnings`` lists allowed settings that look wrong."""

    exit_code = EXIT_BAD_CONFIG

    def __init__(self, problems: str | list[str], warnings: Sequence[str] = ()) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.warnings = list(warnings)
        super().__init__("\n".join(self.problems))

    @classmethod
    def raise_if(cls, problems: list[str]) -> None:
        """Raise the error if there are problems."""
        if problems:
            raise cls(problems)


class DataError(UserError):
    """Missing, damaged or unexpected data. The text names the file and the remedy."""

    exit_code = EXIT_BAD_DATA


def report_once(text: str) -> None:
    """Print an error that all ranks may have, once per host.

    The first rank of a host prints at once and exits; torchrun then kills the others. Other ranks wait before they
    print, so they print only errors that the first rank lacks.
    """
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))
    if local_rank.isdecimal() and int(local_rank) > 0:
        time.sleep(_TIME_TO_REPORT_S + int(local_rank) * _TIME_TO_KILL_S)
    report(text)


def report(text: str) -> None:
    """Print an error to standard error, prefixed with the rank unless it is 0."""
    rank = os.environ.get("RANK", "0")
    prefix = "" if rank == "0" else f"[rank {rank}] "
    print(f"{prefix}{text}", file=sys.stderr, flush=True)


def printable(text: str, keep: str = "\n\t") -> str:
    """Replace invisible characters, except ``keep``, by codes like ``\\x1b``, so that ids cannot control a terminal."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text
    )


class PrintableFormatter(logging.Formatter):
    """Escapes invisible characters in messages. Tracebacks stay unchanged."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Format a record without its traceback."""
        record.message = printable(record.message)
        return super().formatMessage(record)
