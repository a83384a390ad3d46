"""Reads gin files and command-line bindings into a RunConfig, or raises an error that lists all mistakes."""

import os
from collections.abc import Sequence
from pathlib import Path

from hstu.base.errors import ConfigError, DataError
from hstu.base.shipped import shipped_configs
from hstu.config.args import RankingArgs, Task
from hstu.config.gin_builder import ConfigBuilder
from hstu.config.gin_scan import Scan, scan, scan_stored
from hstu.config.rules import RULES, Rule, check
from hstu.config.run_config import RunConfig


def load(files: Sequence[str], bindings: Sequence[str], task: Task | None) -> RunConfig:
    """Reads gin files (paths, or names of shipped ones; later ones win) and bindings (which win over files).
    Raises ConfigError with every problem. Checks each parameter alone, and ``read_and_check`` them together."""
    return read_and_check(files, bindings, task, world_size=1, rules=())[0]


def read_and_check(
    files: Sequence[str], bindings: Sequence[str], task: Task | None, world_size: int, rules: Sequence[Rule] = RULES
) -> tuple[RunConfig, list[str]]:
    """``load`` with ``rules``. Returns the configuration and its warnings. Raises ConfigError with all problems.
    ``task`` None: what ``task_of`` says; files may be missing then."""
    if not files and rules and task:  # ``load`` also accepts bindings alone
        raise ConfigError(
            f"no configuration: give --gin-config-file FILE, for example --gin-config-file ml_1m_{task} "
            "(--help lists all options, --explain all parameters)"
        )
    notes: list[str] = []
    files = [find_file(name, notes) for name in files]
    found = scan(files, bindings)
    config, warnings = _build(ConfigBuilder(found, files, task or task_of(found)), world_size, rules)
    return config, notes + warnings


def task_of(found: Scan) -> Task:
    """Ranking if something sets an option of RankingArgs, else retrieval."""
    return "ranking" if any(each.selector == RankingArgs.__name__ for each in found.bindings) else "retrieval"


def find_file(name: str, notes: list[str]) -> str:
    """The path of a file that the user gave by its path or by the name of a shipped file, with or without ".gin".
    A file of the working directory wins, and a note says so."""
    shipped = shipped_configs().get(name.removesuffix(".gin"))
    here = next(filter(os.path.isfile, (name, f"{name}.gin")), None)
    if here and shipped and not os.path.samefile(here, shipped):
        notes.append(f"--gin-config-file {name}: reads {here} of this directory, and not the shipped {shipped}")
    return here or shipped or name


def _build(builder: ConfigBuilder, world_size: int, rules: Sequence[Rule]) -> tuple[RunConfig, list[str]]:
    draft = builder.draft(world_size)
    warnings = check(draft, rules, builder.problems)
    return draft.finish(), warnings


def load_stored(path: Path) -> RunConfig:
    """Reads operative.gin of a checkpoint, export or run. Runs and includes nothing. Raises DataError if invalid."""
    try:
        found = scan_stored(path.read_text(encoding="utf-8"), str(path))
        builder = ConfigBuilder(found, [str(path)], task_of(found), is_stored=True)
        return _build(builder, world_size=1, rules=())[0]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a configuration: {error}") from error
    except ConfigError as error:
        raise DataError(f"{path} is not a configuration that this program has written:\n{error}") from error
