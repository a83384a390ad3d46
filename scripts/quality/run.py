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
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hstu.base.errors import EXIT_DONE, EXIT_FAILURE, ConfigError, DataError, UserError
from hstu.base.processes import start_python
from hstu.config.cli import tool
from scripts.quality.report import write_report
from scripts.quality.runs import ROOT, Places, Run, data_facts
from scripts.quality.tables import TABLES, Table, find

OUTPUT = ROOT / "docs" / "benchmarks" / "quality"
_EXIT_SIGTERM = 128 + signal.SIGTERM
_STOP_S = 60.0
"""A run that was told to stop writes its checkpoint within this time, or is killed."""
_LAST_LINES = 8


class Runner:
    """Does runs in child processes, several at a time."""

    def __init__(self) -> None:
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._is_stopped = False

    def execute(self, runs: Sequence[Run], jobs: int) -> list[Run]:
        """Do what is not done of ``runs``, ``jobs`` at a time. Returns those that have failed.

        Raises KeyboardInterrupt after the runs have saved their checkpoints.
        """
        failed = []
        for needs_others in (False, True):
            now = [run for run in runs if (run.row.epochs_of is not None) == needs_others]
            with ThreadPoolExecutor(jobs) as pool:
                try:
                    failed += [run for run, is_done in zip(now, pool.map(self._do, now), strict=True) if not is_done]
                except KeyboardInterrupt:
                    self._stop()
                    pool.shutdown(cancel_futures=True)
                    raise
        return failed

    def _do(self, run: Run) -> bool:
        """Do a run unless it is done. Returns whether it is done now."""
        vars(run).pop("settings", None)  # they are unknown as long as the runs that it waits for are not finished
        if run.stored() is not None:
            return True
        if run.settings is None:
            print(f"{run}: not run, because {run.row.epochs_of!r} has not finished with all seeds", flush=True)
            return False
        state = ", because its settings or its data have changed" if run.is_outdated() else ""
        print(f"{run}: started in {run.folder}{state}", flush=True)
        begun, log = time.monotonic(), run.folder / "output.txt"
        try:
            for command in run.commands():
                self._run(command, log, run.threads)
        except UserError as error:
            if not self._is_stopped:
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
                last = "".join(f"    {line}\n" for line in lines[-_LAST_LINES:])
                print(f"{run}: failed: {error}. The end of {log}:\n{last}", end="", flush=True)
            return False
        result = run.stored()
        assert result is not None
        shown = " ".join(f"{name}={result.metrics[name]:.4f}" for name in run.table.metrics if name in result.metrics)
        print(f"{run}: held out: {shown}, {time.monotonic() - begun:.0f} s", flush=True)
        return True

    def _run(self, command: Sequence[str], log: Path, threads: int) -> None:
        """Run a command. Raises UserError if it fails or must not be started any more."""
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with log.open("ab") as output:
            process = start_python(command, output, cwd=ROOT, env=environment)
        self._processes.add(process)
        if self._is_stopped:
            process.terminate()
        code = process.wait()
        self._processes.discard(process)
        if code:
            raise UserError(f"a command ended with exit code {code}")

    def _stop(self) -> None:
        """End the processes; trainings save a checkpoint first. A second Ctrl-C kills them at once."""
        self._is_stopped = True
        deadline = time.monotonic() + _STOP_S
        processes = list(self._processes)  # the threads take away those that end
        for process in processes:
            process.terminate()
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            for process in processes:
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
        for process in processes:
            process.kill()


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
    store = places.data / table.store
    if data_facts(store) is not None:
        return
    command = ["scripts/preprocess_dataset.py", "--dataset_name", table.dataset, "--output", str(store)]
    command += ["--raw_path", str(raw / table.dataset)] if raw else []
    command += ["--running_statistics"] * table.running_statistics
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
        failed = Runner().execute(runs, options.jobs)
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
