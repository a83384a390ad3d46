"""Evaluation as the trainer sees it: batches in, metrics out, the same on every rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np
from torch import Tensor

from hstu.config.args import RankingArgs, RetrievalArgs
from hstu.data.batch import HSTUBatch
from hstu.model.gr_model import GRModel
from hstu.parallel.collectives import gather_objects
from hstu.parallel.mesh import Mesh
from hstu.train.evaluate import Corpus, evaluate_ranking, evaluate_retrieval
from hstu.train.metrics import RankingMetrics
from hstu.train.sources import BatchSource
from hstu.train.tables import is_dynamic


class Evaluator(ABC):
    """Evaluates the model as it stands; collective."""

    def __init__(self, model: GRModel, mesh: Mesh, max_iters: int | None) -> None:
        self.model = model
        self.mesh = mesh
        self.max_iters = max_iters
        self.between_batches: Callable[[], None] = lambda: None
        """Called before every batch, and before every chunk of the corpus, on all ranks alike; may raise."""

    @abstractmethod
    def evaluate(self, batches: Iterable[HSTUBatch]) -> dict[str, float]:
        """Metrics over the batches of all ranks, at most max_eval_iters of each."""

    def _limited(self, batches: Iterable[HSTUBatch]) -> Iterator[HSTUBatch]:
        for batch in islice(batches, self.max_iters):
            self.mesh.progress.mark()
            self.between_batches()
            yield batch

    def _gather(self, array: np.ndarray) -> np.ndarray:
        return np.concatenate(gather_objects(array, self.mesh.world_group))


class RankingEvaluator(Evaluator):
    """Metrics of the predicted actions."""

    def __init__(
        self, model: GRModel, args: RankingArgs, label_offset: int, mesh: Mesh, max_iters: int | None = None
    ) -> None:
        super().__init__(model, mesh, max_iters)
        self.names = args.eval_metrics
        self.num_tasks = args.num_tasks if args.prediction_head_arch[-1] == args.num_tasks else None
        self.label_offset = label_offset

    def evaluate(self, batches: Iterable[HSTUBatch]) -> dict[str, float]:
        """See Evaluator."""
        metrics = RankingMetrics(self.names, num_tasks=self.num_tasks, label_offset=self.label_offset)
        return evaluate_ranking(self.model, self._limited(batches), metrics, self.mesh.device, self._gather)


class RetrievalEvaluator(Evaluator):
    """Ranks of the held-out items in the whole corpus."""

    def __init__(
        self, model: GRModel, args: RetrievalArgs, source: BatchSource, mesh: Mesh, max_iters: int | None = None
    ) -> None:
        super().__init__(model, mesh, max_iters)
        self.args = args
        self.corpus_size = source.cardinalities[source.roles.item]
        self.absent_are_zero = is_dynamic(source.tables, source.roles.item)

    def evaluate(self, batches: Iterable[HSTUBatch]) -> dict[str, float]:
        """See Evaluator."""
        return evaluate_retrieval(
            self.model, self._limited(batches), self.corpus(), self.args.eval_metrics, self._gather
        )

    def corpus(self) -> Corpus:
        """All items of the data, as ``recommend`` takes them."""
        return Corpus(
            self.embed_items,
            self.corpus_size,
            self.args.l2_norm_eps,
            self.mesh.device,
            absent_are_zero=self.absent_are_zero,
        )

    def embed_items(self, codes: Tensor) -> Tensor:
        """Rows of the item table for item codes; collective where the table is sharded."""
        self.mesh.progress.mark()
        self.between_batches()
        return self.model.embed_items(codes)
