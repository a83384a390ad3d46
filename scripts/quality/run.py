"""Train all rows of a table with several seeds, and write the table, its plots and the results.

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
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hstu.base.errors import EXIT_DONE, EXIT_FAILURE, ConfigError, DataError
from hstu.config.cli import tool
from hstu.sweep.trial import data_facts
from scripts.quality.report import write_report
from scripts.quality.runs import Run
from scripts.quality.tables import ROOT, TABLES, Table, find
from scripts.sweep import Runner, environments, stop_as_ctrl_c

OUTPUT = ROOT / "docs" / "benchmarks" / "quality"


def runs_of(table: Table, options: argparse.Namespace, rows: Sequence[str] | None = None) -> list[Run]:
    """The runs of a table, seed by seed."""
    given = {name: getattr(options, name).absolute() for name in ("data", "work", "output")}
    make = partial(Run, table=table, threads=options.threads, bindings=tuple(options.gin_bindings), **given)
    wanted, seeds = [table.row(row) for row in rows] if rows else table.rows, range(1, options.seeds + 1)
    return [make(row=row, seed=seed) for seed in seeds for row in wanted]


def preprocess_table(table: Table, store: Path, raw: Path | None) -> None:
    """Make the data of the table unless it is there."""
    if data_facts(store) is not None:
        return
    command = ["scripts/preprocess_dataset.py", "--dataset_name", table.dataset, "--output", str(store)]
    command += ["--raw_path", str(raw / table.dataset)] if raw else []
    command += ["--running_statistics"] * (table.task == "ranking")
    print(f"preprocessing {table.dataset} into {store}", flush=True)
    if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        raise DataError(f"{table.dataset} is not preprocessed; the lines above say why")


def state_of(run: Run) -> str:
    """What would be done of a run."""
    if run.stored() is not None:
        return "done"
    if run.is_outdated():
        return "to do again: its settings or its data have changed"
    return f"to do in {run.folder}"


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
    add("--output", type=Path, default=OUTPUT, help="directory for tables, plots and results")
    add("--gin-bindings", nargs="+", action="extend", default=[], help="for all rows, to try something; needs --output")
    add("--dry-run", action="store_true", help="check the settings and list what would be done")
    options = parser.parse_args(arguments)
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)}: give 1 or more")
    if options.gin_bindings and options.output == OUTPUT:
        raise ConfigError("--gin-bindings changes what all rows train: give --output DIR, too, so that the published "
                          "tables stay as they are")  # fmt: skip
    options.threads = int(environments(options.jobs, 1, options.threads)[0]["OMP_NUM_THREADS"])
    return options


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse(arguments)
    table = find("table", options.table, TABLES)
    runs = runs_of(table, options, options.rows)
    for run in runs[: len(runs) // options.seeds]:
        run.check()
    if options.dry_run:
        print(*(f"{run}: {state_of(run)}" for run in runs), sep="\n")
        return EXIT_DONE
    preprocess_table(table, runs[0].store, options.raw)
    signal.signal(signal.SIGTERM, stop_as_ctrl_c)
    try:
        is_done = not Runner(environments(options.jobs, 1, options.threads)).run(runs)
    except KeyboardInterrupt as stop:
        print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
        return int(stop.args[0]) if stop.args else 128 + signal.SIGINT
    finally:
        report = write_report(table, runs_of(table, options), options.output)
        print(f"table: {report}", flush=True)
    return EXIT_DONE if is_done else EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main())
