"""Evaluate a checkpoint of ranking on the test split, once, and write the metrics as JSON.

    python scripts/quality/evaluate.py --ckpt checkpoints/a/best --output test.json --per_user users.csv

The checkpoint predicts stars as classes, with the metric AUC>=4. Metrics AUC>=K are also given by the number of earlier
events in the sample: "AUC>=4, 1-20" and so on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hstu.base.errors import EXIT_DONE
from hstu.config.cli import tool
from hstu.observe.logging import quiet_libraries
from hstu.serve.loaded import LoadedModel
from hstu.serve.predict import Evaluation, evaluate_split
from scripts.quality.ratings import LIKED, in_parts, influences


def by_place(evaluation: Evaluation) -> dict[str, float]:
    """AUC>=K over the parts of the test samples."""
    observations = evaluation.observations
    return {
        f"{name}, {part}": value
        for part, here in in_parts(observations.history)
        for name, value in evaluation.evaluator.metrics(observations.select(here)).items()
        if name.startswith("AUC>=")
    }


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, help="a checkpoint, whose configuration is used")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--per_user", type=Path, required=True, help="CSV file: the influence of each user on AUC>=4")
    options = parser.parse_args(arguments)
    quiet_libraries()
    loaded = LoadedModel.load(options.ckpt)
    evaluation = evaluate_split(loaded, "test")
    metrics = evaluation.metrics() | by_place(evaluation)
    rows = evaluation.rows(loaded).to_pandas()
    liked = [name for name in rows if name.startswith("p_") and int(name.removeprefix("p_")) >= LIKED]
    scores, is_liked = rows[liked].sum(axis=1).to_numpy(), rows["label"].to_numpy() >= LIKED
    influences(scores, is_liked, rows["user"].to_numpy()).to_csv(options.per_user)
    options.output.write_text(json.dumps({"metrics": metrics}) + "\n")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
