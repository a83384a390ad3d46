"""The loop over the parts of a stream. For each: append, evaluate yesterday's model, train, export.

Each step is a command that a user could type, in a process of its own. It is atomic, or goes on where it was stopped,
so a stream that is killed at any moment and started again does what is not done, and nothing twice:

    <run_dir>/store          all events so far
    <run_dir>/checkpoints    of the training, whose metrics are in <run_dir>/training
    <run_dir>/exports/00003  what changed with part 3; of the first part, the whole model
    <run_dir>/frozen         the model after part --frozen_after, with which the page compares
    <run_dir>/parts/00003    part.json (its files), the evaluations, output.txt, and, when it is done, result.json
    <run_dir>/stream.md      the page, with stream.png
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hstu.base.errors import UserError
from hstu.base.files import DirectoryLock, remove, replace_text
from hstu.base.processes import last_lines, start_python, stop
from hstu.checkpoint.find import GIN, locate
from hstu.config.args import DatasetArgs, Task
from hstu.config.gin_io import load_stored
from hstu.data.sampling.samples import build_samples
from hstu.data.sampling.splits import Period
from hstu.data.store.sequence_store import SequenceStore
from hstu.stream.events import changes_of, counts_of, popularity
from hstu.stream.parts import Source
from hstu.stream.report import write_page

_COUNTS = ("events", "users", "items")
_EVALUATED = ("users", "predictions", "metrics", "half_widths")


@dataclass(kw_only=True)
class Stream:
    """A stream in a directory, which only one process may work on. Raises ConfigError if another one does."""

    source: Source
    run_dir: Path
    task: Task
    gin_files: Sequence[str]
    gin_bindings: Sequence[str]
    preprocess: Sequence[str]
    """Arguments of the preprocessing that name the columns of the data."""
    scripts: Path
    train_on: str
    """TrainerArgs.continue_on of the parts after the first: new_events, or all so far."""
    epochs: float
    """Passes over them. The first part is trained on as the gin file says."""
    frozen_after: int
    ranks: int
    exports: bool
    most_scored: int | None
    """Events of a part to evaluate at most, drawn at random; None: all."""
    results: list[dict[str, Any]] = field(init=False)
    """Of the parts that are done, in order."""

    def __post_init__(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._lock = DirectoryLock(self.run_dir, "--run_dir")
        self._store, self._checkpoints = (self.run_dir / name for name in ("store", "checkpoints"))
        done = sorted((self.run_dir / "parts").glob("*/result.json"))
        self.results = [json.loads(file.read_text(encoding="utf-8")) for file in done]

    @property
    def taken(self) -> list[str]:
        """Names of the parts that are done, in their order."""
        return [result["name"] for result in self.results]

    def advance(self) -> bool:
        """Do the next part. False: none is there. Raises UserError if a step fails; the next call repeats the step."""
        folder = self.run_dir / "parts" / f"{len(self.results) + 1:05d}"
        begun, taken = folder / "part.json", self.taken
        if begun.exists():  # a part that was begun is finished before all others
            name = json.loads(begun.read_text(encoding="utf-8"))["name"]
        elif waiting := self.source.waiting(taken):
            name = waiting[0]
        else:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(begun, json.dumps({"name": name}) + "\n")
        self._finish(folder, name, self.source.fetch(name, taken, folder / "copies"))
        return True

    def _finish(self, folder: Path, name: str, files: Sequence[Path]) -> None:
        before: dict[str, Any] = self.results[-1] if self.results else {"newest": None, **dict.fromkeys(_COUNTS, 0)}
        counts: dict[str, Any] = {key: before[key] for key in (*_COUNTS, "newest")}
        result: dict[str, Any] = {"number": len(self.results) + 1, "name": name, "files": list(map(str, files))}
        seconds: dict[str, float] = {}
        if files:  # a part without a good event has none
            seconds["append"] = self._append(folder, files, is_first=before["newest"] is None)
            store = SequenceStore.open(self._store)
            counts = counts_of(store)
            seconds |= self._steps(folder, before["newest"], counts["newest"])
            result |= changes_of(store)
            for kind in ("evaluation", "frozen"):
                if (file := folder / f"{kind}.json").exists():
                    found = json.loads(file.read_text(encoding="utf-8"))
                    result[kind] = {key: found[key] for key in found if key in _EVALUATED}
            if self.task == "retrieval" and "evaluation" in result:
                config = load_stored(locate(self._checkpoints) / GIN)
                assert isinstance(config.dataset, DatasetArgs)
                period = Period(before["newest"] + 1, most=self.most_scored)  # by which the model was evaluated
                samples = build_samples(store, config.dataset, config.task, period, seed=0)
                result["popular"] = popularity(store, samples)
        result |= {**counts, "new": {key: counts[key] - before[key] for key in _COUNTS}, "seconds": seconds}
        result["done"] = int(time.time())
        replace_text(folder / "result.json", json.dumps(result, indent=1) + "\n")
        self.results.append(result)
        remove(folder / "copies")
        write_page(self.results, self.run_dir)

    def _steps(self, folder: Path, before: int | None, newest: int) -> dict[str, float]:
        """Do the steps after the append. Returns the seconds of each. ``before``, ``newest``: times of the newest event
        without this part and with it; None: this is the first part."""
        frozen, seconds = self.run_dir / "frozen", dict[str, float]()
        if before is not None and newest > before:  # ahead of the training, so that the model does not know the part
            seconds["evaluate"] = self._evaluate(folder / "evaluation.json", self._checkpoints, before + 1)
            if frozen.exists():
                seconds["frozen"] = self._evaluate(folder / "frozen.json", frozen, before + 1)
        seconds["train"] = self._train(folder, is_first=before is None)
        if self.exports:
            seconds["export"] = self._export(folder)
        if len(self.results) + 1 == self.frozen_after:
            self._run(folder, "export.py", "--ckpt", self._checkpoints, "--output", frozen, made=frozen)
        return seconds

    def _append(self, folder: Path, files: Sequence[Path], is_first: bool) -> float:
        append = [] if is_first else ["--append"]
        return self._run(folder, "preprocess_dataset.py", *self.preprocess, "--interactions", *files,
                         "--output", self._store, *append)  # fmt: skip

    def _evaluate(self, made: Path, model: Path, since: int) -> float:
        most = [] if self.most_scored is None else ["--most", self.most_scored]
        return self._run(made.parent, "evaluate.py", "--ckpt", model, "--data", self._store, "--since", since, *most,
                         "--output", made, made=made)  # fmt: skip

    def _train(self, folder: Path, is_first: bool) -> float:
        bindings = [
            *self.gin_bindings, f"DatasetArgs.dataset_path = {str(self._store)!r}", 'DatasetArgs.split = "none"',
            f"TrainerArgs.output_dir = {str(self.run_dir / 'training')!r}", "TrainerArgs.eval_interval = 0",
            f"TrainerArgs.ckpt_save_dir = {str(self._checkpoints)!r}", 'TrainerArgs.ckpt_load_dir = "auto"',
            f"TrainerArgs.continue_on = {self.train_on!r}", 'TrainerArgs.progress_bar = "off"',
        ]  # fmt: skip
        if not is_first:
            bindings.append(f"TrainerArgs.num_train_epochs = {self.epochs}")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", self.ranks]
        return self._run(folder, *(launcher if self.ranks > 1 else []), "-m", "hstu.entry", self.task,
                         "--gin-config-file", *self.gin_files, "--gin-bindings", *bindings)  # fmt: skip

    def _export(self, folder: Path) -> float:
        exports = self.run_dir / "exports"
        exports.mkdir(exist_ok=True)
        earlier = sorted(path for path in exports.glob("[0-9]*") if path.name < folder.name)
        delta = ["--delta", earlier[-1]] if earlier else []
        made = exports / folder.name
        return self._run(folder, "export.py", "--ckpt", self._checkpoints, "--output", made, "--program", "--data",
                         self._store, *delta, made=made)  # fmt: skip

    def _run(self, folder: Path, *command: object, made: Path | None = None) -> float:
        """Run a command unless it has ``made`` what it makes. Returns its seconds."""
        if made is not None and made.exists():
            return 0.0
        words = [str(word) for word in command]
        if words[0].endswith(".py"):
            words[0] = str(self.scripts / words[0])
        begun, output = time.monotonic(), folder / "output.txt"
        with output.open("ab") as file:
            file.write(f"$ {' '.join(words)}\n".encode())
            file.flush()
            child = start_python(words, file)
        try:
            code = child.wait()
        except BaseException:  # a stop signal
            stop([child])
            raise
        if code:
            text = f"a step of {folder} ended with exit code {code}. The end of {output}:\n{last_lines(output)}"
            raise UserError(text)
        return round(time.monotonic() - begun, 1)
