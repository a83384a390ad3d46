"""Print the results of the quick start: metrics and the popularity baseline, the curve, recommendations.

python scripts/quickstart_report.py --run_dir runs/quickstart
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hstu import api
from hstu.base.errors import EXIT_DONE, ConfigError, DataError
from hstu.config.args import DatasetArgs, RetrievalArgs
from hstu.config.tool import tool
from hstu.data.sampling.samples import build_samples
from hstu.observe.logging import quiet_libraries
from hstu.train.baselines import popularity_baseline

FIRST_USERS = ("1", "2", "3")


def print_metrics(trained: api.TrainedModel, metrics: dict[str, float]) -> None:
    """Print the last test metrics and those of the popularity baseline on the same users and items."""
    config, store = trained.config, trained.store
    if not isinstance(config.dataset, DatasetArgs) or not isinstance(config.task_args, RetrievalArgs):
        raise ConfigError("the report needs a retrieval run on real data")
    train, test = (build_samples(store, config.dataset, "retrieval", split, 0) for split in ("train", "test"))
    names = config.task_args.eval_metrics
    popularity = popularity_baseline(store, train, test, names)
    print(f"\nLast item of {len(test)} users, found among all {store.cardinality(store.item_feature)} items")
    print("(items that the user has seen are left out)\n")
    print(f"  {'':<12}" + "".join(f"{name:>10}" for name in names))
    for label, values in (("HSTU", metrics), ("popularity", popularity)):
        print(f"  {label:<12}" + "".join(f"{values[name]:>10.4f}" for name in names))


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
    print_metrics(trained, json.loads(summary_file.read_text())["last_metrics"]["test"])
    print(f"\nLearning curve: {run_dir / 'curves.png'}")
    print(api.format_recommendations(trained.recommend(FIRST_USERS)))
    return EXIT_DONE


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
