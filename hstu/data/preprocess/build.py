"""From raw tables, as SQL, to a sequence store: the part that all datasets share.

Done in stages, each of which leaves a file or a part of the store, so that a run after a kill goes on from there:
every log becomes a columnar working file (read.py); its values are checked (check.py); users and items are counted and
numbered in the order of their raw ids; then one bucket of users after the other is sorted and written to its place in
the store's arrays (write.py). Memory is bounded by ``memory_limit``, whatever the number of events; only ids that are
strings are held in memory, once each. No byte of the store depends on the limit, on interruptions or on the number of
threads.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import duckdb
import numpy as np

from hstu.data.datasets import Schema
from hstu.data.preprocess import disk
from hstu.data.preprocess.check import check_rows
from hstu.data.preprocess.engine import disk_errors, memory_bytes, open_engine
from hstu.data.preprocess.progress import Progress
from hstu.data.preprocess.raw import RawTables
from hstu.data.preprocess.read import read_files
from hstu.data.preprocess.report import statistics_of
from hstu.data.preprocess.sniff import check_readable
from hstu.data.preprocess.work import BuildOptions, Work
from hstu.data.preprocess.write import number_users_and_items, write_context, write_events, write_vocabularies
from hstu.data.store import VERSION
from hstu.data.store_writer import StoreWriter

_log = logging.getLogger(__name__)


def build_store(raw: RawTables, schema: Schema, options: BuildOptions, published: Mapping[str, float]) -> Path:
    """Writes the store and returns its path. Raises DataError where the raw data is not what it should be."""
    memory_bytes(options.memory_limit)
    for file in (*raw.logs, *([raw.context[0]] if raw.context else [])):
        check_readable(file)
    with disk_errors(options.output):
        writer = StoreWriter(
            options.output,
            name=options.name,
            command=options.command,
            overwrite=True,
            resume_key=_key(raw, schema, options),
        )
        with writer:
            disk.check(raw.logs, options.output, already=disk.used_below(writer.partial))
            with (
                closing(Progress(sum(log.path.stat().st_size for log in raw.logs))) as progress,
                open_engine(writer.scratch, options.memory_limit) as engine,
            ):
                _build(Work(raw, schema, options, writer, progress, engine), published)
    return options.output


def _build(work: Work, published: Mapping[str, float]) -> None:
    writer, journal = work.writer, work.writer.journal
    if journal.stages:
        _log.info("going on with an interrupted run: %d of its stages are done", len(journal.stages))
    read_files(work)
    check_rows(work)
    lengths, num_items = number_users_and_items(work)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    writer.write_offsets(offsets)
    write_vocabularies(work, len(lengths), num_items)
    write_context(work, len(lengths))
    write_events(work, offsets, num_items)
    writer.statistics = statistics_of(lengths, num_items, published) | {"skipped_rows": work.skipped}
    writer.sources = {file.name: journal[f"source {file.name}"] for file in work.raw.files}


def _key(raw: RawTables, schema: Schema, options: BuildOptions) -> str:
    """Stands for all that the stages depend on."""
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in raw.files]
    tables = [repr(raw.logs), raw.events, repr(raw.context), repr(schema)]
    rules = [options.name, options.bad_row_policy, options.max_bad_rows]
    programs = [VERSION, np.__version__, duckdb.__version__]
    return hashlib.sha256(json.dumps([files, tables, rules, programs]).encode()).hexdigest()
