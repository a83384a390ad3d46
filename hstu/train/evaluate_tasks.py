"""Evaluation of ranking tasks that the user defines (RankingArgs.tasks): the metrics of each, as "AUC/click"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from hstu.config.args import RankingTaskArgs
from hstu.data.batches.batch import HSTUBatch
from hstu.model.gr_model import GRModel
from hstu.model.tasks import RankingTask
from hstu.parallel.mesh import Mesh
from hstu.train.evaluate import Evaluator, evaluation_mode
from hstu.train.observations import Observations, of_ranking
from hstu.train.task_metrics import TaskMetrics


class MultiTaskEvaluator(Evaluator):
    """Metrics of each task over its labelled items. Items without a label count for the other tasks alone.

    ``args``: what is measured. Tasks that are not in it are not measured.
    """

    def __init__(
        self,
        model: GRModel,
        tasks: Iterable[RankingTask],
        args: Sequence[RankingTaskArgs],
        mesh: Mesh,
        max_iters: int | None = None,
    ) -> None:
        super().__init__(model, mesh, max_iters)
        self.tasks: Sequence[RankingTask] = list(tasks)
        self.args = {each.task_name: each for each in args}

    def observe(self, batches: Iterable[HSTUBatch]) -> Observations:
        """See Evaluator."""
        width = sum(task.num_predictions for task in self.tasks)
        found = [Observations.none(np.zeros((0, width), dtype=np.float32), np.zeros((0, 1), dtype=np.float32))]
        requests_before = 0
        with evaluation_mode(self.model):
            for batch in self._limited(batches):
                predictions = self.forward(batch).logits
                assert predictions is not None and batch.label_values is not None
                # No two ranks have a request of the same number.
                requests = (requests_before + np.arange(batch.batch_size)) * self.mesh.world_size + self.mesh.rank
                requests_before += batch.batch_size
                labels = np.ascontiguousarray(batch.label_values.numpy().T)
                item = self.model.roles.item
                found.append(of_ranking(batch, item, predictions.cpu().numpy(), labels, requests))
        return Observations.joined(found[1:] or found).gathered(self._gather)

    def metrics(self, observations: Observations) -> dict[str, float]:
        """See Evaluator."""
        results: dict[str, float] = {}
        labels = torch.from_numpy(observations.labels.T)
        ends = np.cumsum([task.num_predictions for task in self.tasks])[:-1]
        of_tasks = np.split(observations.results, ends, axis=1)
        for task, predictions in zip(self.tasks, of_tasks, strict=True):
            args = self.args.get(task.args.task_name)
            if args is None:
                continue
            metrics = TaskMetrics(args.metrics_in_force, args.kind, task=args.task_name, label_offset=task.first_class)
            if len(observations):
                metrics.update(
                    predictions.squeeze(1) if task.num_predictions == 1 else predictions,
                    task.labels(labels).numpy(),
                    observations.users,
                    observations.requests,
                )
            results |= {f"{name}/{args.task_name}": value for name, value in metrics.compute().items()}
        return results
