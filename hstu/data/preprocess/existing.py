"""Existing stores: whether they fit a command, and how ``--append`` adds new files.

A store that does not fit raises an error. ``--append`` rebuilds the store from its earlier raw files, which must be
unchanged, and the new files, so codes are in the order of raw ids. Checkpoints find their rows by raw id.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hstu.base.errors import DataError
from hstu.base.files import sha256
from hstu.data.datasets.own_columns import InteractionColumns
from hstu.data.preprocess.state import BuildOptions, source_names
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore
from hstu.data.store.writer import check_replaceable, is_taken

_log = logging.getLogger(__name__)
_TABLES = {"--context", "--titles", "--items", "--requests"}
"""Tables that are read as a whole. They may have changed, but must be given again."""
_PLACES = {"--raw_path", "--interactions", "--output", *_TABLES}
"""Options with paths. Their files are compared by content."""
_REMEDY = "or make the store again from all files, with --force and without --append"


def is_kept(options: BuildOptions, files: Sequence[Path] | None) -> bool:
    """Whether a store exists at options.output and is kept. It must fit the options and ``files``, if they exist.
    Raises DataError if the store is damaged or does not fit, or if the path holds something else."""
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
    """Messages about options that differ; with ``tables``, also about tables that only one of the commands names."""
    if store.name != options.name:
        yield f"--dataset_name was {store.name}, it is now {options.name}"
        return
    if store.command is None:
        return
    before, now = _options_of(store.command), _options_of(options.command)
    compared = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
    compared -= _PLACES | {"--dataset_name", "--any_times"}
    if tables:
        compared |= (before.keys() ^ now.keys()) & _TABLES
    for option in sorted(compared):
        was, is_now = (" ".join(given.get(option, ["not given"])) or "given" for given in (before, now))
        yield f"{option} was {was}, it is now {is_now}"


def _options_of(command: str | None) -> dict[str, list[str]]:
    """Option of a command → its values."""
    found: dict[str, list[str]] = {}
    option = ""
    for word in shlex.split(command or ""):
        if word.startswith("--"):
            option = word
        found.setdefault(option, []).extend([word] if word != option else [])
    return {option: values for option, values in found.items() if option}


def files_that_differ(store: SequenceStore, files: Sequence[Path]) -> Iterator[str]:
    """Messages about raw files that differ from the files of which the store was built."""
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
    """Put the store's interactions before the new files of ``columns``. Raises DataError if the store does not fit."""
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
    """The store's files of interactions, in order → SHA-256. Raises DataError if any has changed."""
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
    """Feature → meaning of its values: "integers" or "text" for ids, or the texts of actions and ranges."""
    ids = (USER_FEATURE, store.item_feature)
    values = {name: "text" if len(store.raw_id_arrays(name)) > 1 else "integers" for name in ids}
    named = [name for name in (columns.action, *columns.bins) if name and store.features[name].has_vocab]
    return values | {name: ", ".join(store.raw_ids(name)) for name in named}


def warn_of_values(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Warn about features whose values changed their meaning, which breaks models trained before."""
    for name, now in after.items():
        if not now.startswith(was := before[name]):
            _log.warning(
                "%r was %s, and is %s now: models of the earlier data take its values for others or do not know them, "
                "so train new ones",
                name,
                was,
                now,
            )
