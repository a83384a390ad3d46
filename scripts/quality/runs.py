"""One run of the campaign, a row of a table with a seed: a trial or a peer, and its line in the results."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from hstu.base.errors import ConfigError
from hstu.base.files import replace_text, written_aside
from hstu.sweep.trial import Trial, data_facts, run_directory
from scripts.quality.tables import ROOT, Row, Table

RANKS = "per_user.csv.gz"
_WRITING = threading.Lock()
_NOT_COMPARED = ("DatasetArgs.dataset_path", "TrainerArgs.best_metric", "TrainerArgs.ckpt_save_interval")
"""The data is the same in another directory (see data_facts); the others are those of the table."""


Result = dict[str, Any]
"""What is reported of a run, without what it does not have: "metrics"; "validation", those of the validation part at
the "iteration" and "epoch" that it has chosen; "epochs" and "seconds" of the training, with evaluations; "curve",
(epoch, value of the first metric) of the evaluations on the validation part."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A row of a table with a seed."""

    table: Table
    row: Row
    seed: int
    data: Path
    """Directory of preprocessed datasets."""
    work: Path
    """Directory of runs and their checkpoints."""
    output: Path
    """Directory of tables, plots and results."""
    threads: int = 1
    bindings: tuple[str, ...] = ()
    """Further ones, of the command line."""

    def __str__(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    @property
    def store(self) -> Path:
        """The preprocessed data."""
        return self.data / self.table.store

    @cached_property
    def trial(self) -> Trial | None:
        """The training. None: of a peer."""
        if self.row.peer:
            return None
        script = "scripts/evaluate.py" if self.table.task == "retrieval" else "scripts/quality/evaluate.py"
        return Trial(
            name=self.row.name, task=self.table.task, files=(str(self.row.config),), seed=self.seed, per_user=True,
            bindings=(f"DatasetArgs.dataset_path = {str(self.store)!r}", *self.bindings),
            root=self.work / self.table.name, evaluate=(str(ROOT / script),),
        )  # fmt: skip

    def check(self) -> None:
        """Raise ConfigError with the name of the row unless the row can be trained as it is written."""
        try:
            _ = None if self.trial is None else self.trial.config
        except ConfigError as error:
            raise ConfigError(f"table {self.table.name}, row {self.row.name!r}:\n{error}") from error

    @cached_property
    def settings(self) -> tuple[str, ...]:
        """What the run computes, one line for each setting."""
        return (" ".join(self.row.peer),) if self.trial is None else _compared(self.trial.settings)

    # --- commands ---

    @property
    def folder(self) -> Path:
        """Where the run writes. Other settings have another one."""
        if self.trial is not None:
            return self.trial.folder
        return run_directory(self.work / self.table.name, self.row.name, self.settings, self.seed)

    def commands(self) -> Iterator[Sequence[str]]:
        """The scripts to run one after the other, with arguments. Those that are done are left out."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.trial is not None:
            yield from self.trial.commands()
        elif not self._peer_file.exists():
            meanings = {"$seed": str(self.seed), "$store": str(self.store), "$folder": str(self.folder)}
            pattern = "|".join(map(re.escape, meanings))
            script, *words = (re.sub(pattern, lambda found: meanings[found[0]], word) for word in self.row.peer)
            yield [str(ROOT / script), *words]
        self._write_result()

    # --- result ---

    @property
    def results(self) -> Path:
        """The file with a line per run of the table."""
        return self.output / self.table.name / "results.jsonl"

    def stored(self) -> Result | None:
        """The result, if there is one of these settings and this data."""
        line = read_results(self.results).get((self.row.name, self.seed), {})
        if _compared(line.get("settings", ())) != self.settings:
            return None
        facts = data_facts(self.store)
        return None if facts is not None and line["data"] != facts else line["result"]

    def is_outdated(self) -> bool:
        """Whether there is a result of other settings or of other data."""
        return (self.row.name, self.seed) in read_results(self.results) and self.stored() is None

    def outcome(self) -> str | None:
        """The metrics of the held-out part. None: they are not known."""
        if (result := self.stored()) is None:
            return None
        metrics = result["metrics"]
        shown = (f"{name}={metrics[name]:.4f}" for name in self.table.metrics if name in metrics)
        return f"held out: {' '.join(shown)}"

    def _write_result(self) -> None:
        result = json.loads(self._peer_file.read_text(encoding="utf-8")) if self.trial is None else self.trial.result()
        assert result is not None, "commands raises where the training was stopped"
        if self.trial is not None:
            result.pop("half_widths")
            metric, curve = self.table.metric, result["curve"]
            result["curve"] = [(epoch, values[metric]) for epoch, values in curve if metric in values]
        line = {
            "row": self.row.name, "seed": self.seed, "settings": self.settings, "data": data_facts(self.store),
            "threads": self.threads, "result": result,
        }  # fmt: skip
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with _WRITING:
            lines = read_results(self.results) | {(self.row.name, self.seed): line}
            per_user = self.folder / "per_user.csv"
            if self.seed == 1 and per_user.exists():
                self._keep_ranks(per_user, self.results.with_name(RANKS))
            replace_text(self.results, "".join(json.dumps(each) + "\n" for each in lines.values()))

    def _keep_ranks(self, of_users: Path, kept: Path) -> None:
        """Put the ranks of this row's targets beside those of other rows."""
        columns = {"rank": self.row.name, "influence": self.row.name, "rank_last_event": f"{self.row.name}/last_event"}
        own = pd.read_csv(of_users, index_col="user").rename(columns=columns)
        own = own[[name for name in dict.fromkeys((*columns.values(), "gap")) if name in own]]
        joined = own.combine_first(read_ranks(kept).drop(columns=[*columns.values()], errors="ignore"))
        with written_aside(kept) as aside:
            joined.sort_index(axis=1).to_csv(aside, float_format="%.10g", compression={"method": "gzip", "mtime": 0})

    @property
    def _peer_file(self) -> Path:
        return self.folder / "peer.json"


def _compared(settings: Sequence[str]) -> tuple[str, ...]:
    return tuple(line for line in settings if line.partition(" = ")[0] not in _NOT_COMPARED)


def read_results(file: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """(row, seed) → the line of a run in a file of results; {} if there is no file."""
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines()) if file.exists() else ()
    return {(line["row"], line["seed"]): line for line in lines}


def read_ranks(file: Path) -> pd.DataFrame:
    """Ranks of the targets of seed 1, a line per user: <row>, <row>/last_event, and the seconds since the event before
    the target, gap. Ranking has influences on AUC instead (evaluate.py). No lines if there is no file."""
    return pd.read_csv(file, index_col="user", compression="gzip") if file.exists() else pd.DataFrame()
