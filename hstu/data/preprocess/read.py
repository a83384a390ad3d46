"""First stages: every raw file becomes a columnar working file, with columns of settled types."""

from __future__ import annotations

from hstu.data.preprocess.engine import write_parquet
from hstu.data.preprocess.ingest import ingest
from hstu.data.preprocess.progress import READING
from hstu.data.preprocess.tables import RawFile
from hstu.data.preprocess.work import Work


def read_files(work: Work) -> None:
    """Leaves the logs and the context as Work.typed_log and Work.typed_context find them."""
    for number, log in enumerate(work.raw.logs):
        _read(work, f"log_{number}", log, work.raw.events, READING * log.path.stat().st_size)
    if work.raw.context is not None:
        _read(work, "context", *work.raw.context, 0)
    if work.raw.title_file is not None:
        work.note_source(work.raw.title_file)
    if work.raw.settle is not None and "typed" not in work.writer.journal:
        _settle(work)


def _read(work: Work, name: str, file: RawFile, select: str, effort: float) -> None:
    journal = work.writer.journal
    if name in journal:
        work.progress.skip(effort)
    else:
        bad = work.bad_rows()
        with work.progress.stage(f"reading {file.path.name}", effort, work.engine):
            ingest(work.engine, file, select, work.file(name), bad)
        work.note_source(file.path)
        journal.commit(name, bad.counts)
    work.note_skipped(journal[name])


def _settle(work: Work) -> None:
    assert work.raw.settle is not None
    log, context = work.ingested_log(0), work.ingested_context()
    typed = work.raw.settle(work.engine, log, context)
    write_parquet(work.engine, f'SELECT {typed.events} FROM {log} ORDER BY "row"', work.file("typed_log"))
    if context is not None:
        write_parquet(work.engine, f'SELECT {typed.context} FROM {context} ORDER BY "row"', work.file("typed_context"))
    work.writer.journal.commit("typed")
