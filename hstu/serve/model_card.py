"""The model card of an exported directory, and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hstu.checkpoint.find import Run
from hstu.checkpoint.tensors import read_metadata
from hstu.config.args import DatasetArgs
from hstu.data.store.sequence_store import SequenceStore
from hstu.observe.records import EvalRecord, read_metrics
from hstu.serve.check import TOLERANCE, Change
from hstu.serve.contents import Contents
from hstu.serve.loaded import LoadedModel
from hstu.train.inference import StoredSource


@dataclass(frozen=True)
class TableError:
    """What a data type with fewer bits does to the rows of a table."""

    largest: float
    """Largest absolute difference of a number."""
    relative: float
    """Root of the mean square of the differences, divided by that of the numbers."""

    @classmethod
    def of(cls, exact: Tensor, stored: Tensor) -> TableError:
        """From rows [n, dim] before and after."""
        difference, size = stored - exact, float(exact.square().mean().sqrt())
        return cls(float(difference.abs().max()), float(difference.square().mean().sqrt()) / size if size else 0.0)


@dataclass(frozen=True)
class Measured:
    """How far a directory is from the model that it was made of."""

    difference: float
    """Largest difference of the program with tables in float32, see check.differences."""
    table_dtype: str
    tables: Mapping[str, TableError] = field(default_factory=dict)
    """Name → its error, where the data type is not float32."""
    change: Change | None = None
    """Change of the scores by that data type."""
    compiled: float | None = None
    """Largest difference of the scores of the compiled program. None: there is none."""

    def as_json(self) -> dict[str, Any]:
        """For serving.json."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"program: differs from the model by at most {self.difference:.1e} (tolerance {TOLERANCE:g})"]
        lines += [
            f"table {name}: {self.table_dtype}, relative error {error.relative:.2e}, largest {error.largest:.2e}"
            for name, error in self.tables.items()
        ]
        if self.change is not None:
            text = f"scores with these tables: changed by {self.change.mean:.1e} on average, "
            text += f"{self.change.largest:.1e} at most"
            kept = "" if self.change.kept is None else f"; of the ten best items {self.change.kept:.1%} stay"
            lines.append(text + kept)
        if self.compiled is not None:
            lines.append(f"compiled program: scores differ by at most {self.compiled:.1e}")
        return lines


@dataclass(frozen=True)
class CardFacts:
    """What is known of a checkpoint."""

    iteration: int
    metrics: tuple[tuple[str, int, Mapping[str, float]], ...]
    """(split, iteration, metric → value) of evaluations."""
    versions: Mapping[str, str]

    @classmethod
    def of(cls, checkpoint: Path) -> CardFacts:
        """With the last evaluation of each split, at this iteration if the run is there and has made one."""
        metadata = read_metadata(checkpoint)
        iteration, run = metadata["iteration"], Run.read(checkpoint)
        path = Path(run.directory) / "metrics.jsonl" if run else None
        records = read_metrics(path) if path is not None and path.is_file() else []
        found = [each for each in records if each["kind"] == "eval" and each["iter"] == iteration]
        history = metadata.get("carried", {}).get("history", [])
        last = [EvalRecord.from_json(each) for each in (history if isinstance(history, list) else history["last"])]
        evaluations = {each.split: (each.iteration, each.metrics) for each in last}
        evaluations |= {each["split"]: (iteration, each["metrics"]) for each in found}
        metrics = tuple((split, *evaluation) for split, evaluation in evaluations.items())
        return cls(iteration, metrics, metadata.get("versions", {}))


def model_card(trained: LoadedModel, contents: Contents, measured: Measured, card: CardFacts) -> str:
    """The card, in Markdown."""
    config, dataset, facts = trained.config, trained.config.dataset, contents.facts
    assert isinstance(dataset, DatasetArgs)
    purpose = (
        "recommends the next item of a user (retrieval)"
        if facts["task"] == "retrieval"
        else "predicts what a user does with given items (ranking)"
    )
    parts = [
        f"# HSTU model on {dataset.dataset_name}",
        f"This model {purpose}. It was trained with the HSTU trainer and exported from iteration {card.iteration:,}.",
        "## Data",
        _data(trained),
        "## Metrics",
        _metrics(card),
        "## Tables",
        _tables(contents, measured),
        "## Exactness",
        "\n".join(f"- {line}" for line in measured.lines()),
        "The requests were drawn at random, with known and unknown ids, and compared with the trainer in float32.",
        "## What a request has",
        _request(facts),
        "## Use",
        _USE.format(call="recommend(history, k=10)" if facts["task"] == "retrieval" else "score(history, [1, 2, 3])"),
        "## Limits",
        _LIMITS,
        "## Configuration",
        f"```\n{config.operative_gin().strip()}\n```",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in card.versions.items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


_USE = """Put this folder on the path of Python, in an environment with torch:

```python
import sys

sys.path.insert(0, "serving")  # this folder
import hstu_serving

model = hstu_serving.load("serving")
history = hstu_serving.History(items=[...])  # and what the table above names
print(model.{call})
```"""
_LIMITS = """- An id that is not in the vocabulary counts as unknown. New items are not recommended: export again.
- The model repeats what its data shows, with its gaps and its biases. Judge it on your own users before use."""


def _data(trained: LoadedModel) -> str:
    dataset, source = trained.config.dataset, trained.source
    assert isinstance(dataset, DatasetArgs)
    rows = [("dataset", dataset.dataset_name), ("newest items read of a user", f"{source.max_items:,}")]
    if isinstance(source, StoredSource):
        rows.append(("items", f"{source.cardinalities[source.roles.item]:,}"))
    else:
        store: SequenceStore = source.store
        items = source.cardinalities[source.roles.item]
        rows += [("users", f"{store.num_users:,}"), ("items", f"{items:,}"), ("events", f"{store.num_events:,}")]
    return _table(("", ""), rows)


def _metrics(card: CardFacts) -> str:
    if not card.metrics:
        return "The checkpoint has no record of an evaluation."
    rows = [
        (split, f"{iteration:,}", name, f"{value:.4f}")
        for split, iteration, values in card.metrics
        for name, value in values.items()
    ]
    return _table(("split", "iteration", "metric", "value"), rows)


def _tables(contents: Contents, measured: Measured) -> str:
    rows = [
        (name, f"{len(table):,}", str(table.shape[1]), measured.table_dtype) for name, table in contents.tables.items()
    ]
    return _table(("table", "rows", "width", "data type"), rows)


def _request(facts: Mapping[str, Any]) -> str:
    kinds = {name: entry["kind"] for name, entry in facts["features"].items()}
    rows = [("items", facts["item"], kinds[facts["item"]])]
    rows += [("actions", facts["action"], kinds[facts["action"]])] if facts["action"] else []
    rows += [("timestamps", "", "whole seconds since 1970")] if facts["reads_times"] else []
    rows += [("context", name, kinds[name]) for name in facts["contextual"]]
    for name in (*facts["side"], *facts["known_after"]):
        if kinds[name] != "time":
            rows.append(
                ("features", name, "a list of " + kinds[name] if facts["features"][name]["is_list"] else kinds[name])
            )
    rows += [("features", entry["name"], f"{entry['width']} number(s)") for entry in facts["numbers"]]
    return _table(("field of History", "feature", "values"), rows)


def _table(header: tuple[str, ...], rows: list[Any]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
