"""A store that exists already: whether it is what a command would make, and how events of new files are added to it.

A store that differs is never kept in silence. With ``--append`` the store is made again from its earlier raw files,
which must be as they were, and the new ones. So it is the store that all files together give, and codes are in the
order of raw ids. Checkpoints find their rows by raw id.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hstu.base.errors import DataError
from hstu.data.datasets.own_columns import InteractionColumns
from hstu.data.preprocess.state import BuildOptions, source_names
from hstu.data.store.meta import sha256
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore
from hstu.data.store.writer import check_replaceable, is_taken

_log = logging.getLogger(__name__)
_TABLES = {"--context", "--titles", "--items", "--requests"}
"""Tables of users and of items, and requests, are read as a whole. They may have changed, but must be given again."""
_PLACES = {"--raw_path", "--interactions", "--output", *_TABLES}
"""Options that say where files are. The files are compared by their content."""
_REMEDY = "or make the store again from all files, with --force and without --append"


def is_kept(options: BuildOptions, files: Sequence[Path] | None) -> bool:
    """Whether the store at options.output exists and stays. It must fit the options and the raw ``files``.

    ``files`` is None where there are no raw files, so that only the options are compared.
    Raises DataError where the store is damaged or does not fit, or something else than a store is there.
    """
    check_replaceable(options.output)
    if not is_taken(options.output) or options.force:
        return False
    store = SequenceStore.open(options.output)
    other_options = [*_options_that_differ(store, options)]
    other_files = [*files_that_differ(store, files)] if files is not None else []
    if other_options or other_files:
        is_own = "--interactions" in _options_of(options.command)
        append = "to add the events of further files to it, --append; " if is_own and not other_options else ""
        raise DataError(
            f"{options.output} exists and does not fit this command: {'; '.join(other_options + other_files)}. To make "
            f"it again, add --force; {append}to make another store, give another --output"
        )
    fits = "fits its raw files" if files is not None else "could not be compared with raw files, as there are none,"
    _log.warning("%s exists, %s and is kept; --force replaces it", options.output, fits)
    return True


def _options_that_differ(store: SequenceStore, options: BuildOptions, tables: bool = False) -> Iterator[str]:
    """Option by option, what a command would do otherwise than the one that made the store.

    tables: also say which of the tables beside the interactions only one of the two commands names.
    """
    if store.name != options.name:
        yield f"--dataset_name was {store.name}, it is now {options.name}"
        return
    if store.command is None:
        return
    before, now = _options_of(store.command), _options_of(options.command)
    compared = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
    compared -= _PLACES | {"--dataset_name"}
    if tables:
        compared |= (before.keys() ^ now.keys()) & _TABLES
    for option in sorted(compared):
        was, is_now = (" ".join(given.get(option, ["not given"])) or "given" for given in (before, now))
        yield f"{option} was {was}, it is now {is_now}"


def _options_of(command: str | None) -> dict[str, list[str]]:
    """Option of a command → its values."""
    found: dict[str, list[str]] = {}
    option = ""
    try:
        words = shlex.split(command or "")
    except ValueError:  # of another program
        return {"the command": [command or ""]}
    for word in words:
        if word.startswith("--"):
            option = word
        found.setdefault(option, []).extend([word] if word != option else [])
    return {option: values for option, values in found.items() if option}


def files_that_differ(store: SequenceStore, files: Sequence[Path]) -> Iterator[str]:
    """File by file, in what raw files are not those of which the store was made."""
    now = source_names(files)
    if now.keys() == store.sources.keys() and list(now) != list(store.sources):
        yield f"the raw files were in another order: {', '.join(store.sources)}"
    for name in sorted(store.sources.keys() | now.keys()):
        if name not in now:
            yield f"it was made from {name}, which is not given now"
        elif name not in store.sources:
            yield f"it was made without {now[name]}"
        elif sha256(now[name]) != store.sources[name]:
            yield f"{now[name]} has changed since"


def with_earlier_files(columns: InteractionColumns, options: BuildOptions) -> InteractionColumns:
    """``columns``, of which the interactions are those of the store at options.output, followed by those it lacks.

    Raises DataError where there is no store, it was made with other options, or its raw files are not as they were.
    """
    target = options.output
    if not is_taken(target):
        raise DataError(f"cannot append: there is no store at {target}; make it first, without --append")
    store = SequenceStore.open(target)
    if unlike := [*_options_that_differ(store, options, tables=True)]:
        raise DataError(
            f"cannot append to {target}: {'; '.join(unlike)}. Give the options that it was made with, {_REMEDY}"
        )
    earlier = _earlier_files(store, target)
    known = {digest: file for file, digest in earlier.items()}
    new = []
    for file in columns.files:
        if file.is_file() and (same := known.get(sha256(file))):  # a missing file is reported when it is read
            _log.info("%s is in %s already%s", file, target, "" if file == same else f", as {same}")
        else:
            new.append(file)
    return replace(columns, interactions=(*earlier, *new))


def _earlier_files(store: SequenceStore, target: Path) -> dict[Path, str]:
    """The interactions that the store was made of, in their order → SHA-256."""
    given = _options_of(store.command)
    files = [Path(file) for file in given.get("--interactions", [])]
    tables = [Path(file) for option in _TABLES for file in given.get(option, [])]
    names = {file: name for name, file in source_names([*files, *tables]).items()}
    digests = {file: sha256(file) if file.is_file() else "" for file in files}
    problems = [
        f"{file} {'has changed since' if digest else 'is not there'}"
        for file, digest in digests.items()
        if digest != store.sources.get(names[file])
    ]
    if problems or not digests:
        raise DataError(
            f"cannot append to {target}: the raw files that it was made of are read again, and "
            f"{'; '.join(problems) or 'it does not say which they are'}. Put them back where they were, as seen from "
            f"the current directory, {_REMEDY}"
        )
    return digests


def values_of(store: SequenceStore, columns: InteractionColumns) -> dict[str, str]:
    """Feature → what its values mean to a model: integers or text as ids, or the texts of actions and ranges."""
    ids = (USER_FEATURE, store.item_feature)
    values = {name: "text" if len(store.raw_id_arrays(name)) > 1 else "integers" for name in ids}
    named = [name for name in (columns.action, *columns.bins) if name and store.features[name].has_vocab]
    return values | {name: ", ".join(store.raw_ids(name)) for name in named}


def warn_of_values(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Logs a warning where a value means something else than it did to models trained before."""
    for name, now in after.items():
        if not now.startswith(was := before[name]):
            _log.warning(
                "%r was %s, and is %s now: models of the earlier data take its values for others or do not know them, "
                "so train new ones",
                name,
                was,
                now,
            )
