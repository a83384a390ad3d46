"""Train gin files with every combination of some values, over several seeds, and choose by the validation part.

python scripts/sweep.py base.gin --grid "OptimizerArgs.learning_rate = [1e-3, 2e-3]" \\
    --grid "NetworkArgs.num_layers = [2, 4]" --seeds 3 --jobs 2

Several files are compared with each other. TrainerArgs.best_metric chooses the weights of a trial and the best setting;
the test part is reported of all and chooses nothing. --output gets table.md, trials.jsonl with a line per trial,
best.gin, and a run directory per trial. Start the same command again after Ctrl-C, a kill or a failure, or with more
seeds or values: trials go on from their checkpoints, and what is done is kept.

Exit codes: 0 done, 1 a trial has failed, 2 bad arguments or settings, 3 missing data, 130 stopped by Ctrl-C, 143 by
SIGTERM.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import queue
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

import pandas as pd
from tabulate import tabulate

from hstu.base.errors import EXIT_DONE, EXIT_FAILURE, ConfigError, UserError
from hstu.base.files import DirectoryLock, replace_text
from hstu.base.processes import last_lines, start_python, stop
from hstu.config.args import DatasetArgs, Task
from hstu.config.cli import tool
from hstu.config.gin_io import find_file, task_of
from hstu.config.gin_scan import scan
from hstu.config.problems import literal
from hstu.data.datasets import store_path
from hstu.data.store.sequence_store import SequenceStore
from hstu.sweep.trial import OWN, Trial, number

HERE = Path(__file__).resolve().parent
_SET_HERE = (*OWN, "best_metric", "best_metric_mode")
_NOTES = (
    "Mean ± standard error over seeds. The best {metric} on the validation part chooses the weights of a trial, and "
    "the order of the settings; the test part chooses nothing. 95 % of users: half of the width of the 95 % interval "
    "of test {metric} over users, mean of the seeds. Epochs are those of the chosen weights, minutes of the training."
)


class Runner:
    """Does jobs in child processes, as many at a time as there are ``environments``: variables for each of them.

    A job has a ``folder`` for output.txt, ``commands()``, which gives the Python programs that are left to run, each
    after the one before it, and ``outcome()``: its result in a few words, or None if it is not done.
    """

    def __init__(self, environments: Sequence[Mapping[str, str]]) -> None:
        self._jobs, self._free = len(environments), queue.SimpleQueue[Mapping[str, str]]()
        for environment in environments:
            self._free.put(environment)
        self._children: set[subprocess.Popen[bytes]] = set()
        self._is_stopped = False

    def run(self, jobs: Sequence[Any]) -> dict[str, str]:
        """Do the jobs that are not done. Returns str(job) → reason of those that have failed.

        A stop signal (KeyboardInterrupt) reaches the caller after the children have ended; trainings save a checkpoint.
        """
        left, failed, begun = [job for job in jobs if job.outcome() is None], dict[str, str](), time.monotonic()
        if len(left) < len(jobs):
            print(f"{len(jobs) - len(left)} of {len(jobs)} are done", flush=True)
        with ThreadPoolExecutor(self._jobs) as pool:
            futures = {pool.submit(self._do, job): job for job in left}
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    job, reason = futures[future], future.result()
                    failed |= {str(job): reason} if reason else {}
                    minutes, more = (time.monotonic() - begun) / 60, len(left) - done
                    rest = f", about {minutes / done * more:.1f} min left" if more else ""
                    shown = f"failed: {reason}" if reason else job.outcome()
                    _say(f"[{len(jobs) - more}/{len(jobs)}] {job}: {shown} ({minutes:.1f} min{rest})")
            except BaseException:
                self._is_stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                stop(list(self._children))
                raise
        return failed

    def _do(self, job: Any) -> str | None:
        """Do a job. Returns why it has failed, or None."""
        environment, output = self._free.get(), job.folder / "output.txt"
        _say(f"{job}: started, see {output}")
        try:
            for command in job.commands():
                self._run(command, output, environment)
        except UserError as error:
            return f"{error}. The end of {output}:\n{last_lines(output)}"
        finally:
            self._free.put(environment)
        return None if job.outcome() else f"it ended without a result; see {output}"

    def _run(self, command: Sequence[str], output: Path, environment: Mapping[str, str]) -> None:
        with output.open("ab") as file:
            child = start_python(command, file, env=os.environ | environment)
        self._children.add(child)
        if self._is_stopped:
            child.terminate()
        code = child.wait()
        self._children.discard(child)
        if code:
            raise UserError(f"exit code {code}")


def _say(line: str) -> None:
    print(f"{line}\n", end="", flush=True)  # in one piece, because other threads print, too


def environments(jobs: int, ranks: int, threads: int) -> list[dict[str, str]]:
    """Variables of the processes of each of the ``jobs`` that run at a time: this code, the threads of each rank (0:
    the processors, shared out), and one of the visible GPUs per rank if there are enough."""
    from torch import cuda

    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = threads or max(1, len(os.sched_getaffinity(0)) // (jobs * ranks))
    common = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)}
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [*map(str, range(cuda.device_count()))]
    if len(gpus) < jobs * ranks:
        return [common] * jobs
    return [common | {"CUDA_VISIBLE_DEVICES": ",".join(gpus[job * ranks :][:ranks])} for job in range(jobs)]


def stop_as_ctrl_c(*_: object) -> None:
    """Handler of SIGTERM."""
    raise KeyboardInterrupt(128 + signal.SIGTERM)


# --- settings ---


def parse_grid(lines: Sequence[str]) -> dict[str, Sequence[Any]]:
    """Parameter → its values. Raises ConfigError."""
    grid: dict[str, Sequence[Any]] = {}
    for line in lines:
        found = scan([], [line])
        if found.problems or len(found.bindings) != 1:
            why = found.problems[0].text if found.problems else "give one parameter"
            raise ConfigError(f"--grid {literal(line)}: {why}")
        name, values = found.bindings[0].name, found.bindings[0].value
        if name in grid:
            raise ConfigError(f"--grid: {name} is there twice; give all its values in one list")
        if name.removeprefix("TrainerArgs.") in _SET_HERE:
            raise ConfigError(f"--grid: {name} is set by the sweep, or must be equal in all trials; leave it out")
        if not isinstance(values, (list, tuple)) or not values or len(set(map(repr, values))) < len(values):
            raise ConfigError(f"--grid {literal(line)}: give a list of different values: {name} = [first, second]")
        grid[name] = values
    return grid


def check(trial: Trial) -> tuple[str, str]:
    """The metric that chooses, and its mode. Raises ConfigError if there is none, or if a trial cannot be trained."""
    trainer, data = trial.config.trainer, trial.config.dataset
    if trainer.best_metric is None:
        raise ConfigError("TrainerArgs.best_metric chooses the best setting, and no file or binding sets it")
    if not trainer.saves_checkpoints:
        raise ConfigError("TrainerArgs.ckpt_save_interval keeps no checkpoint, not even the best: leave it out")
    if trial.bound.get("TrainerArgs.ckpt_load_dir", "") not in ("", "auto"):
        raise ConfigError("TrainerArgs.ckpt_load_dir: trials go on from their own checkpoints: leave it out")
    has_both = False
    if isinstance(data, DatasetArgs):
        parts = SequenceStore.open(store_path(data)).events_by_split()
        own = data.valid_items if trial.task == "retrieval" else data.valid_fraction
        has_both = bool(parts["valid"] and parts["test"]) if parts else bool(own)
    if not has_both:
        raise ConfigError(
            "a sweep chooses by a validation part and reports a test part: hold out both, by "
            "DatasetArgs.valid_items = 1 (retrieval) or DatasetArgs.valid_fraction = 0.1 (ranking)"
        )
    return trainer.best_metric, trainer.best_metric_mode


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A gin file with a value of each parameter of the grid."""

    name: str
    trials: Sequence[Trial]
    """One per seed."""
    by: tuple[str, str] | None = None
    """What ``check`` returns; None: it cannot be trained, and there are no trials."""
    refused: str = ""
    """Why it cannot be trained."""

    def valid(self) -> float | None:
        """Mean of the metric of the validation part; None: a trial is not done."""
        results = [trial.result() for trial in self.trials]
        values = [result["validation"][self.by[0]] for result in results if result and self.by]
        return sum(values) / len(values) if values and len(values) == len(self.trials) else None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Gin files times the values of a grid."""

    files: Sequence[str]
    grid: Mapping[str, Sequence[Any]]
    bindings: tuple[str, ...]
    task: Task
    seeds: int
    ranks: int
    output: Path

    @property
    def axes(self) -> list[Sequence[Any]]:
        """The choices that make a setting."""
        return [self.files, *self.grid.values()]

    def settings(self, samples: int | None) -> list[Setting]:
        """All of them, or ``samples`` drawn at random. More samples begin with the same ones."""
        rng, total = random.Random(0), math.prod(map(len, self.axes))
        drawn = dict.fromkeys(itertools.product(*(range(len(axis)) for axis in self.axes)) if samples is None else ())
        while samples is not None and len(drawn) < min(samples, total):
            drawn[tuple(rng.randrange(len(axis)) for axis in self.axes)] = None
        return [self.setting(*places) for places in drawn]

    def setting(self, *places: int) -> Setting:
        """The setting with the choice of this number on each axis."""
        file, *values = (axis[place] for axis, place in zip(self.axes, places, strict=True))
        pairs = [(name, literal(value)) for name, value in zip(self.grid, values, strict=True)]
        name = " ".join(f"{each.rpartition('.')[2]}={value}" for each, value in pairs)
        name = f"{Path(file).stem} {name}".strip() if len(self.files) > 1 or not name else name
        trial = Trial(
            name=name, task=self.task, files=(file,), seed=1, root=self.output, ranks=self.ranks,
            bindings=(*self.bindings, *(f"{each} = {value}" for each, value in pairs)),
            evaluate=(str(HERE / "evaluate.py"),),
        )  # fmt: skip
        try:
            by = check(trial)
        except ConfigError as error:
            return Setting(name=name, trials=(), refused=str(error))
        return Setting(name=name, by=by, trials=[replace(trial, seed=seed) for seed in range(1, self.seeds + 1)])


Do = Callable[[Sequence[Setting]], list[float | None]]
"""Does settings. Returns the mean of each on the validation part, or None if a trial has failed."""


def ask_optuna(sweep: Sweep, samples: int, at_once: int, mode: str, do: Do) -> None:
    """Let Optuna's TPE sampler choose. A sweep that is continued asks it anew, and knows the answers so far."""
    try:
        import optuna
    except ImportError:
        raise ConfigError("--engine optuna: optuna is not installed; install it with pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=f"{mode}imize", sampler=optuna.samplers.TPESampler(seed=0))
    axes = {str(number): range(len(axis)) for number, axis in enumerate(sweep.axes)}
    for first in range(0, samples, at_once):
        asked = [study.ask() for _ in range(min(at_once, samples - first))]
        chosen = [sweep.setting(*(one.suggest_categorical(*axis) for axis in axes.items())) for one in asked]
        for one, value in zip(asked, do(chosen), strict=True):
            study.tell(one, value, None if value is not None else optuna.trial.TrialState.FAIL)


# --- results ---


def report(settings: Sequence[Setting], failed: Mapping[str, str], by: tuple[str, str], run: str, output: Path) -> str:
    """Write table.md, trials.jsonl and best.gin, and return the table. ``failed``: setting or trial → reason.

    ``by``: the metric that chooses, and its mode. ``run``: how a trial is started, without its file."""
    (metric, mode), rows = by, list[dict[str, Any]]()
    for setting in settings:
        for trial in setting.trials:
            result = trial.result() or {"failed": failed.get(str(trial))}
            made_of = {"setting": setting.name, "bindings": trial.bindings, "seed": trial.seed}
            rows.append({**made_of, "folder": str(trial.folder), **result})
    replace_text(output / "trials.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    done = [row for row in rows if "metrics" in row]
    names = [name for name in done[0]["metrics"] if name.partition("/")[0] == metric.partition("/")[0]] if done else []
    shown = {f"valid {metric}": f"validation.{metric}", **{f"test {name}": f"metrics.{name}" for name in names}}
    others = {"95 % of users": f"half_widths.{metric}", "epoch": "epoch", "minutes": "seconds"}
    frame = pd.json_normalize(done).reindex(columns=["setting", *shown.values(), *others.values()])
    grouped = frame.set_index("setting").astype(float).groupby(level=0)  # undefined metrics are None
    mean, error, count = grouped.mean(), grouped.sem(), grouped.size()
    value = mean[f"validation.{metric}"] * (-1 if mode == "max" else 1)
    ranked = sorted(settings, key=lambda each: (-count.get(each.name, 0), value.get(each.name, 0.0)))
    mean, error = (each.reindex([setting.name for setting in ranked]) for each in (mean, error))
    table: dict[str, Sequence[str]] = {"setting": [*mean.index]}
    table |= {name: [*map(number, mean[column], error[column])] for name, column in shown.items()}
    table["95 % of users"] = [f"± {number(each)}" if each == each else "" for each in mean[others["95 % of users"]]]
    table["seeds"] = [f"{count.get(name, 0)}" for name in mean.index]
    table["epoch"], table["minutes"] = (
        [f"{each / unit:.1f}" if each == each else "" for each in mean[others[name]]]
        for name, unit in (("epoch", 1), ("minutes", 60))
    )
    text = tabulate(table, headers="keys", tablefmt="github", disable_numparse=True)
    lines = [f"- {name} failed: {reason.splitlines()[-1].strip()}" for name, reason in failed.items()]
    replace_text(output / "table.md", "\n".join([text, "", _NOTES.format(metric=metric), *lines]) + "\n")
    first, best = ranked[0], output / "best.gin"
    best.unlink(missing_ok=True)
    if first.valid() is not None:
        result = first.trials[0].result() or {}
        head = (
            f"# The best of {len(settings)} settings by valid {metric}, {table[f'valid {metric}'][0]}: {first.name}.\n"
        )
        head += (
            f"# Seed 1 has valid {metric} {result['validation'][metric]!r}, test {result['metrics'][metric]!r}: the "
        )
        head += f"same as from\n# {run} {best}\n"
        replace_text(best, head + first.trials[0].config.operative_gin())
    return text


# --- command line ---


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="gin file, or the name of a shipped one; several are compared")
    add("--grid", action="append", default=[], metavar="LINE", help='"Class.parameter = [first, second]"; repeatable')
    add("--gin-bindings", nargs="+", action="extend", default=[], metavar="BINDING", help="for all trials")
    add("--seeds", type=int, default=1, help="train each setting with TrainerArgs.seed = 1 to this (%(default)s)")
    add("--samples", type=int, help="settings to draw from the grid at random; default: all")
    add("--engine", choices=("grid", "optuna"), default="grid", help="optuna: it chooses --samples settings in turn")
    add("--jobs", type=int, default=1, help="trials at a time (%(default)s); GPUs are shared out among them")
    add("--ranks", type=int, default=1, help="processes of each trial, by torchrun (%(default)s)")
    add("--threads", type=int, default=0, help="of each rank; default: the processors, shared out")
    add("--output", type=Path, help="directory of the sweep; default: runs/sweep-<first file>")
    add("--dry-run", action="store_true", help="check the settings and list the trials")
    options = parser.parse_args(arguments)
    for name in ("seeds", "jobs", "ranks", "samples"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ConfigError(f"--{name} {value}: give 1 or more")
    if options.engine == "optuna" and not options.samples:
        raise ConfigError("--engine optuna: give --samples, the number of settings that it chooses")
    return options


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse(arguments)
    files = [*dict.fromkeys(find_file(name, []) for name in options.files)]
    sweep = Sweep(
        files=files, grid=parse_grid(options.grid), bindings=tuple(options.gin_bindings),
        task=task_of(scan(files, options.gin_bindings)), seeds=options.seeds, ranks=options.ranks,
        output=(options.output or Path("runs") / f"sweep-{Path(files[0]).stem}").absolute(),
    )  # fmt: skip
    settings, done, failed = sweep.settings(options.samples), dict[str, Setting](), dict[str, str]()
    chosen = {setting.by for setting in settings if setting.by}
    if not chosen:
        raise ConfigError([*dict.fromkeys(line for setting in settings for line in setting.refused.splitlines())])
    if len(chosen) > 1:
        raise ConfigError(f"TrainerArgs.best_metric must be equal in all files; they have {sorted(chosen)}")
    if options.dry_run:
        for trial in (trial for setting in settings for trial in setting.trials):
            print(f"{trial}: {trial.outcome() or f'to do in {trial.folder}'}")
        return EXIT_DONE
    sweep.output.mkdir(parents=True, exist_ok=True)
    lock, (by,) = DirectoryLock(sweep.output, "--output"), chosen
    variables = environments(options.jobs, options.ranks, options.threads)
    runner = Runner(variables)

    def do(asked: Sequence[Setting]) -> list[float | None]:
        new = {setting.name: setting for setting in asked if setting.name not in done}
        done.update(new)
        for setting in (setting for setting in new.values() if setting.refused):
            print(f"{setting.name}: cannot be trained: {setting.refused}", file=sys.stderr, flush=True)
            failed[setting.name] = setting.refused
        failed.update(runner.run([trial for setting in new.values() for trial in setting.trials]))
        return [setting.valid() for setting in asked]

    signal.signal(signal.SIGTERM, stop_as_ctrl_c)
    code = EXIT_DONE
    try:
        if options.engine == "optuna":
            ask_optuna(sweep, options.samples, max(1, options.jobs // options.seeds), by[1], do)
        else:
            do(settings)
    except KeyboardInterrupt as stopped:
        code = int(stopped.args[0]) if stopped.args else 128 + signal.SIGINT
        print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
    launcher = "python" if options.ranks == 1 else f"torchrun --nproc_per_node {options.ranks}"
    run = f"OMP_NUM_THREADS={variables[0]['OMP_NUM_THREADS']} {launcher} -m hstu.entry {sweep.task} --gin-config-file"
    print(f"\n{report([*done.values()], failed, by, run, sweep.output)}\n\n{sweep.output} has table.md, trials.jsonl")
    lock.release()
    return code or (EXIT_FAILURE if failed else EXIT_DONE)


if __name__ == "__main__":
    sys.exit(main())
