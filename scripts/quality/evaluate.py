"""Evaluate a checkpoint on the test split, once, and write the metrics as JSON.

    python scripts/quality/evaluate.py --checkpoint runs/a/checkpoints/best --output test.json

Metrics AUC>=K of ranking are also given by the number of earlier events in the sample: "AUC>=4, 1-20" and so on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from hstu import api
from hstu.config.errors import EXIT_DONE
from hstu.config.tool import tool
from hstu.data.jagged import run_indices
from hstu.observe.logging import quiet_libraries
from hstu.train.builder import build_evaluator
from hstu.train.evaluate import RankingEvaluator
from hstu.train.metrics import RankingMetrics
from scripts.quality.ratings import PARTS, in_parts


def by_place(trained: api.TrainedModel) -> dict[str, float]:
    """AUC>=K over the parts of the test samples; {} for a task or a configuration without such a metric."""
    evaluator = build_evaluator(trained.config, trained.source, trained.model, trained.mesh)
    names = [name for name in trained.config.task_args.eval_metrics if name.startswith("AUC>=")]
    if not names or not isinstance(evaluator, RankingEvaluator):
        return {}
    parts = {part: RankingMetrics(names, num_tasks=None, label_offset=evaluator.label_offset) for part in PARTS}
    for batch in trained.batches("test"):
        num_labels = batch.num_labels.numpy()
        place = run_indices(num_labels)[1] + np.repeat(batch.item_lengths - num_labels, num_labels)
        logits, users = trained.forward(batch).logits, np.repeat(batch.user_ids.numpy(), num_labels)
        assert logits is not None, "the model has no ranking head"
        for part, here in in_parts(place):
            parts[part].update(logits.numpy()[here], batch.labels.numpy()[here], users[here])
    return {f"{name}, {part}": value for part, found in parts.items() for name, value in found.compute().items()}


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, whose configuration is used")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    quiet_libraries()
    trained = api.load(options.checkpoint)
    metrics = trained.evaluate("test") | by_place(trained)
    options.output.write_text(json.dumps({"metrics": metrics}) + "\n")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
