"""Evaluate a checkpoint on the test split, once, and write the metrics as JSON.

    python scripts/quality/evaluate.py --ckpt checkpoints/a/best --output test.json

Metrics AUC>=K of ranking are also given by the number of earlier events in the sample: "AUC>=4, 1-20" and so on.
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
from hstu.train.evaluate import RankingEvaluator
from scripts.quality.ratings import in_parts


def by_place(evaluation: Evaluation) -> dict[str, float]:
    """AUC>=K over the parts of the test samples; {} for a task or a configuration without such a metric."""
    if not isinstance(evaluation.evaluator, RankingEvaluator):
        return {}
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
    options = parser.parse_args(arguments)
    quiet_libraries()
    evaluation = evaluate_split(LoadedModel.load(options.ckpt), "test")
    metrics = evaluation.metrics() | by_place(evaluation)
    options.output.write_text(json.dumps({"metrics": metrics}) + "\n")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
