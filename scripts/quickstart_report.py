"""Print the results of a run: its last metrics, of retrieval with the popularity baseline and recommendations.

python scripts/quickstart_report.py --run_dir runs/quickstart
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tabulate import tabulate

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hstu import api
from hstu.base.errors import EXIT_DONE, DataError
from hstu.base.json_shape import check_shape
from hstu.config.args import DatasetArgs, RetrievalArgs
from hstu.config.args.task import AT_LAST_EVENT
from hstu.config.cli import tool
from hstu.data.batches.jagged import ranges
from hstu.data.sampling.samples import SampleTable, build_samples
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore
from hstu.observe.logging import quiet_libraries
from hstu.train.metrics import retrieval_metrics

_USERS = 3


def print_metrics(trained: api.TrainedModel, metrics: dict[str, float]) -> None:
    """Print the last test metrics and those of the popularity baseline on the same users and items."""
    config, store = trained.config, trained.store
    assert isinstance(config.dataset, DatasetArgs) and isinstance(config.task_args, RetrievalArgs)
    train, test = (build_samples(store, config.dataset, "retrieval", split, 0) for split in ("train", "test"))
    names = config.task_args.eval_metrics
    popularity = popularity_baseline(store, train, test, names)
    print(f"\nLast item of {len(test)} users, found among all {store.cardinality(store.item_feature)} items")
    print("(items that the user has seen are left out)\n")
    rows = [("HSTU", *(metrics[name] for name in names))]
    if (at_last_event := [metrics.get(f"{name}/{AT_LAST_EVENT}") for name in names])[0] is not None:
        rows = [("HSTU, told the time of the request", *rows[0][1:]), ("HSTU, asked at the last event", *at_last_event)]
    rows.append(("popularity", *(popularity[name] for name in names)))
    print(tabulate(rows, headers=("", *names), tablefmt="plain", floatfmt=".4f"))


def popularity_baseline(
    store: SequenceStore, train: SampleTable, test: SampleTable, metric_names: Sequence[str]
) -> dict[str, float]:
    """Retrieval metrics of ranking the corpus by the number of training events, seen items removed. Ties get midranks.

    ``train`` and ``test`` are samples of a leave-one-out split. Events that truncation hides from the model also count.
    """
    items = np.asarray(store.sequence(store.item_feature))
    counts = np.bincount(
        items[ranges(train.history_begin, train.stop - train.history_begin)],
        minlength=store.cardinality(store.item_feature),
    )
    return retrieval_metrics(metric_names, _popularity_ranks(counts, items, test))


def _popularity_ranks(counts: np.ndarray, items: np.ndarray, test: SampleTable) -> np.ndarray:
    """float64 [S]: rank of each held-out item by ``counts`` [corpus] among the items unseen by the user."""
    if test.target is None:
        raise ValueError("the samples have no held-out items; they must be an evaluation split of leave_one_out")
    ranks = np.empty(len(test))
    for row, (begin, target) in enumerate(zip(test.history_begin, test.target, strict=True)):
        own, rivals = counts[items[target]], counts.copy()
        rivals[items[begin : target + 1]] = -1
        ranks[row] = 1 + (rivals > own).sum() + (rivals == own).sum() / 2
    return ranks


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, required=True)
    run_dir = parser.parse_args(arguments).run_dir
    quiet_libraries()
    summary_file = run_dir / "summary.json"
    if not summary_file.is_file():
        raise DataError(f"{summary_file} does not exist: the training has not finished")
    trained = api.load(run_dir)
    task, store = trained.config.task_args, trained.store
    try:
        summary = json.loads(summary_file.read_text(encoding="utf-8"))
        check_shape(summary, {"last_metrics": {str: {str: float | None}}})
        check_shape(summary, {"last_metrics": {"test?": dict.fromkeys(task.eval_metrics, float)}})
    except ValueError as error:
        raise DataError(f"{summary_file} is damaged ({error}); scripts/evaluate.py measures the model again") from error
    metrics = summary["last_metrics"]
    leaves_one_out = store.split is None and trained.dataset.split != "time"
    leaves_one_out &= store.path == trained.with_data().eval_store.path
    if isinstance(task, RetrievalArgs) and task.filter_seen and leaves_one_out and "test" in metrics:
        print_metrics(trained, metrics.pop("test"))
    for split, values in metrics.items():
        print(f"\n{split}: " + "  ".join(f"{name} {value}" for name, value in values.items()))
    print(f"\nLearning curve: {run_dir / 'curves.png'}")
    if isinstance(task, RetrievalArgs):
        print(api.format_recommendations(trained.recommend(store.raw_ids(USER_FEATURE)[:_USERS].tolist())))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
