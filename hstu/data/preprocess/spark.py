"""Runs the stages in Spark: the same SQL as in DuckDB, on working tables that are directories of Parquet files.

A query is of one of four kinds, which its syntax tree decides:

    row by row    one task per file of the tables runs it in DuckDB, word for word
    aggregates    count, min, max or bool_and of all rows: tasks as above, and DuckDB combines their rows
    first rows    SELECT … ORDER BY … LIMIT n: likewise
    relational    joins, groups, sorts: sqlglot translates it, and Spark's executors write the result

Files are read, values parsed and text formatted in DuckDB alone, so Spark sees columns of final types only. The driver
streams results from their files. All machines need the directory of the store at one path, this package, and duckdb.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb
import pyarrow.parquet
import sqlglot
from py4j.protocol import Py4JError, Py4JJavaError
from pyspark import SparkConf
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession
from sqlglot import exp

from hstu.base.errors import ConfigError, DataError, UserError
from hstu.base.files import remove, written_aside
from hstu.data.datasets.raw import identifier
from hstu.data.preprocess.state import Engine, connect, memory_bytes, numbered_rows, write_parquet

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

T = TypeVar("T")
_ERRORS = (Py4JError, PySparkException, ConnectionError)
"""Of Spark, and of its Java that has ended."""
ROW_GROUPS_PER_FILE = 8
"""Of about 123,000 rows each. A file is what one task computes at a time."""
_ROWS_PER_FILE = 1 << 20
"""Of tables that were in the driver's memory."""
_HEAP_FRACTION, _TASKS_FRACTION = 0.45, 0.2
"""Shares of the memory limit, in a Spark of this machine: Java's heap, and DuckDB in all tasks."""
_LEAST_MEMORY = 2 << 30
_SHUFFLED_BYTES = 64 << 20
"""Size of a part of a shuffle, by the bytes of the raw files."""
_RELATIONAL = (
    exp.Join,
    exp.Group,
    exp.Distinct,
    exp.Window,
    exp.Order,
    exp.Limit,
    exp.AggFunc,
    exp.Having,
    exp.Qualify,
)
_COMBINED = {
    exp.Count: "CAST(sum({}) AS BIGINT)",
    exp.Min: "min({})",
    exp.Max: "max({})",
    exp.LogicalAnd: "bool_and({})",
}
"""Aggregate of all rows → how the aggregates of parts are combined."""
_SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.ansi.enabled": "true",
    "spark.sql.adaptive.enabled": "true",
    "spark.sql.adaptive.skewJoin.enabled": "true",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.parquet.datetimeRebaseModeInRead": "CORRECTED",
    "spark.sql.parquet.datetimeRebaseModeInWrite": "CORRECTED",
    "spark.sql.parquet.compression.codec": "lz4_raw",
}


@contextmanager
def open_spark(
    engine: Engine, scratch: Path, memory_limit: str, master: str | None, raw_bytes: int
) -> Iterator[SparkEngine]:
    """The engine of a session: the one that spark-submit made, else a new one of ``master``. ``engine``: the driver's
    DuckDB. Raises ConfigError if Spark does not start, or not within the limit on this machine; DataError if it fails.
    """
    given = SparkSession.getActiveSession()
    is_submitted = given is not None or "PYSPARK_GATEWAY_PORT" in os.environ
    url = master or SparkConf().get("spark.master", "local[*]") or "local[*]"
    is_local, limit = url.startswith("local") and not is_submitted, memory_bytes(memory_limit)
    conf = SparkConf().setAppName("hstu-preprocess").setAll(list(_SETTINGS.items()))
    if not is_submitted:
        conf.setMaster(url)
    if is_local:
        if limit < _LEAST_MEMORY:
            raise ConfigError(f"--memory_limit {memory_limit!r}: --engine spark on this machine needs at least 2GiB")
        root = str(Path(__file__).resolve().parents[3])
        conf.set("spark.driver.memory", f"{int(limit * _HEAP_FRACTION) >> 20}m")
        conf.set("spark.local.dir", str(scratch / "spill")).set("spark.ui.enabled", "false")
        conf.set("spark.driver.host", "localhost").set("spark.ui.showConsoleProgress", "false").set(
            "spark.log.level", "ERROR"
        )
        conf.set("spark.executorEnv.PYTHONPATH", root)
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    warnings.filterwarnings("ignore", module=r"pyspark\.")  # of pandas, and of a JVM that an interruption ended
    logging.getLogger("py4j").setLevel(logging.WARNING)
    logging.getLogger().addFilter(_is_not_of_py4j)
    before = signal.getsignal(signal.SIGINT)
    remedy = "It needs Java 17 or 21 (apt-get install default-jre-headless, or JAVA_HOME), and a master that answers"
    with _errors(ConfigError, f"--engine spark: no Spark starts at {url}: {{}} {remedy} (--spark_master)"):
        session = given or SparkSession.builder.config(conf=conf).getOrCreate()
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)  # PySpark sets a handler of its own
        tasks = session.sparkContext.defaultParallelism
        for name, value in _SETTINGS.items():
            session.conf.set(name, value)
        session.conf.set("spark.sql.shuffle.partitions", str(max(tasks, raw_bytes // _SHUFFLED_BYTES)))
        at_once = tasks if is_local else int(session.conf.get("spark.executor.cores", "1") or 1)
        with _errors(DataError, "Spark cannot go on: {} The lines of its own log above may say more"):
            yield SparkEngine(engine.connection, session, scratch, int(limit * _TASKS_FRACTION) // at_once)
    finally:
        if not is_submitted:
            with suppress(*_ERRORS):
                session.stop()


@contextmanager
def _errors(kind: type[UserError], text: str) -> Iterator[None]:
    """Turn errors of Spark into a ``kind`` of one line, and those that an interruption caused into KeyboardInterrupt.
    ``text``: the message, with {} for what Spark says."""
    try:
        yield
    except _ERRORS as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            cause = cause.__context__
        lines = str(error).splitlines() or [type(error).__name__]  # of an error in Java the second one
        said = lines[min(isinstance(error, Py4JJavaError), len(lines) - 1)].strip(": ").removesuffix(".")
        raise kind(text.format(f"{said}.")) from error


def _is_not_of_py4j(record: logging.LogRecord) -> bool:
    """Whether a record may be logged: py4j logs the traceback of each interruption."""
    return "py4j" not in record.pathname


class _TaskEngine(Engine):
    """DuckDB in a task, which writes a table as a directory of files."""

    def write(self, query: str, target: Path) -> int:
        remove(target)  # of a run that was killed before it could record the table
        return write_parquet(self.connection, query, target, f", ROW_GROUPS_PER_FILE {ROW_GROUPS_PER_FILE}")


class SparkEngine(Engine):
    """Runs the SQL of the stages in Spark."""

    rows_at_once = 1 << 62

    def __init__(
        self, connection: duckdb.DuckDBPyConnection, session: SparkSession, scratch: Path, task_memory: int
    ) -> None:
        super().__init__(connection)
        self._session, self._scratch, self._task_memory = session, scratch, task_memory
        self._tables: dict[str, dict[Path, str]] = {}
        """Working table → its files in order → SQL of their rows."""
        self._numbered: set[str] = set()
        """Working tables whose files lack their column of row numbers."""
        self._views: dict[str, str] = {}
        self._known: set[str] = set()
        """Names that Spark knows."""
        self._results = 0

    def sql(self, query: str) -> duckdb.DuckDBPyRelation:
        """As Engine, with the result in DuckDB."""
        return self.connection.sql(self._reduced(query))

    def register(self, name: str, table: pyarrow.Table) -> None:
        """As Engine, in files that the tasks read."""
        target = self._scratch / f"{name}.registered"
        remove(target)  # of a run that was killed
        with written_aside(target) as aside:
            aside.mkdir()
            for number, start in enumerate(range(0, max(len(table), 1), _ROWS_PER_FILE)):
                part = table.slice(start, _ROWS_PER_FILE)
                pyarrow.parquet.write_table(part, aside / f"part-{number}.parquet", compression="lz4")
        self.show(name, target)

    def write(self, query: str, target: Path) -> int:
        """As Engine, to a directory of files."""
        tree = _parsed(query)
        remove(target)
        if _is_row_by_row(tree):
            self._write_by_tasks(query, target)
        else:
            self._write_by_spark(tree, target)
        return sum(pyarrow.parquet.read_metadata(file).num_rows for file in _parts(target))

    def show(self, name: str, target: Path, number: str | None = None) -> None:
        """As Engine."""
        first = 0
        self._tables[name] = {}
        for path in _parts(target):
            self._tables[name][path] = numbered_rows(path, number, first)
            first += pyarrow.parquet.read_metadata(path).num_rows
        (self._numbered.add if number else self._numbered.discard)(name)
        self._views.pop(name, None)
        self._known.discard(name)
        super().view(name, " UNION ALL ".join(self._tables[name].values()))

    def view(self, name: str, query: str) -> None:
        """As Engine. A relational query runs now, and once."""
        tree = _parsed(query)
        if _is_row_by_row(tree):
            self._tables.pop(name, None)
            self._views[name] = query
            self._known.discard(name)
            super().view(name, query)
            return
        self._materialize(name, query)

    def each(self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> Iterator[T]:
        """As Engine, each in a task."""
        if not arguments:
            return
        run = partial(_run, function, self._task_memory, self._scratch / "spill", Path.cwd())
        for result in self._session.sparkContext.parallelize(arguments, len(arguments)).map(run).collect():
            if isinstance(result, Exception):
                raise result
            yield result

    def _reduced(self, query: str) -> str:
        """Compute what DuckDB in the driver should not; returns SQL of the result's rows."""
        if not query.startswith("SELECT"):
            return query
        tree = _parsed(query)
        if _is_row_by_row(tree):
            return query
        remove(self._scratch / f"result_{self._results}")
        self._results += 1
        target = self._scratch / f"result_{self._results}"
        remove(target)  # of a run that was killed
        combined = _combination(tree, query)
        if combined is None:
            self._write_by_spark(tree, target)
        else:
            self._write_by_tasks(query, target)
        self.show("result", target)
        if combined is None or isinstance(combined, str):
            return f"SELECT {combined or '* FROM result'}"
        columns = zip(combined, self.connection.sql("SELECT * FROM result").columns, strict=True)
        return f"SELECT {', '.join(f'{how.format(identifier(name))}' for how, name in columns)} FROM result"

    def _write_by_tasks(self, query: str, target: Path) -> None:
        views: dict[str, str] = {}
        self._add_views(_parsed(query), views)
        tables = [name for name in views if name in self._tables]
        with written_aside(target) as aside:
            aside.mkdir()
            given = [(views | {name: rows}, query) for name in tables for rows in self._tables[name].values()]
            parts = [(*task, aside / f"part-{number:06}.parquet") for number, task in enumerate(given)]
            for _ in self.each(_write_part, parts):
                pass

    def _add_views(self, tree: exp.Expr, views: dict[str, str]) -> None:
        """Add the definitions of all that a query reads; of tables, their first file without its rows."""
        for table in tree.find_all(exp.Table):
            name = table.name
            if name in self._views:
                self._add_views(_parsed(self._views[name]), views)
                views.setdefault(name, self._views[name])
            elif name in self._tables:
                views.setdefault(name, f"{next(iter(self._tables[name].values()))} LIMIT 0")

    def _write_by_spark(self, tree: exp.Expr, target: Path) -> None:
        for name in {table.name for table in tree.find_all(exp.Table)} - self._known:
            self._frame(name).createOrReplaceTempView(name)
            self._known.add(name)
        translated = tree.transform(_as_spark).sql(dialect="spark")
        with written_aside(target) as aside:
            self._session.sql(translated).write.parquet(f"file://{aside.absolute()}")

    def _frame(self, name: str) -> DataFrame:
        """A table or a view as Spark reads it."""
        if name in self._views:
            only = re.fullmatch(r"SELECT \* FROM (\w+)", self._views[name])
            if only:
                return self._frame(only[1])
            self._materialize(name, self._views[name])
        elif name in self._numbered:
            self._materialize(name, f"SELECT * FROM {name}")
        files = (re.sub(r"[*?\[\]{}\\]", r"\\\g<0>", str(file.absolute())) for file in self._tables[name])
        return self._session.read.parquet(*(f"file://{file}" for file in files))  # Spark expands patterns

    def _materialize(self, name: str, query: str) -> None:
        """Turn a view into a table."""
        target = self._scratch / f"{name}-{hashlib.sha256(query.encode()).hexdigest()[:16]}"
        self.write(query, target)
        self.show(name, target)


def _parts(directory: Path) -> list[Path]:
    """The files of a working table in order."""
    return sorted(directory.glob("*.parquet"), key=lambda file: [int(part) for part in re.findall(r"\d+", file.stem)])


def _run(function: Callable[..., Any], memory: int, spill: Path, directory: Path, given: tuple[Any, ...]) -> Any:
    """In a task: the result of a function, or its error for the driver to raise. ``directory``: the driver's current
    one, which relative paths are in."""
    try:
        if directory.is_dir():
            os.chdir(directory)
        with connect(memory, spill, threads=1) as connection:
            return function(_TaskEngine(connection), *given)
    except (DataError, duckdb.Error) as error:
        return error


def _write_part(engine: Engine, views: dict[str, str], query: str, target: Path) -> int:
    """In a task: write a query on one file of a table. The other tables are empty, so that all tasks together have each
    row once. ``views``: name → SQL, in the order in which they need one another."""
    for name, definition in views.items():
        engine.view(name, definition)
    return write_parquet(engine.connection, query, target)


def _parsed(query: str) -> exp.Query:
    tree = sqlglot.parse_one(query, dialect="duckdb")
    assert isinstance(tree, exp.Query), query
    return tree


def _is_row_by_row(tree: exp.Expr) -> bool:
    has_query = any(condition.args.get("query") for condition in tree.find_all(exp.In))
    is_set = any(union.args.get("distinct") for union in tree.find_all(exp.Union))
    has_table = all(select.args.get("from_") for select in tree.find_all(exp.Select))
    return tree.find(*_RELATIONAL) is None and not has_query and not is_set and has_table


def _combination(tree: exp.Query, query: str) -> Sequence[str] | str | None:
    """How the results of parts make that of the whole: the function of each column, or SQL after SELECT for the first
    rows. None: they cannot."""
    rest = tree.copy()
    if tree.args.get("limit") and tree.args.get("order"):
        for clause in ("limit", "order", "distinct"):
            rest.set(clause, None)
        distinct = "DISTINCT " if tree.args.get("distinct") else ""
        tail = query[query.rindex(" ORDER BY ") :]
        return f"{distinct}* FROM result{tail}" if _is_row_by_row(rest) else None
    values = [column.unalias() for column in tree.selects]
    values = [value.this if isinstance(value, exp.Filter) else value for value in values]
    rest.set("expressions", [exp.Literal.number(1)])
    if not _is_row_by_row(rest) or any(type(value) not in _COMBINED or value.find(exp.Distinct) for value in values):
        return None
    return [_COMBINED[type(value)] for value in values if isinstance(value, exp.AggFunc)]


def _as_spark(node: exp.Expr) -> exp.Expr:
    """Replace what sqlglot leaves as it is in DuckDB."""
    if isinstance(node, exp.Anonymous) and node.name.lower() == "row":
        return exp.Anonymous(this="STRUCT", expressions=node.expressions)
    return node
