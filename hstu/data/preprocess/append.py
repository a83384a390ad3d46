"""``--append``: the events of new raw files are added to an existing store of users' own tables.

The store is made again from its earlier raw files, which must be as they were, and the new ones. So it is the store
that all files together give, and codes are in the order of raw ids. Checkpoints find their rows by raw id.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from hstu.base.errors import DataError
from hstu.data.datasets.own_columns import InteractionColumns
from hstu.data.preprocess.existing import option_that_differs, options_of, options_that_differ
from hstu.data.preprocess.state import BuildOptions, source_names
from hstu.data.store.files import sha256
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore
from hstu.data.store.writer import discarded_beside, is_taken

_log = logging.getLogger(__name__)
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
