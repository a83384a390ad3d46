"""One run of the campaign, a row of a table with a seed: its commands, and its line in the results of the table."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from hstu.base.errors import ConfigError, UserError
from hstu.base.files import replace_text, written_aside
from hstu.config.gin_io import read_and_check
from hstu.config.gin_scan import scan
from hstu.config.rules import RULES
from hstu.config.run_config import RunConfig
from hstu.data.rules import DATA_RULES
from hstu.data.store.sequence_store import SequenceStore
from hstu.observe.records import read_metrics
from scripts.quality.tables import Row, Table

ROOT = Path(__file__).resolve().parents[2]
METRICS = "metrics.jsonl"
RANKS = "per_user.csv.gz"
_SAVE_INTERVAL = 200
"""Iterations between two checkpoints: what a kill may cost."""
_WRITING = threading.Lock()


class RunFailed(UserError):
    """A command of a run has ended without what it should have made."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Directories of the campaign."""

    data: Path
    """Preprocessed datasets."""
    work: Path
    """Runs and their checkpoints."""
    output: Path
    """Tables, plots and results."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What is reported of a run."""

    metrics: dict[str, float]
    validation: dict[str, float] | None = None
    """The metrics of the validation part at the iteration that it has chosen. None: it has chosen nothing."""
    iteration: int | None = None
    """Of the weights that were evaluated."""
    epoch: float | None = None
    epochs: float | None = None
    """That were trained."""
    seconds: float | None = None
    """Wall time of the training, with evaluations on the validation part."""
    curve: Sequence[tuple[float, float]] = ()
    """(epoch, value of the first metric) of the evaluations on the validation part."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A row of a table with a seed."""

    table_name: str
    table: Table
    row: Row
    seed: int
    places: Places
    threads: int = 1
    bindings: tuple[str, ...] = ()
    """Further ones, of the command line."""
    waits_for: tuple[Run, ...] = ()
    """The runs whose validation says how long this one trains."""

    def __str__(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    # --- settings ---

    @cached_property
    def settings(self) -> tuple[str, ...] | None:
        """What the run computes, one line for each setting. None: another run must first tell how long to train."""
        if self.row.peer:
            return (" ".join(self.row.peer),)
        length = self._length()
        if length is None:
            return None
        bound = {each.name: each.value for each in scan([self._config_file], [*self._bindings(), *length]).bindings}
        bound.pop("DatasetArgs.dataset_path", None)  # the data is the same in another directory; see data_facts
        return tuple(f"{name} = {value!r}" for name, value in sorted(bound.items()))

    @cached_property
    def config(self) -> RunConfig:
        """The checked configuration. Raises ConfigError with the name of the row."""
        try:
            rules = (*RULES, *DATA_RULES)
            return read_and_check([self._config_file], self._all_bindings(), self.table.task, 1, rules)[0]
        except ConfigError as error:
            raise ConfigError(f"table {self.table_name}, row {self.row.name!r}:\n{error}") from error

    def check(self) -> None:
        """Raise ConfigError unless the row can be trained as it is written."""
        if not self.row.peer:
            _ = self.config

    # --- commands ---

    @property
    def folder(self) -> Path:
        """Where the run writes. Other settings have another one."""
        made_of = hashlib.sha256("\n".join(self.settings or ()).encode()).hexdigest()[:8]
        return self.places.work / self.table_name / f"{slug(self.row.name)}-{made_of}" / f"seed{self.seed}"

    def commands(self) -> Iterator[list[str]]:
        """The scripts to run one after the other, with arguments. Those that are done are left out."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.row.peer:
            if not self._peer_file.exists():
                yield self._filled(self.row.peer)
        else:
            yield from self._training()
        self._write_result()

    def _training(self) -> Iterator[list[str]]:
        if not self._is_trained():
            script = f"pretrain_gr_{self.table.task}.py"
            yield [script, "--gin-config-file", self._config_file, "--gin-bindings", *self._all_bindings()]
        if not self._is_trained():
            raise RunFailed("the training ended before its last iteration")
        if not self._test_file.exists():
            tested = self.folder / "checkpoints" / ("best" if self.table.chooses(self.row) else "")
            script = "scripts/evaluate.py" if self.table.task == "retrieval" else "scripts/quality/evaluate.py"
            self._ranks_file.unlink(missing_ok=True)  # of an evaluation that was killed
            written = ["--output", str(self._test_file), "--per_user", str(self._ranks_file)]
            yield [script, "--ckpt", str(tested), *written]

    # --- result ---

    @property
    def results(self) -> Path:
        """The file with a line per run of the table."""
        return self.places.output / self.table_name / "results.jsonl"

    def stored(self) -> Result | None:
        """The result, if there is one of these settings and this data."""
        line = read_results(self.results).get((self.row.name, self.seed), {})
        if self.settings is None or line.get("settings") != list(self.settings):
            return None
        facts = self.data_facts()
        return None if facts is not None and line["data"] != facts else Result(**line["result"])

    def is_outdated(self) -> bool:
        """Whether there is a result of other settings or of other data."""
        return (self.row.name, self.seed) in read_results(self.results) and self.stored() is None

    def data_facts(self) -> dict[str, Any] | None:
        """What the data of the table is. None: it is not preprocessed."""
        return data_facts(self.places.data / self.table.store)

    def _write_result(self) -> None:
        result = self._peer_result() if self.row.peer else self._trained_result()
        line = {
            "row": self.row.name, "seed": self.seed, "settings": self.settings, "data": self.data_facts(),
            "threads": self.threads, "result": vars(result),
        }  # fmt: skip
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with _WRITING:
            lines = read_results(self.results) | {(self.row.name, self.seed): line}
            if self.seed == 1 and self._ranks_file.exists():
                self._keep_ranks(self.results.with_name(RANKS))
            replace_text(self.results, "".join(json.dumps(each) + "\n" for each in lines.values()))

    def _keep_ranks(self, kept: Path) -> None:
        """Put the ranks of this row's targets beside those of other rows."""
        columns = {"rank": self.row.name, "influence": self.row.name, "rank_last_event": f"{self.row.name}/last_event"}
        own = pd.read_csv(self._ranks_file, index_col="user").rename(columns=columns)
        own = own[[name for name in dict.fromkeys((*columns.values(), "gap")) if name in own]]
        joined = own.combine_first(read_ranks(kept).drop(columns=[*columns.values()], errors="ignore"))
        with written_aside(kept) as aside:
            joined.sort_index(axis=1).to_csv(aside, float_format="%.10g", compression={"method": "gzip", "mtime": 0})

    def _peer_result(self) -> Result:
        written = json.loads(self._peer_file.read_text(encoding="utf-8"))
        return Result(metrics=written["metrics"], seconds=written.get("seconds"))

    def _trained_result(self) -> Result:
        records = read_metrics(self.folder / METRICS)
        evaluations = [record for record in records if record["kind"] == "eval"]
        chosen, validation = evaluations[-1], None
        if self.table.chooses(self.row):
            best = self._summary()["best"]
            chosen = next(e for e in evaluations if (e["split"], e["iter"]) == (best["split"], best["iter"]))
            validation = chosen["metrics"]
        metrics = json.loads(self._test_file.read_text(encoding="utf-8"))["metrics"]
        valid = [(each["epoch"], each["metrics"]) for each in evaluations if each["split"] == "valid"]
        lines = (self.folder / METRICS).read_text(encoding="utf-8").splitlines()
        return Result(
            metrics=metrics, validation=validation, iteration=chosen["iter"], epoch=chosen["epoch"],
            epochs=records[-1]["epoch"], seconds=seconds_of(lines),
            curve=[(epoch, found[self.table.metric]) for epoch, found in valid if self.table.metric in found],
        )  # fmt: skip

    # --- bindings ---

    @property
    def _config_file(self) -> str:
        return str(ROOT / self.table.config_of(self.row))

    @property
    def _test_file(self) -> Path:
        return self.folder / "test.json"

    @property
    def _ranks_file(self) -> Path:
        return self.folder / "per_user.csv"

    @property
    def _peer_file(self) -> Path:
        return self.folder / "peer.json"

    def _bindings(self) -> tuple[str, ...]:
        return (*self.table.bindings_of(self.row), *self.bindings)

    def _length(self) -> tuple[str, ...] | None:
        """How long to train, where other runs say so; None as long as they are not finished."""
        if self.row.epochs_of is None:
            return ()
        results = [run.stored() for run in self.waits_for]
        best = [result.epoch for result in results if result is not None and result.epoch is not None]
        if not best or len(best) < len(results):
            return None
        return (f"TrainerArgs.num_train_epochs = {max(1, round(sum(best) / len(best)))}.0",)

    def _all_bindings(self) -> list[str]:
        own = [
            *(self._length() or ()),
            f"TrainerArgs.seed = {self.seed}",
            f"TrainerArgs.output_dir = {str(self.folder)!r}",
            f"TrainerArgs.ckpt_save_dir = {str(self.folder / 'checkpoints')!r}",
            'TrainerArgs.ckpt_load_dir = "auto"',
            f"TrainerArgs.ckpt_save_interval = {_SAVE_INTERVAL}",
            "TrainerArgs.ckpt_keep_last = 2",
            "TrainerArgs.tensorboard = False",
            'TrainerArgs.progress_bar = "off"',
        ]
        if self.table.chooses(self.row):
            own += [f"TrainerArgs.best_metric = {self.table.metric!r}"]
        else:  # the held-out part is seen once, when the training is over
            own += ["TrainerArgs.eval_interval = 0", "TrainerArgs.best_metric = None"]
            own += ["TrainerArgs.early_stop_patience = None"]
        data = f"DatasetArgs.dataset_path = {str(self.places.data / self.table.store)!r}"
        return self._filled([data, *self._bindings(), *own])

    def _filled(self, texts: Sequence[str]) -> list[str]:
        meanings = {
            "$seed": str(self.seed),
            "$store": str(self.places.data / self.table.store),
            "$folder": str(self.folder),
        }
        return [re.sub("|".join(map(re.escape, meanings)), lambda found: meanings[found[0]], text) for text in texts]

    def _summary(self) -> dict[str, Any]:
        file = self.folder / "summary.json"
        summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return summary

    def _is_trained(self) -> bool:
        return self._summary().get("status") in ("done", "stopped early")


def slug(name: str) -> str:
    """``name`` as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def data_facts(store: Path) -> dict[str, Any] | None:
    """Sizes by which one preprocessed dataset differs from another of its name; None if there is none."""
    if not store.is_dir():
        return None
    opened = SequenceStore.open(store)
    return {
        "users": opened.num_users,
        "items": opened.cardinality(opened.item_feature),
        "events": int(opened.offsets()[-1]),
    }


def read_results(file: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """(row, seed) → the line of a run in a file of results; {} if there is no file."""
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines()) if file.exists() else ()
    return {(line["row"], line["seed"]): line for line in lines}


def read_ranks(file: Path) -> pd.DataFrame:
    """Ranks of the targets of seed 1, a line per user: <row>, <row>/last_event, and the seconds since the event before
    the target, gap. Ranking has influences on AUC instead (ratings.py). No lines if there is no file."""
    return pd.read_csv(file, index_col="user", compression="gzip") if file.exists() else pd.DataFrame()


def seconds_of(lines: Sequence[str]) -> float:
    """The seconds of training that metrics.jsonl tells of: of all attempts together, if the run was resumed."""
    attempts = [0.0]
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if record.get("kind") == "resumed":
            attempts.append(0.0)
        elif record.get("kind") == "train":
            attempts[-1] = record["time_s"]
    return round(sum(attempts), 1)
