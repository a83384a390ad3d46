"""The command line of the entry scripts: gin files in, a checked RunConfig out, or a readable list of mistakes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from hstu.config.errors import ConfigError, UserError, let_another_rank_tell
from hstu.config.gin_io import read
from hstu.config.problems import in_reading_order
from hstu.config.reference import explain
from hstu.config.rule_engine import Run
from hstu.config.rules import advice, rule
from hstu.config.run_config import RunConfig, Task


def parse_command_line(task: Task, argv: Sequence[str] | None = None) -> RunConfig:
    """Reads the command line (``sys.argv`` by default) and the gin files it names; checks everything there is to check.

    On mistakes prints all of them, on rank 0 alone, and exits with code 2. ``--validate-only``, ``--print-config``
    and ``--explain`` print what they are asked for and exit with code 0. Warnings go to standard error.
    """
    is_first_rank = os.environ.get("RANK", "0") == "0"  # RANK and WORLD_SIZE are set by torchrun
    try:
        options = _parser(task).parse_args(argv)
        if options.explain is not None:
            _finish(explain(options.explain), is_first_rank)
        world_size = _world_size(os.environ)
        config, warnings = read_and_check(options.files, options.bindings, task, world_size)
    except ConfigError as error:
        if is_first_rank:
            print(_headline(error) + str(error), file=sys.stderr)
        else:
            let_another_rank_tell()
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


def read_and_check(
    files: Sequence[str], bindings: Sequence[str], task: Task, world_size: int
) -> tuple[RunConfig, list[str]]:
    """``load`` and ``validate`` at once, so that ConfigError lists the problems of both. Returns warnings too."""
    if not files:
        raise ConfigError(
            f"no configuration: give --gin-config-file FILE, for example "
            f"--gin-config-file configs/ml_1m_{task}.gin (--help lists all options, --explain all parameters)"
        )
    draft = read(files, bindings, task)
    run = Run(task, world_size, draft.parts, draft.origins)
    if draft.complete:
        draft.problems += rule.apply(run)
    return draft.finish(), in_reading_order(advice.apply(run))


class _Parser(argparse.ArgumentParser):
    """Reports like the rest: once, through ConfigError."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message} (--help lists the options)")


def _parser(task: Task) -> argparse.ArgumentParser:
    parser = _Parser(
        description=f"Train an HSTU model for {task}. Everything is set in gin files.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--gin-config-file",
        dest="files",
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help="gin file; may be repeated, later files win",
    )
    add(
        "--gin-bindings",
        dest="bindings",
        action="extend",
        nargs="+",
        default=[],
        metavar="BINDING",
        help='"Class.parameter = value"; may be repeated, wins over the files',
    )
    add("--validate-only", action="store_true", help="check everything, print one line, exit")
    add("--print-config", action="store_true", help="print the configuration in force, defaults included, exit")
    add(
        "--explain",
        nargs="*",
        metavar="CLASS",
        help="print the parameters of these classes (of all, if none is named), exit",
    )
    return parser


def _world_size(environment: Mapping[str, str]) -> int:
    text = environment.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"WORLD_SIZE = {text!r} in the environment: expected the number of ranks, as torchrun sets it"
        )
    return int(text)


def _headline(error: UserError) -> str:
    count = len(error.problems) if isinstance(error, ConfigError) else 1
    return "bad configuration: " if count == 1 else f"bad configuration, {count} problems:\n"


def _finish(text: str, is_first_rank: bool) -> NoReturn:
    if is_first_rank:
        print(text.rstrip("\n"))
    sys.exit(0)
