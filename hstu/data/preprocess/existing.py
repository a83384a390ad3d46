"""Existing stores: whether they fit a command, and how ``--append`` adds new files.

A store that does not fit raises an error. ``--append`` needs only the new files: merge.py adds them to the store.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hstu.base import remote
from hstu.base.errors import DataError
from hstu.data.datasets import DATASETS
from hstu.data.datasets.lakehouse import root_of
from hstu.data.datasets.own_columns import InteractionColumns
from hstu.data.datasets.spec import Schema
from hstu.data.preprocess.state import BuildOptions, source_digest, source_names
from hstu.data.store.layout import NUMBER_ROLES
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore
from hstu.data.store.writer import check_replaceable, is_taken, restore_discarded

_log = logging.getLogger(__name__)
_TABLES = ("--requests", "--context", "--titles", "--items")
"""Tables that are read as a whole, in the order of the sources."""
_PLACES = ("--raw_path", "--interactions", "--output", *_TABLES)
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


def _options_that_differ(store: SequenceStore, options: BuildOptions, but: Collection[str] = ()) -> Iterator[str]:
    """Messages about options that differ, ``but`` for some."""
    if store.name != options.name:
        yield f"--dataset_name was {store.name}, it is now {options.name}"
        return
    now = _options_of(options.command)
    before = now if store.command is None else _options_of(store.command)
    compared = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
    compared -= {*_PLACES, "--dataset_name", "--any_times", *but}
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
        elif source_digest(now[name]) != store.sources[name]:
            yield f"{now[name]} has changed since"


def appendable(options: BuildOptions, columns: InteractionColumns) -> SequenceStore:
    """The store at options.output, to which files of ``columns`` can be added. Raises DataError if there is none, or if
    it was made with other options."""
    target = options.output
    restore_discarded(target.resolve())
    if not is_taken(target):
        raise DataError(f"cannot append: there is no store at {target}; make it first, without --append")
    store = SequenceStore.open(target)
    given_with = {"--title": columns.titles, "--request": columns.requests}
    left_out = {option for option, table in given_with.items() if not table}
    if unlike := [*_options_that_differ(store, options, left_out)]:
        raise DataError(
            f"cannot append to {target}: {'; '.join(unlike)}. Give the options that it was made with, {_REMEDY}"
        )
    if max(options.min_user_events, options.min_item_events) > 1:
        raise DataError(
            f"cannot append to {target}: --min_user_events and --min_item_events left out events, which may count now "
            f"and are not in the store. Make it without them, {_REMEDY}"
        )
    return store


def without_known_files(
    given: InteractionColumns, columns: InteractionColumns, store: SequenceStore, target: Path
) -> InteractionColumns:
    """Leave out files of interactions that the store has. Raises DataError for a file that had another content then,
    and for one that is no longer in its Delta or Iceberg table. ``given``: ``columns`` before tables became files."""
    earlier = _earlier_files(store)
    paths = (given.interactions,) if isinstance(given.interactions, Path) else given.interactions
    tables = tuple(f"{root}/" for path in paths if (root := root_of(_place(path))))
    lost = {_place(file) for file in earlier} - {_place(file) for file in columns.files}
    if gone := sorted(file for file in lost if file.startswith(tables)):
        raise DataError(
            f"cannot append to {target}: {gone[0]} is no longer in its table, whose rows were deleted, changed or "
            f"compacted. Give files of new events alone, {_REMEDY}"
        )
    known, places = {digest: file for file, digest in earlier.items()}, {_place(file) for file in earlier}
    new = []
    for file in columns.files:
        if file.is_file() and (same := known.get(source_digest(file))):  # a missing file is reported when it is read
            _log.info("%s is in %s already%s", file, target, "" if file == same else f", as {same}")
        elif _place(file) in places:
            raise DataError(
                f"cannot append to {target}: {file} is in it with another content. Put new events into a file of "
                f"another name, {_REMEDY}"
            )
        else:
            new.append(file)
    return replace(columns, interactions=tuple(new))


def _place(file: Path) -> str:
    """The URL of a file, or its path, which is the same however the path is written."""
    return remote.as_given(file if remote.url_of(file) else file.resolve())


def check_tables_are_known(columns: InteractionColumns, store: SequenceStore) -> None:
    """Raise DataError if a table that is given is not in the store, for an append without new events."""
    known = store.sources.values()
    if changed := [str(file) for file in columns.tables if file.is_file() and source_digest(file) not in known]:
        raise DataError(
            f"cannot append to {store}: {', '.join(changed)} is not as in the store, and no events are new. "
            f"Tables are read with new events: give them together, leave the tables out, {_REMEDY}"
        )


def with_earlier_files(
    columns: InteractionColumns, store: SequenceStore
) -> tuple[InteractionColumns, Mapping[Path, str]]:
    """``columns`` with the store's interactions before those given, and its tables where none is given: what makes the
    store of all of them. Returns it and the digests of the earlier files."""
    given = _options_of(store.command)
    tables: dict[str, Any] = {}
    for option, further in (("context", ()), ("titles", ("title",)), ("items", ()), ("requests", ("request",))):
        if not getattr(columns, option) and (values := given.get(f"--{option}")):
            tables[option] = tuple(map(Path, values)) if option == "requests" else Path(values[0])
            tables |= {name: given[f"--{name}"][0] for name in further if f"--{name}" in given}
    digests = _earlier_files(store, [option for option in _TABLES if option.strip("-") in tables])
    interactions = (*map(Path, given.get("--interactions", ())), *columns.files)
    return replace(columns, interactions=interactions, **tables), digests


def _earlier_files(store: SequenceStore, tables: Sequence[str] = ()) -> dict[Path, str]:
    """The store's files of interactions and of these options, in order → SHA-256."""
    given = _options_of(store.command)
    every = [Path(file) for option in ("--interactions", *_TABLES) for file in given.get(option, ())]
    names = {file: name for name, file in source_names(every).items()}
    wanted = [Path(file) for option in ("--interactions", *tables) for file in given.get(option, ())]
    return {file: store.sources.get(names[file], "") for file in wanted}


def integers_of(ids: Iterable[str]) -> np.ndarray:
    """The ids that are int64 in canonical notation, ascending; int64."""
    numbers = sorted(int(text) for text in ids if re.fullmatch(r"0|-?[1-9]\d{0,18}", text))
    return np.array([number for number in numbers if -(2**63) <= number < 2**63], dtype=np.int64)


def stored_options(store: SequenceStore, target: Path, memory_limit: str) -> BuildOptions:
    """The options that a store was made with, to replace it."""
    roles = {"item": store.item_feature, "user": USER_FEATURE}
    return BuildOptions(
        name=store.name,
        output=target,
        command=store.command or "",
        force=True,
        memory_limit=memory_limit,
        raw_ids=tuple(role for role, name in roles.items() if name in store.features and store.features[name].raw),
        all_items="--all_items" in _options_of(store.command),
        running_statistics=bool(store.running_statistics),
        shards=max(1, store.num_shards),
    )


def stored_schema(store: SequenceStore) -> Schema:
    """The schema of an existing store; its bins are the ranges that the store has."""
    own = [feature for feature in store.features.values() if feature.name not in store.running_statistics]
    numbers = [feature for feature in own if feature.role in NUMBER_ROLES]
    built_in = DATASETS.get(store.name)
    return Schema(
        item=store.item_feature,
        action=store.action_feature,
        timestamp=store.timestamp_feature,
        context=store.contextual_features,
        item_features=tuple(feature.name for feature in own if feature.role in ("item_feature", "item_number")),
        event_features=tuple(feature.name for feature in own if feature.role in ("event", "event_number")),
        action_cardinality=built_in.schema.action_cardinality if built_in else None,
        bins={name: len(ranges) for name, ranges in store.ranges.items()},
        numbers=tuple(feature.name for feature in numbers if feature.width == 1),
        vectors=tuple(feature.name for feature in numbers if feature.width > 1),
        split=store.split,
    )
