"""Command lines: reads gin files into a checked RunConfig; what tools read, and their exit codes for users' errors."""

import argparse
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from hstu.base.errors import EXIT_BAD_DATA, ConfigError, DataError, UserError, printable, report_once
from hstu.config.args import Task
from hstu.config.gin_io import read_and_check
from hstu.config.reference import explain
from hstu.config.rules import RULES, Rule
from hstu.config.run_config import RunConfig

_EXIT_SIGNAL = 128
"""The exit code of a process killed by a signal is this plus the signal number."""


def parse_command_line(
    task: Task,
    argv: Sequence[str] | None = None,
    rules: Sequence[Rule] = RULES,
    preflight: Callable[[], Sequence[Rule]] = tuple,
) -> RunConfig:
    """Reads the command line (``sys.argv`` by default) and its gin files, and applies ``rules``.

    Prints all mistakes (``report_once``) and exits with 2. ``--validate-only``, ``--print-config`` and
    ``--explain`` print their output and exit with 0. Warnings go to standard error. ``preflight`` returns the rules
    that open data, checkpoints and directories. They run on rank 0 with ``--validate-only``, but not with ``--quick``.
    """
    is_first_rank = os.environ.get("RANK", "0") == "0"  # torchrun sets RANK and WORLD_SIZE
    try:
        options = _parser(task).parse_args(argv)
        if options.explain is not None:
            _finish(explain(options.explain), is_first_rank)
        if options.quick and not options.validate_only:
            raise ConfigError("command line: --quick belongs to --validate-only")
        world_size = _world_size(os.environ)
        if options.validate_only and not options.quick and is_first_rank:
            rules = (*rules, *preflight())
        config, warnings = read_and_check(options.files, options.bindings, task, world_size, rules)
    except ConfigError as error:
        count = len(error.problems)
        headline = "bad configuration: " if count == 1 else f"bad configuration, {count} problems:\n"
        report_once("\n".join([f"{headline}{error}", *(f"warning: {warning}" for warning in error.warnings)]))
        sys.exit(error.exit_code)
    except UserError as error:
        report_once(f"error: {error}")
        sys.exit(error.exit_code)
    if is_first_rank:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    if options.print_config:
        _finish(config.operative_gin(), is_first_rank)
    if options.validate_only:
        files = " ".join(options.files)
        _finish(f"OK: {files} describes a {task} run for {world_size} rank{'s'[: world_size > 1]}", is_first_rank)
    return config


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message} (--help lists the options)")


def _parser(task: Task) -> argparse.ArgumentParser:
    parser = _Parser(description=f"Train an HSTU model for {task}. Everything is set in gin files.", allow_abbrev=False)
    repeated: dict[str, Any] = {"action": "extend", "nargs": "+", "default": []}
    add = parser.add_argument
    files_help = "gin file, or the name of a shipped one; repeatable, later files win"
    add("--gin-config-file", dest="files", metavar="FILE", help=files_help, **repeated)
    bindings_help = '"Class.parameter = value"; repeatable, wins over the files'
    add("--gin-bindings", dest="bindings", metavar="BINDING", help=bindings_help, **repeated)
    validate_help = "check the files, and what they name: data, checkpoint, memory, disk; print one line, exit"
    add("--validate-only", action="store_true", help=validate_help)
    add("--quick", action="store_true", help="with --validate-only: check the files alone, in a second or two")
    add("--print-config", action="store_true", help="print the configuration in force, defaults included, exit")
    add("--explain", nargs="*", metavar="CLASS", help="print the parameters of these (or all) classes, exit")
    return parser


def _world_size(environment: Mapping[str, str]) -> int:
    text = environment.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"WORLD_SIZE = {text!r} in the environment: expected a number of ranks; torchrun sets it")
    return int(text)


def _finish(text: str, is_first_rank: bool) -> NoReturn:
    if is_first_rank:
        with reader_may_leave():
            print(text.rstrip("\n"))
    sys.exit(0)


# --- tools ---------------------------------------------------------------------------------------------------------


def tool(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Decorates the main function of a tool: prints a UserError once for all ranks and exits with its code.
    An unreadable or unwritable file exits with 3, Ctrl-C with 130, a closed standard output (``| head``) with 141."""

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # the scripts set it for the time of their imports
            signal.signal(signal.SIGINT, signal.default_int_handler)
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


def read_text(file: str) -> str:
    """Read the text of a file, or of standard input for "-"; line ends become "\\n". Raises DataError."""
    content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def parse_json(text: str, where: str) -> Any:
    """Parse JSON. Raises DataError that names ``where``, the source of the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error


def read_ids(file: str) -> list[str]:
    """Read raw ids from a file, one per line; "-" is standard input. Raises DataError."""
    return [line for line in read_text(file).split("\n") if line]


def parse_time(text: str, option: str = "--at") -> int:
    """Parse the value of an option, a time, into seconds since 1970. Raises DataError."""
    if text == "now":
        return int(time.time())
    if text.removeprefix("-").isdecimal():
        return int(text)
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        raise DataError(
            f"{option}: {text!r} is no time; give now, seconds since 1970, or a date such as 2026-01-31T18:00"
        ) from None
    return int((date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp())


def check_new(path: Path) -> None:
    """Raise DataError if an output path exists and is not an empty directory."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{path} exists; give another name, or remove it")
