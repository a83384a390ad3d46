"""A store that exists already: whether it is what a command would make, and how events of new files are added to it.

A store that differs is never kept in silence. With ``--append`` the store is made again from its earlier raw files,
which must be as they were, and the new ones. So it is the store that all files together give, and codes are in the
order of raw ids. Checkpoints find their rows by raw id.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hstu.base.errors import DataError
from hstu.data.datasets.own_columns import InteractionColumns
from hstu.data.preprocess.state import BuildOptions, source_names
from hstu.data.store.meta import sha256
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore
from hstu.data.store.writer import check_replaceable, discarded_beside, is_taken

_log = logging.getLogger(__name__)
_PLACES = {"--raw_path", "--interactions", "--requests", "--context", "--titles", "--items", "--output"}
"""Options that say where files are. The files are compared by their content."""
_SLOW_BYTES = 1 << 30


def is_kept(options: BuildOptions, files: Sequence[Path] | None, optional: Sequence[Path] = ()) -> bool:
    """Whether the store at options.output exists and stays. It must fit the options and the raw ``files``.

    ``files`` is None where there are no raw files, so that only the options are compared. A store that was made without
    some of the ``optional`` ones fits, and the log says so: earlier versions did not read them.
    Raises DataError where the store is damaged or does not fit, or something else than a store is there.
    """
    check_replaceable(options.output)
    if not is_taken(options.output) or options.force:
        return False
    store = SequenceStore.open(options.output)
    other_options = [*options_that_differ(store, options)]
    names = source_names(files or ())
    unread = [file for name, file in names.items() if file in optional and name not in store.sources]
    read = [file for file in files or () if file not in unread]
    other_files = [*files_that_differ(store, read)] if files is not None else []
    if other_options or other_files:
        is_own = "--interactions" in options_of(options.command)
        append = "to add the events of further files to it, --append; " if is_own and not other_options else ""
        raise DataError(
            f"{options.output} exists and does not fit this command: {'; '.join(other_options + other_files)}. To make "
            f"it again, add --force; {append}to make another store, give another --output"
        )
    fits = "fits its raw files" if files is not None else "could not be compared with raw files, as there are none,"
    _log.warning("%s exists, %s and is kept; --force replaces it", options.output, fits)
    if unread:
        without = ", ".join(map(str, unread))
        _log.warning("%s was made without %s, which is there now; --force makes it with it", options.output, without)
    return True


def options_that_differ(store: SequenceStore, options: BuildOptions) -> Iterator[str]:
    """Option by option, what a command would do otherwise than the one that made the store."""
    if store.name != options.name:
        yield f"--dataset_name was {store.name}, it is now {options.name}"
        return
    if store.command is None:
        return
    before, now = options_of(store.command), options_of(options.command)
    for option in sorted((before.keys() | now.keys()) - _PLACES - {"--dataset_name"}):
        yield from option_that_differs(option, before, now)


def option_that_differs(
    option: str, before: Mapping[str, Sequence[str]], now: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """The two values of an option of two commands, unless they are equal."""
    if before.get(option) != now.get(option):
        was, is_now = (" ".join(given.get(option, ["not given"])) or "given" for given in (before, now))
        yield f"{option} was {was}, it is now {is_now}"


def options_of(command: str | None) -> dict[str, list[str]]:
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
    if sum(file.stat().st_size for file in files) > _SLOW_BYTES:
        _log.info("comparing %s with its raw files", store.path)
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


_TABLES = ("--context", "--titles", "--items", "--requests")
"""Tables of users and of items, and requests, are read as a whole. They may have changed, but must be given again."""
_REMEDY = "or make the store again from all files, with --force and without --append"


def with_earlier_files(columns: InteractionColumns, options: BuildOptions) -> InteractionColumns:
    """``columns``, of which the interactions are those of the store at options.output, followed by those it lacks.

    Raises DataError where there is no store, it was made with other options, or its raw files are not as they were.
    """
    store = _open(options.output)
    unlike = [*options_that_differ(store, options), *_tables_that_differ(store, options)]
    if unlike:
        raise DataError(
            f"cannot append to {options.output}: {'; '.join(unlike)}. Give the options that it was made with, {_REMEDY}"
        )
    earlier = _earlier_files(store, options.output)
    known = {digest: file for file, digest in earlier.items()}
    new = []
    for file in columns.files:
        if file.is_file() and (same := known.get(sha256(file))):  # a missing file is reported when it is read
            _log.info("%s is in %s already%s", file, options.output, "" if file == same else f", as {same}")
        else:
            new.append(file)
    return replace(columns, interactions=(*earlier, *new))


def _open(target: Path) -> SequenceStore:
    if is_taken(target):
        return SequenceStore.open(target)
    if (left := discarded_beside(target)).is_dir():
        raise DataError(
            f"cannot append: a run was killed while it replaced {target}, and the earlier store is {left}; move it back"
        )
    raise DataError(f"cannot append: there is no store at {target}; make it first, without --append")


def _tables_that_differ(store: SequenceStore, options: BuildOptions) -> Iterator[str]:
    before, now = options_of(store.command), options_of(options.command)
    for option in _TABLES:
        if (option in before) != (option in now):
            yield from option_that_differs(option, before, now)


def _earlier_files(store: SequenceStore, target: Path) -> dict[Path, str]:
    """The interactions that the store was made of, in their order → SHA-256."""
    given = options_of(store.command)
    files = [Path(file) for file in given.get("--interactions", [])]
    tables = [Path(file) for option in _TABLES for file in given.get(option, [])]
    names = {file: name for name, file in source_names([*files, *tables]).items()}
    digests = {file: sha256(file) if file.is_file() else None for file in files}
    problems = [
        f"{file} {'has changed since' if digest else 'is not there'}"
        for file, digest in digests.items()
        if digest is None or digest != store.sources.get(names[file])
    ]
    if problems or not digests:
        raise DataError(
            f"cannot append to {target}: the raw files that it was made of are read again, and "
            f"{'; '.join(problems) or 'it does not say which they are'}. Put them back where they were, as seen from "
            f"the current directory, {_REMEDY}"
        )
    return {file: str(digest) for file, digest in digests.items()}


@dataclass(frozen=True)
class Contents:
    """What is compared of a store before and after an append."""

    counts: dict[str, int]
    """Events, users and items."""
    values: dict[str, str]
    """Feature → what it means to a model: integers or text for ids; the values of texts as actions, and of ranges."""

    @classmethod
    def of(cls, store: SequenceStore, columns: InteractionColumns) -> Contents:
        """Reads the values, so that the store may then be replaced."""
        counts = {"events": store.num_events, "users": store.num_users, "items": store.cardinality(store.item_feature)}
        values = {name: _kind(store, name) for name in (USER_FEATURE, store.item_feature)}
        named = [name for name in (columns.action, *columns.bins) if name and store.features[name].has_vocab]
        return cls(counts, values | {name: ", ".join(store.raw_ids(name)) for name in named})


def log_what_was_added(before: Contents, after: Contents, target: Path) -> None:
    """Logs counts, and warns where a value means something else than it did to models trained before."""
    added = ", ".join(f"{after.counts[name] - number:,} {name}" for name, number in before.counts.items())
    _log.info("added to %s: %s", target, added)
    for name, now in after.values.items():
        if not now.startswith(was := before.values[name]):
            _log.warning(
                "%r was %s, and is %s now: models of the earlier data take its values for others or do not know them, "
                "so train new ones",
                name,
                was,
                now,
            )


def _kind(store: SequenceStore, feature: str) -> str:
    return "text" if len(store.raw_id_arrays(feature)) > 1 else "integers"
