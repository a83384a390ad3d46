"""Evaluation of ranking tasks that the user defines (RankingArgs.tasks): the metrics of each, as "AUC/click"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from hstu.data.batch import HSTUBatch
from hstu.model.gr_model import GRModel
from hstu.model.tasks import RankingTask
from hstu.parallel.mesh import Mesh
from hstu.train.evaluate import Evaluator, evaluation_mode
from hstu.train.task_metrics import TaskMetrics


class MultiTaskEvaluator(Evaluator):
    """Metrics of each task over its labelled items. Items without a label count for the other tasks alone."""

    def __init__(self, model: GRModel, tasks: Iterable[RankingTask], mesh: Mesh, max_iters: int | None = None) -> None:
        super().__init__(model, mesh, max_iters)
        self.tasks: Sequence[RankingTask] = list(tasks)

    def evaluate(self, batches: Iterable[HSTUBatch]) -> dict[str, float]:
        """See Evaluator."""
        collected = [
            TaskMetrics(
                task.args.metrics_in_force, task.args.kind, task=task.args.task_name, label_offset=task.first_class
            )
            for task in self.tasks
        ]
        requests_before = 0
        with evaluation_mode(self.model):
            for batch in self._limited(batches):
                predictions = self.forward(batch).logits
                assert predictions is not None and batch.label_values is not None
                num_labels = batch.num_labels.numpy()
                users = np.repeat(batch.user_ids.numpy(), num_labels)
                # No two ranks have a request of the same number.
                rows = (requests_before + np.arange(batch.batch_size)) * self.mesh.world_size + self.mesh.rank
                requests_before += batch.batch_size
                of_tasks = predictions.cpu().split([task.num_predictions for task in self.tasks], dim=1)
                for task, metrics, own in zip(self.tasks, collected, of_tasks, strict=True):
                    labels, bounds = task.labels(batch.label_values), task.bounds(batch.label_values)
                    metrics.update(
                        own.squeeze(1).numpy(),
                        labels.numpy(),
                        users,
                        np.repeat(rows, num_labels),
                        None if bounds is None else bounds.numpy(),
                    )
        return {
            f"{name}/{task.args.task_name}": value
            for task, metrics in zip(self.tasks, collected, strict=True)
            for name, value in metrics.compute(self._gather).items()
        }
