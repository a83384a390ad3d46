"""The tables of the quality campaign, which scripts/quality/run.py runs: the directories of configs/quality.

Each gin file is a row of our own, whose name is its first line. table.json has the rest of a table: see ``Table``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hstu.base.errors import ConfigError
from hstu.config.args import Task
from hstu.config.problems import did_you_mean

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "quality"
_WRITES = "--output", "$folder/peer.json", "--per_user", "$folder/per_user.csv"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: a configuration that is trained, or a peer."""

    name: str
    config: Path | None = None
    """Gin file; None: a peer."""
    peer: Sequence[str] = ()
    """Instead of a training: a script and its arguments, in which $seed, $store (the preprocessed data) and $folder
    (the row's own, for one seed) stand for what they are in a run. It writes {"metrics": {name: value}} to
    $folder/peer.json, and it may write $folder/per_user.csv with columns user and rank, or for ranking user and
    influence (evaluate.py)."""
    trials: int | str = ""
    """Number of settings that validation compared to choose those of the row, where they were counted."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that are compared on the same data by the same metrics."""

    folder: Path
    title: str
    dataset: str
    """Name of a built-in dataset."""
    metrics: Sequence[str]
    """Columns. The best value of the first one on validation chooses the checkpoint."""
    reference: str
    """The row that the others are compared with, seed by seed."""
    trials: int | str = ""
    """Row.trials of the reference."""
    peers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name of a row → arguments of ``_peer``."""
    published: Sequence[tuple[str, float, float]] = ()
    """Figures of papers on the same data: whose, and the values of the first two metrics."""

    @property
    def name(self) -> str:
        """The name of the directory."""
        return self.folder.name

    @property
    def task(self) -> Task:
        """What the rows train."""
        return "ranking" if "ranking" in self.name else "retrieval"

    @property
    def metric(self) -> str:
        """The metric that chooses."""
        return self.metrics[0]

    @property
    def store(self) -> str:
        """Name of the directory of the preprocessed data; in ranking its events have running statistics."""
        return self.dataset + "-running" * (self.task == "ranking")

    @property
    def rows(self) -> tuple[Row, ...]:
        """The reference, the other gin files, and the peers."""
        files = {name_of(file): file for file in sorted(self.folder.glob("*.gin"))}
        names = sorted(files, key=lambda name: name != self.reference)
        trials = {self.reference: self.trials}
        own = (Row(name=name, config=files[name], trials=trials.get(name, "")) for name in names)
        return (*own, *(self._peer(name, **peer) for name, peer in self.peers.items()))

    def row(self, name: str) -> Row:
        """The row of this name. Raises ConfigError if there is none."""
        return find("row", name, {row.name: row for row in self.rows})

    def _peer(
        self, name: str, *, trials: int | str = "", method: str = "", only: int | None = None,
        train_fraction: float | None = None, settings: Mapping[str, float] | None = None, command: Sequence[str] = (),
    ) -> Row:  # fmt: skip
        """A method of retrieval_peers.py (``only``: the one of its trials that validation chose on ML-100K;
        ``train_fraction``: the share of events before a cut in time), one of ranking_peers.py (``settings``: the best
        of the trials on the validation users of seed 1), or any ``command``.
        """
        cut = [] if train_fraction is None else ["--train_fraction", str(train_fraction)]
        words = ["--seed", "$seed", "--method", method, *cut, *_WRITES]
        words += ["--settings", json.dumps(settings)] if settings else []
        if self.task == "retrieval":
            chosen = [] if only is None else ["--trials", str(only)]
            words = ["--peers", name, "--seed", "$seed", *chosen, *cut, *_WRITES]
        own = (f"scripts/quality/{self.task}_peers.py", "--store", "$store", *words)
        return Row(name=name, peer=command or own, trials=trials)


def name_of(file: Path) -> str:
    """The name of a row: the first line of its gin file."""
    return file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def find(kind: str, name: str, known: Mapping[str, T]) -> T:
    """The one of this name. Raises ConfigError with those that there are."""
    if name not in known:
        raise ConfigError(f"there is no {kind} {name!r}{did_you_mean(name, known)}; choose from: {', '.join(known)}")
    return known[name]


def read_tables() -> dict[str, Table]:
    """All tables by name."""
    files = sorted(CONFIGS.glob("*/table.json"))
    return {file.parent.name: Table(folder=file.parent, **json.loads(file.read_text("utf-8"))) for file in files}


TABLES = read_tables()
