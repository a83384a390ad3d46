"""Builds a sequence store: ``preprocess`` from a built-in dataset, ``import_interactions`` from users' own tables.

Each stage leaves a file or a part of the store, so a killed build resumes. Logs become columnar working files, whose
values are checked (ingest.py). Users and items are numbered in the order of their raw ids. Events are sorted and
written one bucket of users at a time (write.py). ``memory_limit`` bounds the memory for any number of events; only
string ids are all held in memory, once each. The store's bytes are independent of the limit, interruptions and threads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import duckdb
import numpy as np

from hstu.base import remote
from hstu.base.errors import ConfigError, DataError
from hstu.base.ids import codes_of
from hstu.data.batches.jagged import run_offsets
from hstu.data.datasets import DATASETS, resolve_name
from hstu.data.datasets.own import interactions
from hstu.data.datasets.own_columns import InteractionColumns, as_argument, staged
from hstu.data.datasets.raw import check_readable, open_text
from hstu.data.datasets.spec import USER_FEATURE, RawTables, Schema
from hstu.data.preprocess import existing
from hstu.data.preprocess.base import is_text, show_base, show_no_events
from hstu.data.preprocess.download import by_hand, locate_raw, obtain_raw
from hstu.data.preprocess.features import check_items, write_context, write_item_features
from hstu.data.preprocess.ingest import check_period, check_rows, keep_core, read_files
from hstu.data.preprocess.merge import Growth
from hstu.data.preprocess.state import (
    Base,
    Build,
    BuildOptions,
    Engine,
    disk_errors,
    memory_bytes,
    one,
    open_engine,
    source_names,
)
from hstu.data.preprocess.write import (
    create_events,
    find_requests,
    keep_raw_ids,
    number_users_and_items,
    write_events,
    write_requests,
    write_split,
    write_vocabularies,
)
from hstu.data.store.layout import META_FILE, MOST_SHARDS
from hstu.data.store.meta import VERSION
from hstu.data.store.sequence_store import SequenceStore
from hstu.data.store.writer import StoreWriter, check_replaceable, restore_discarded

_log = logging.getLogger(__name__)
DATA_DIRECTORY = Path("tmp_data")
"""Default directory of stores and, under raw/, of downloads; relative to the current directory."""
_UNRECORDED = ("force", "memory_limit", "engine", "spark_master", "max_bad_rows")
"""Options of a build on which the store does not depend."""


P = ParamSpec("P")


def _publishes(build: Callable[P, Path]) -> Callable[P, Path]:
    """Let ``output`` be a URL: the store there is brought here, made or changed in the cache, and uploaded."""

    @wraps(build)
    def published(*args: P.args, **options: P.kwargs) -> Path:
        if (url := remote.url_of(str(options.get("output") or ""))) is None:
            return build(*args, **options)
        place = remote.Cache.of().place(url, work=True)
        if not options.get("force"):
            remote.fetch(url, place, META_FILE)
        options["output"] = place
        path = build(*args, **options)
        remote.upload(path, url, META_FILE)
        return path

    return published


@_publishes
def preprocess(
    name: str,
    *,
    raw_path: str | Path | None = None,
    output: str | Path | None = None,
    force: bool = False,
    **limits: Any,
) -> Path:
    """Build the store of a built-in dataset, in any spelling of its name, and return its path.

    ``raw_path``: directory of the raw files. None: tmp_data/raw/<name>, where missing files are downloaded. ``output``:
    directory of the store. None: tmp_data/<name>. ``force``: replace an existing store. Otherwise it is kept if it fits
    its raw files and the arguments. ``limits``: further fields of BuildOptions. Raises ConfigError for an unknown name,
    DataError for missing or bad files and for a store that does not fit."""
    canonical = resolve_name(name)
    if canonical is None:
        raise ConfigError(
            f"dataset_name {name!r} is not built in ({', '.join(DATASETS)}); for your own data, also give "
            "--interactions FILE --user COLUMN --item COLUMN"
        )
    spec = DATASETS[canonical]
    target = Path(output) if output else DATA_DIRECTORY / canonical
    options = _options(canonical, target, force, limits, raw_path=raw_path)
    folder = remote.stage(raw_path, raw=True) if raw_path else DATA_DIRECTORY / "raw" / canonical
    located = locate_raw(spec, folder)
    if located is None and raw_path is not None:
        needed = " or ".join(", ".join(raw_format.files) for raw_format in spec.raw_formats)
        raise DataError(f"{raw_path} does not hold the files of {canonical}: {needed}. {by_hand(spec, folder)}")
    if existing.is_kept(options, located and [file for file in located[1] if file.is_file()]):
        return target
    raw_format, files = located or obtain_raw(spec, folder)
    raw = raw_format.reader(files)
    schema = spec.schema if "item_table" in raw.tables else replace(spec.schema, item_features=())
    is_filtered = max(options.min_user_events, options.min_item_events) > 1  # published statistics count all data
    return build_store(raw, schema, options, {} if is_filtered else spec.published)


@_publishes
def import_interactions(
    name: str,
    columns: InteractionColumns,
    *,
    output: str | Path | None = None,
    force: bool = False,
    append: bool = False,
    **limits: Any,
) -> Path:
    """Build the store of users' own tables, as preprocess. ``append``: add new files to the existing store."""
    if resolve_name(name) is not None:
        raise ConfigError(f"dataset_name {name!r} is a built-in dataset; give your own data another name")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(
            f"dataset_name {name!r}: allowed are letters, digits, '_', '-' and '.', as it names a directory"
        )
    given = columns
    columns = replace(columns, **staged({each.name: getattr(columns, each.name) for each in fields(columns)}))
    target = Path(output) if output else DATA_DIRECTORY / name
    if append and force:
        raise ConfigError("--append adds to a store, and --force replaces it; leave out one of them")
    options = _options(name, target, force, limits, **columns.arguments())
    if not append:
        raw = interactions(columns)
        return target if existing.is_kept(options, raw.files) else build_store(raw, columns.schema(), options, {})
    begun = time.monotonic()
    store = existing.appendable(options, columns)
    columns = existing.without_known_files(given, columns, store, target)
    if not columns.files:
        existing.check_tables_are_known(columns, store)
        _log.warning("%s has all of these files already, and is kept", target)
        return target
    whole, digests = existing.with_earlier_files(columns, store)
    ids = {"user": USER_FEATURE, "item": store.item_feature}
    raw = interactions(
        columns,
        texts=[name for name, feature in ids.items() if is_text(store, feature)],
        stored=[name for name in ("context", "items") if getattr(whole, name) != getattr(columns, name)],
    )
    base = Base(store, (*whole.files, *whole.tables), digests)
    build_store(raw, columns.schema(), _options(name, target, True, limits, **whole.arguments()), {}, base)
    after = SequenceStore.open(target)
    new_items = after.cardinality(after.item_feature) - store.cardinality(store.item_feature)
    new = (after.num_events - store.num_events, after.num_users - store.num_users, new_items)
    took = time.monotonic() - begun
    _log.info("added to %s: %d events, %d new users, %d new items, in %.1f s", target, *new, took)
    return target


@_publishes
def forget(name: str, users: Path, *, output: str | Path | None = None, memory_limit: str = "4GB") -> Path:
    """Remove users from a store: their events, rows and requests, and the values and items that only they had.

    ``users``: a text file with one raw id per line. Unknown ids are counted in the log. Returns the path of the store.
    Raises DataError if there is no store of this ``name``, and if no user would be left."""
    target = Path(output) if output else DATA_DIRECTORY / (resolve_name(name) or name)
    restore_discarded(target.resolve())
    check_replaceable(target)
    store = SequenceStore.open(target)
    if store.name != (resolve_name(name) or name):
        raise DataError(f"{target} is the store of {store.name}; give it as --dataset_name, or another --output")
    with open_text(remote.stage(users, raw=True)) as lines:
        ids = {line.rstrip("\r\n") for line in lines} - {""}
    known = store.raw_ids(USER_FEATURE)
    wanted = np.array(sorted(ids), dtype=object) if is_text(store, USER_FEATURE) else existing.integers_of(ids)
    forgotten = codes_of(wanted, known)
    forgotten = forgotten[forgotten >= 0]
    events = int(np.diff(store.offsets())[forgotten].sum())
    _log.info("%s: %d ids, of which %d are not in %s", users, len(ids), len(ids) - len(forgotten), target)
    if not len(forgotten):
        _log.warning("none of these users is in %s, which is kept", target)
        return target
    if len(forgotten) == store.num_users:
        raise DataError(f"{users} names all users of {target}, and a store without users cannot be; delete it")
    schema, options = existing.stored_schema(store), existing.stored_options(store, target, memory_limit)
    raw = RawTables(logs=(), events="", kept=(*schema.of_users(), *schema.of_items()))
    build_store(raw, schema, options, {}, Base(store, forgotten=forgotten))
    _log.info("removed from %s: %d users with %d events", target, len(forgotten), events)
    return target


def _options(name: str, output: Path, force: bool, limits: Mapping[str, Any], **arguments: object) -> BuildOptions:
    """Build the options. New arguments must default to None, because existing stores are compared by their command."""
    options = BuildOptions(name=name, output=output, command="", force=force, **limits)
    for option in ("min_user_events", "min_item_events"):
        if (least := getattr(options, option)) < 1:
            raise ConfigError(f"--{option} {least}: at least 1, which leaves out nothing")
    if not 1 <= options.shards <= MOST_SHARDS:
        raise ConfigError(f"--shards {options.shards}: from 1, which makes no shards, to {MOST_SHARDS}")
    arguments = {"dataset_name": name, **arguments, "output": output}
    recorded = (option for option in fields(options) if option.metadata and option.name not in _UNRECORDED)
    arguments |= {option.name: as_argument(getattr(options, option.name), option.default) for option in recorded}
    words = ["python", "scripts/preprocess_dataset.py"]
    for option, value in arguments.items():
        if value is not None:
            words += [f"--{option}", *map(remote.as_given, value if isinstance(value, tuple) else [value])]
    return replace(options, command=shlex.join(words))


def build_store(
    raw: RawTables, schema: Schema, options: BuildOptions, published: Mapping[str, float], base: Base | None = None
) -> Path:
    """Write the store and return its path. ``base``: the store it grows from. Raises DataError for bad raw data."""
    memory_bytes(options.memory_limit)
    _check_options(raw, schema, options, base)
    for file in raw.files:
        check_readable(file)
    key = _resume_key(raw, schema, options, base)
    with (
        disk_errors(options.output),
        StoreWriter(
            options.output,
            name=options.name,
            command=options.command,
            overwrite=options.force,
            resume_key=key,
            shards=options.shards,
        ) as writer,
    ):
        if base and SequenceStore.open(options.output).lineage != base.store.lineage:
            raise DataError(f"another process has changed {options.output} just now; start the command again")
        if writer.journal:
            _log.info("continuing an interrupted run: %d of its stages are done", len(writer.journal))
        with _open(options, writer.scratch, sum(file.stat().st_size for file in raw.files)) as engine:
            _run_stages(Build(raw, schema, options, writer, engine, base), published)
    return options.output


@contextmanager
def _open(options: BuildOptions, scratch: Path, raw_bytes: int) -> Iterator[Engine]:
    """The engine of the options."""
    with open_engine(scratch, options.memory_limit, is_driver=options.engine == "spark") as engine:
        if options.engine == "duckdb":
            yield engine
            return
        try:
            from hstu.data.preprocess.spark import open_spark
        except ImportError as error:
            needed = f'{error.name}, which is not installed: pip install "hstu-trainer[spark]", and Java 17'
            raise ConfigError(f"--engine spark needs {needed}") from error
        with open_spark(engine, scratch, options.memory_limit, options.spark_master, raw_bytes) as spark:
            yield spark


def _check_options(raw: RawTables, schema: Schema, options: BuildOptions, base: Base | None) -> None:
    if unknown := [role for role in options.raw_ids if role not in ("item", "user")]:
        raise ConfigError(f"--raw_ids {','.join(unknown)}: expected item, user or item,user")
    if "user" in options.raw_ids and USER_FEATURE not in schema.context:
        raise ConfigError(
            "--raw_ids user: the user is no feature of this data; name the user column in --context_columns, too"
        )
    if options.spark_master and options.engine != "spark":
        raise ConfigError(f"--spark_master {options.spark_master}: only with --engine spark")
    for option, wanted in (("requests", raw.requests), ("all_items", options.all_items)):
        if wanted and options.min_item_events > 1:
            raise ConfigError(
                f"--{option} keeps items without events, and --min_item_events leaves them out; remove one"
            )
    if options.all_items and not base and not raw.tables.keys() & {"titles", "item_table"}:
        raise ConfigError(
            "--all_items: there is no list of items; for your own data give --items or --titles, for MovieLens put "
            "the file of titles (u.item, movies.dat or movies.csv) beside the others"
        )


def _run_stages(build: Build, published: Mapping[str, float]) -> None:
    writer = build.writer
    if build.raw.logs:
        read_files(build)
        check_rows(build)
        check_period(build)
        keep_core(build)
    else:
        show_no_events(build)
    if build.base:
        show_base(build)
    of_requests = find_requests(build)
    lengths, num_items = number_users_and_items(build)
    keep_raw_ids(build)
    offsets = run_offsets(lengths)
    writer.write_offsets(offsets)
    write_vocabularies(build)
    write_context(build, len(lengths))
    found = check_items(build, num_items)
    write_item_features(build, num_items)
    arrays = create_events(build, int(offsets[-1]), num_items)
    growth = Growth.of(build, offsets) if build.base else None
    new = growth.asides(arrays) if growth else arrays
    write_events(build, growth.added if growth else offsets, new)
    if growth:
        growth.merge(arrays, new)
    write_split(build, offsets, growth)
    requests = None
    if growth and not of_requests and build.earlier.store.num_requests:
        requests, of_requests = growth.keep_requests()
    elif of_requests:
        requests = write_requests(build, offsets, of_requests["requests"], of_requests["candidates"])
    if build.options.running_statistics:
        from hstu.data.preprocess.running import write_running  # it imports torch, for longer than many appends take

        write_running(build, offsets, requests)
    (with_events,) = one(build.engine, "SELECT count(*) FROM items WHERE events > 0")
    events = int(lengths.sum())
    statistics = {
        "users": len(lengths),
        "items": with_events,
        "events": events,
        "length_max": int(lengths.max()),
        "length_min": int(lengths.min()),
        "length_mean": events / len(lengths),
        "length_median": float(np.median(lengths)),
        "sparsity": 1 - events / (len(lengths) * with_events),
        "published": dict(published),
    }
    writer.statistics = statistics | found | of_requests | {"skipped_rows": build.skipped}
    writer.sources = {name: writer.journal[f"source {name}"] for name in source_names(build.raw.files)}
    if build.base:
        _continue(build, build.base)


def _continue(build: Build, base: Base) -> None:
    """Carry on what a store says of its past."""
    writer, store = build.writer, base.store
    skipped = Counter(store.statistics.get("skipped_rows", {})) + Counter(writer.statistics["skipped_rows"])
    forgotten = store.statistics.get("forgotten_users", 0) + len(base.forgotten)
    writer.statistics = {**writer.statistics, "skipped_rows": skipped}
    writer.statistics |= {"forgotten_users": forgotten} if forgotten else {}
    digests = {**base.digests, **{file: writer.sources[name] for name, file in source_names(build.raw.files).items()}}
    writer.sources = {name: digests[file] for name, file in source_names(base.files).items()} or store.sources
    writer.earlier_states = store.lineage


def _resume_key(raw: RawTables, schema: Schema, options: BuildOptions, base: Base | None) -> str:
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in raw.files]
    tables = [repr(raw.parts), repr(raw.tables), raw.settings, repr(schema)]
    rules = [options.name, options.bad_row_policy, options.max_bad_rows, options.min_user_events]
    rules += [options.min_item_events, options.all_items, options.running_statistics, options.engine]
    earlier = [*base.store.lineage, base.forgotten.tolist()] if base else []
    programs = [VERSION, np.__version__, duckdb.__version__]
    return hashlib.sha256(json.dumps([files, tables, rules, earlier, programs]).encode()).hexdigest()
