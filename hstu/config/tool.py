"""Ends command line tools with an exit code, without a traceback, for errors that are no defects."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from hstu.base.errors import EXIT_BAD_DATA, UserError, printable, report_once

_EXIT_SIGNAL = 128
"""The exit code of a process killed by a signal is this plus the signal number."""


def tool(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Decorates the main function of a tool: prints a UserError once for all ranks and exits with its code.
    An unreadable or unwritable file exits with 3, Ctrl-C with 130, a closed standard output (``| head``) with 141."""

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        try:
            with reader_may_leave():
                return main(arguments)
        except UserError as error:
            report_once(f"error: {error}")
            return error.exit_code
        except OSError as error:  # a file that cannot be read or written
            if error.filename is None:
                raise
            print(f"error: {printable(str(error.filename))}: {error.strerror}", file=sys.stderr)
            return EXIT_BAD_DATA
        except KeyboardInterrupt:
            return _EXIT_SIGNAL + signal.SIGINT

    return run


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Exits silently with 141 if the reader of standard output has closed it."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes standard output again at exit
        sys.exit(_EXIT_SIGNAL + signal.SIGPIPE)
