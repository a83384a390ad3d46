"""Train all rows of a table with several seeds, and write the table, its plots and the raw metrics.

    python scripts/quality/run.py --table ml_1m_retrieval --seeds 3
        [--rows all "published settings"] [--jobs 2 --threads 1] [--output DIR] [--dry-run]

The tables are in scripts/quality/tables.py, and their results in docs/benchmarks/quality. The checkpoint with
the best validation is evaluated on the test part, once. Finished runs are kept: run the same command again after Ctrl-C
or a failure, or with more seeds. A run whose settings or data have changed is repeated.

Exit codes: 0 done, 1 a run has failed, 2 bad arguments or settings, 3 missing data, 130 stopped by Ctrl-C, 143 by
SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hstu.base.errors import EXIT_DONE, EXIT_FAILURE, ConfigError, DataError
from hstu.config.tool import tool
from scripts.quality.report import write_report
from scripts.quality.runs import ROOT, Places, Run, data_facts
from scripts.quality.scheduler import execute
from scripts.quality.tables import TABLES, Table, find

OUTPUT = ROOT / "docs" / "benchmarks" / "quality"
_EXIT_SIGTERM = 128 + signal.SIGTERM


def runs_of(
    name: str, table: Table, options: argparse.Namespace, places: Places, rows: Sequence[str] | None = None
) -> list[Run]:
    """The runs of a table, seed by seed."""
    wanted = [table.row(row) for row in rows] if rows else table.rows
    made: list[Run] = []

    def make(row_name: str, seed: int, waits_for: tuple[Run, ...] = ()) -> Run:
        return Run(
            table_name=name, table=table, row=table.row(row_name), seed=seed, places=places,
            threads=options.threads, bindings=tuple(options.gin_bindings), waits_for=waits_for,
        )  # fmt: skip

    seeds = range(1, options.seeds + 1)
    for seed in seeds:
        for row in wanted:
            others = tuple(make(row.epochs_of, other) for other in seeds) if row.epochs_of else ()
            made.append(make(row.name, seed, others))
    return made


def preprocess_table(table: Table, places: Places, raw: Path | None) -> None:
    """Make the data of the table unless it is there."""
    store = places.data / table.dataset
    if data_facts(store) is not None:
        return
    command = ["scripts/preprocess_dataset.py", "--dataset_name", table.dataset, "--output", str(store)]
    command += ["--raw_path", str(raw / table.dataset)] if raw else []
    print(f"preprocessing {table.dataset} into {store}", flush=True)
    if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        raise DataError(f"{table.dataset} is not preprocessed; the lines above say why")


def list_runs(runs: Sequence[Run]) -> None:
    """Print what would be done."""
    for run in runs:
        if run.stored() is not None:
            state = "done"
        elif run.is_outdated():
            state = "to do again: its settings or its data have changed"
        elif run.settings is None:
            state = f"to do after {run.row.epochs_of!r}"
        else:
            state = f"to do in {run.folder}"
        print(f"{run}: {state}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--table", required=True, help=", ".join(TABLES))
    add("--rows", nargs="+", metavar="ROW", help="only these")
    add("--seeds", type=int, default=3, help="seeds 1 to this number")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--threads", type=int, default=0, help="of each run; 0: the processors shared out among the jobs")
    add("--data", type=Path, default=ROOT / "tmp_data", help="directory of the preprocessed data")
    add("--raw", type=Path, help="directory with a directory of raw files for each dataset; else they are downloaded")
    add("--work", type=Path, default=ROOT / "runs" / "quality", help="directory for runs and checkpoints")
    add("--output", type=Path, default=OUTPUT, help="directory for tables, plots and raw metrics")
    add("--gin-bindings", nargs="+", action="extend", default=[], help="for all rows, to try something; needs --output")
    add("--dry-run", action="store_true", help="check the settings and list what would be done")
    options = parser.parse_args(arguments)
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)}: give 1 or more")
    if options.gin_bindings and options.output == OUTPUT:
        raise ConfigError("--gin-bindings changes what all rows train: give --output DIR, too, so that the published "
                          "tables stay as they are")  # fmt: skip
    options.threads = options.threads or max(1, len(os.sched_getaffinity(0)) // options.jobs)
    return options


def stop_as_ctrl_c(*_: object) -> None:
    """Handler of SIGTERM."""
    raise KeyboardInterrupt(_EXIT_SIGTERM)


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse(arguments)
    table = find("table", options.table, TABLES)
    places = Places(data=options.data.absolute(), work=options.work.absolute(), output=options.output.absolute())
    runs = runs_of(options.table, table, options, places, options.rows)
    for run in runs[: len(runs) // options.seeds]:
        run.check()
    if options.dry_run:
        list_runs(runs)
        return EXIT_DONE
    preprocess_table(table, places, options.raw)
    signal.signal(signal.SIGTERM, stop_as_ctrl_c)
    try:
        failed = execute(runs, options.jobs)
    except KeyboardInterrupt as stop:
        print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
        return int(stop.args[0]) if stop.args else 128 + signal.SIGINT
    finally:
        report = write_report(options.table, table, runs_of(options.table, table, options, places), places.output)
        print(f"table: {report}", flush=True)
    return EXIT_FAILURE if failed else EXIT_DONE


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
