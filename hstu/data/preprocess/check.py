"""Second stage: values that no event can have. What is wrong, in which file and line; then they may be skipped."""

from __future__ import annotations

from hstu.config.errors import DataError
from hstu.data.preprocess.bad_rows import BadRows
from hstu.data.preprocess.engine import one
from hstu.data.preprocess.raw import Meaning
from hstu.data.preprocess.tables import RawFile, identifier
from hstu.data.preprocess.work import Work, unusable_values


def check_rows(work: Work) -> None:
    """Raises DataError for the first unusable event or repeated user of the context, unless they may be skipped."""
    journal = work.writer.journal
    if "checked" not in journal:
        bad = work.bad_rows()
        for number, log in enumerate(work.raw.logs):
            _check_log(work, number, log, bad)
        _check_context(work, bad)
        (usable,) = one(work.engine, f"SELECT count(*) FROM {work.events()}")
        if usable == 0:
            raise DataError(f"{', '.join(str(log.path) for log in work.raw.logs)}: no events")
        journal.commit("checked", bad.counts)
    work.note_skipped(journal["checked"])


def _check_log(work: Work, number: int, log: RawFile, bad: BadRows) -> None:
    """One pass over the file. A row with several unusable values counts once, for the first of them."""
    conditions = unusable_values(work.schema)
    selected, earlier = [], "false"
    for name, condition in conditions.items():
        here = f"FILTER (WHERE {condition} AND NOT ({earlier}))"
        selected += [f'count(*) {here} AS "n_{name}"', f'min("row") {here} AS "first_{name}"']
        earlier = f"{earlier} OR {condition}"
    found = one(work.engine, f"SELECT {', '.join(selected)} FROM {work.typed_log(number)}")
    rows = dict(zip(conditions, zip(found[::2], found[1::2], strict=True), strict=True))
    for name, (count, first) in sorted(rows.items(), key=lambda item: item[1][1] or 0):
        if count:
            detail = _explained(work, number, name, first)
            bad.add(count, f"unusable {name}", log.place(first), detail)


def _explained(work: Work, log: int, name: str, row: int) -> str:
    """What a value is and what is allowed instead."""
    meaning = work.raw.meanings.get(name) or Meaning(name, "a value")
    query = f'SELECT {identifier(name)} FROM {work.ingested_log(log)} WHERE "row" = {row}'
    (value,) = one(work.engine, query)
    found = "is empty, or no value of its kind" if value is None else f"is {value!r}"
    return f"{meaning.label!r} {found}; allowed is {meaning.allowed}"


def _check_context(work: Work, bad: BadRows) -> None:
    """Of several rows for one user, those after the first are bad."""
    if (context := work.typed_context()) is None:
        return
    assert work.raw.context is not None
    repeated = f"""SELECT "user", "row" FROM {context} WHERE "user" IS NOT NULL
        QUALIFY row_number() OVER (PARTITION BY "user" ORDER BY "row") > 1"""
    query = f'SELECT count(*), arg_min("user", "row"), min("row") FROM ({repeated})'
    count, user, row = one(work.engine, query)
    if count:
        bad.add(count, "repeated user", work.raw.context[0].place(row), f"another row for user {user!r}")
