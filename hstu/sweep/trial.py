"""One setting, trained with one seed: its commands, and what its run directory tells when they are done."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hstu.base.errors import UserError
from hstu.config.args import DatasetArgs, Task
from hstu.config.gin_io import read_and_check
from hstu.config.gin_scan import scan
from hstu.config.rules import RULES
from hstu.config.run_config import RunConfig
from hstu.data.datasets import store_path
from hstu.data.rules import DATA_RULES
from hstu.data.store.sequence_store import SequenceStore
from hstu.observe.records import read_metrics

OWN = ("seed", "output_dir", "ckpt_save_dir", "ckpt_load_dir", "ckpt_save_interval", "ckpt_keep_last")
"""Parameters of TrainerArgs that a trial sets itself."""
_TESTED = "test.json"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A training of ``files`` and ``bindings`` on ``ranks``, and the evaluation of its best weights on the test part.

    ``root``: directory of all trials. ``evaluate``: a script that takes --ckpt and --output, and with ``per_user`` also
    --per_user, with further arguments.
    """

    name: str
    task: Task
    files: tuple[str, ...]
    bindings: tuple[str, ...]
    seed: int
    root: Path
    evaluate: tuple[str, ...]
    ranks: int = 1
    per_user: bool = False

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @cached_property
    def bound(self) -> dict[str, Any]:
        """Parameter that the files and bindings set → its value."""
        return {each.name: each.value for each in scan(self.files, self.bindings).bindings}

    @cached_property
    def settings(self) -> tuple[str, ...]:
        """``bound``, one line for each parameter."""
        own = {f"TrainerArgs.{name}" for name in OWN}
        return tuple(f"{name} = {value!r}" for name, value in sorted(self.bound.items()) if name not in own)

    @cached_property
    def config(self) -> RunConfig:
        """The checked configuration, without directories. Raises ConfigError."""
        return read_and_check(self.files, self._bindings(), self.task, self.ranks, (*RULES, *DATA_RULES))[0]

    @cached_property
    def folder(self) -> Path:
        """The run directory. Other settings, or other data, have another one."""
        dataset = self.config.dataset
        data = data_facts(store_path(dataset)) if isinstance(dataset, DatasetArgs) else None
        return run_directory(self.root, self.name, (*self.settings, str(data), str(self.ranks)), self.seed)

    def commands(self) -> Iterator[list[str]]:
        """The training and the evaluation, without what is done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.ranks)]
        launcher, checkpoints = launcher if self.ranks > 1 else [], self.folder / "checkpoints"
        trainer = self.config.trainer
        if self._summary is None:
            bindings = self._bindings(
                output_dir=str(self.folder), ckpt_save_dir=str(checkpoints), ckpt_load_dir="auto", ckpt_keep_last=2,
                ckpt_save_interval=trainer.ckpt_save_interval or trainer.eval_interval or 200,
            )  # fmt: skip
            files = ["--gin-config-file", *self.files]
            yield [*launcher, "-m", "hstu.entry", self.task, *files, "--gin-bindings", *bindings]
            if self._summary is None:
                raise UserError("the training was stopped before its end; the same command goes on with it")
        if not (self.folder / _TESTED).exists():
            best, per_user = checkpoints / ("best" if trainer.best_metric else ""), self.folder / "per_user.csv"
            per_user.unlink(missing_ok=True)  # of an evaluation that was killed
            more = ["--per_user", str(per_user)] if self.per_user else []
            yield [*launcher, *self.evaluate, "--ckpt", str(best), "--output", str(self.folder / _TESTED), *more]

    def result(self) -> dict[str, Any] | None:
        """Metrics of the test part and of the validation part (None: it has chosen nothing), iteration and epoch of the
        weights, epochs and seconds of the training, and (epoch, metrics) on validation. None: the trial is not done."""
        if (summary := self._summary) is None or not (self.folder / _TESTED).exists():
            return None
        file, best = self.folder / "metrics.jsonl", summary.get("best")
        records, attempts = read_metrics(file), file.read_text(encoding="utf-8").split('"kind": "resumed"')
        seconds = [re.findall(r'"time_s": ([\d.e-]+)', attempt)[-1:] for attempt in attempts]
        evaluations = [record for record in records if record["kind"] == "eval"]
        chosen = evaluations[-1]
        if best is not None:
            chosen = next(e for e in evaluations if (e["split"], e["iter"]) == (best["split"], best["iter"]))
        tested = json.loads((self.folder / _TESTED).read_text(encoding="utf-8"))
        return {
            "metrics": tested["metrics"], "half_widths": tested.get("half_widths", {}),
            "validation": None if best is None else chosen["metrics"],
            "iteration": chosen["iter"], "epoch": chosen["epoch"], "epochs": max(each["epoch"] for each in records),
            "seconds": round(sum(float(last) for lasts in seconds for last in lasts), 1),
            "curve": [(each["epoch"], each["metrics"]) for each in evaluations if each["split"] == "valid"],
        }  # fmt: skip

    def outcome(self) -> str | None:
        """The metric on the validation part and on the test part. None: the trial is not done."""
        if (result := self.result()) is None:
            return None
        metric = str(self.config.trainer.best_metric)
        found = ((result[part] or {}).get(metric) for part in ("validation", "metrics"))
        valid, test = ("undefined" if value is None else number(value) for value in found)
        return f"{metric} valid {valid} at iteration {result['iteration']}, test {test}"

    @property
    def _summary(self) -> dict[str, Any] | None:
        """summary.json of a training that has come to its end."""
        file = self.folder / "summary.json"
        summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return summary if summary.get("status") in ("done", "stopped early") else None

    def _bindings(self, **more: Any) -> list[str]:
        own = {"seed": self.seed, "output_dir": None, "ckpt_save_dir": None, "ckpt_load_dir": "", **more}
        return [*self.bindings, *(f"TrainerArgs.{name} = {value!r}" for name, value in own.items())]


def run_directory(root: Path, name: str, made_of: Sequence[str], seed: int) -> Path:
    """The directory of a name, of all that its results depend on, and of a seed."""
    key = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:8]
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")[:80]
    return root / f"{slug}-{key}" / f"seed{seed}"


def data_facts(store: Path) -> dict[str, int] | None:
    """Sizes by which one preprocessed dataset differs from another of its name; None if there is none."""
    if not store.is_dir():
        return None
    opened = SequenceStore.open(store)
    items, events = opened.cardinality(opened.item_feature), int(opened.offsets()[-1])
    return {"users": opened.num_users, "items": items, "events": events}


def number(mean: float, error: float = math.nan, sign: bool = False) -> str:
    """``.1234 ± .0012``; without the error if it is nan, and empty if the mean is."""
    if math.isnan(mean):
        return ""
    text = (f"{mean:+.4f}" if sign else f"{mean:.4f}").replace("-", "−")
    text = text.replace("0.", ".", 1) if abs(mean) < 1 else text
    return text if math.isnan(error) else f"{text} ± {number(error)}"
