"""Evaluation of ranking and, against the whole corpus, of retrieval. All ranks call these functions together.

Evaluators first collect Observations, one row per prediction of this rank, then compute metrics from the rows of all
ranks, or from some rows. Ranks have equally many batches, some of which may hold only padding.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import chain, islice
from typing import Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp

from hstu.base.hashing import hash_ids
from hstu.config.args import RankingArgs, RetrievalArgs
from hstu.config.args.task import AT_LAST_EVENT
from hstu.config.rules.task import tasks_of
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch
from hstu.data.batches.jagged import ranges, run_indices
from hstu.model.gr_model import GRModel
from hstu.model.ranking import MultiTaskDense, RankingDense, RankingTask
from hstu.model.stack import ModelOutput
from hstu.parallel.data_parallel import unwrap_dense
from hstu.parallel.exchange import ALONE, Exchange, on_host
from hstu.parallel.group import evaluate_batch
from hstu.parallel.mesh import Mesh
from hstu.parallel.tables import dynamic_tables
from hstu.train.batch_source import BatchSource
from hstu.train.corpus import Corpus, Queries, target_ranks
from hstu.train.metrics import retrieval_metrics
from hstu.train.task_metrics import TaskMetrics, ranking_metrics

log = logging.getLogger(__name__)

GATHERED_ROWS = 1 << 20
"""Most predictions of all ranks that each gathers, to compute the metrics of one process bit for bit."""
ROUND_NUMBERS = 1 << 22
"""Seen items of the queries that a rank ranks at once, about 0.5 GiB with what the ranking adds. Each round embeds the
corpus. A query counts as _NUMBERS_PER_QUERY of them."""
_NUMBERS_PER_QUERY = 32
NEW = {"new_users": "users", "new_items": "items"}
"""Name in ``BatchSource.newcomers`` → column of Observations."""


@dataclass(frozen=True)
class Observations:
    """N predictions: one per labelled item (ranking) or per held-out item (retrieval)."""

    users: np.ndarray
    """int64 [N]: the users' rows in the evaluated store."""
    items: np.ndarray
    """int64 [N]: the model's id of the labelled or held-out item."""
    history: np.ndarray
    """int64 [N]: number of events before the item that the model reads."""
    requests: np.ndarray
    """int64 [N]: a number that is unique per sequence."""
    results: np.ndarray
    """Ranking: float32 [N, width], predictions. Retrieval: float64 [N, queries], ranks of held-out items. The queries
    are at the time of the request and, if the model reads that time, at the time of the last event."""
    labels: np.ndarray
    """Ranking: int64 [N] actions, or float32 [N, L] like HSTUBatch.label_values. Retrieval: scores, like results."""
    events: np.ndarray
    """int64 [N]: the labelled or held-out event in the store, or the candidate of a request; -1 if unknown."""

    def __len__(self) -> int:
        return len(self.users)

    def select(self, rows: np.ndarray) -> Self:
        """Select rows by bool [N], or by indices, which may repeat."""
        return type(self)(*(column[rows] for column in self.columns()))

    def columns(self) -> list[np.ndarray]:
        """The arguments of the class."""
        return [getattr(self, field.name) for field in fields(self)]

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """The rows of all parts."""
        return cls(*map(np.concatenate, zip(*(part.columns() for part in parts), strict=True)))


def of_ranking(
    batch: HSTUBatch, item_feature: str, predictions: np.ndarray, labels: np.ndarray, requests: np.ndarray
) -> Observations:
    """The labelled items of a batch on the host. requests: int64 [B], a number per sequence."""
    num_labels = batch.num_labels.numpy()
    sequence, index = run_indices(num_labels)
    first = batch.item_lengths - num_labels
    starts = np.cumsum(batch.item_lengths) - num_labels
    # Candidates do not attend to each other: each has the history before the first candidate.
    history = np.minimum(first[sequence] + index, (batch.item_lengths - batch.num_candidates_host)[sequence])
    oldest = None if batch.target_events is None else batch.target_events.numpy() - num_labels + 1
    return Observations(
        users=batch.user_ids.numpy()[sequence],
        items=batch.features[item_feature].values().numpy()[ranges(starts, num_labels)],
        history=history,
        requests=requests[sequence],
        results=predictions.astype(np.float32),
        labels=labels,
        events=np.full_like(index, -1) if oldest is None else oldest[sequence] + index,
    )


class Evaluator(ABC):
    """Computes metrics, equal on all ranks, over at most ``max_eval_iters`` batches per rank. Collective."""

    def __init__(self, config: RunConfig, model: GRModel, mesh: Mesh) -> None:
        self.config = config
        self.model = model
        self.mesh = mesh
        self.exchange = Exchange.of(mesh)
        self.between_batches: Callable[[], None] = lambda: None
        """Called on all ranks before every batch and every chunk of the corpus; may raise on all ranks."""

    @cached_property
    def newcomers(self) -> Mapping[str, np.ndarray]:
        """See BatchSource. Their metrics stand apart, as HR@10/new_users, where there are any. May be replaced."""
        return {}

    def evaluate(self, batches: Iterable[HSTUBatch]) -> dict[str, float]:
        """Metrics over the batches of all ranks."""
        return self.metrics_of_all(self.observe(batches))

    @abstractmethod
    def observe(self, batches: Iterable[HSTUBatch]) -> Observations:
        """This rank's predictions for its batches. Collective."""

    def metrics_of_all(self, observations: Observations) -> dict[str, float]:
        """Metrics of the predictions of all ranks, and of those for each of ``newcomers``. Collective."""
        exchange = ALONE
        if self.exchange.total(len(observations)) <= GATHERED_ROWS:
            observations = Observations(*map(self.exchange.gathered, observations.columns()))
        else:
            exchange, owners = self.exchange, hash_ids(observations.users, self.exchange.size)
            observations = Observations(*exchange.to_owners(owners, *observations.columns()))
        found = self.metrics(observations, exchange)
        for group, is_new in self.new_rows(observations).items():
            if exchange.total(is_new.sum()):
                for name, value in self.metrics(observations.select(is_new), exchange).items():
                    metric, clock, _ = name.partition(f"/{AT_LAST_EVENT}")
                    found[f"{metric}/{group}{clock}"] = value
        return found

    @abstractmethod
    def metrics(self, observations: Observations, exchange: Exchange = ALONE) -> dict[str, float]:
        """Compute metrics of the observations of all ranks of ``exchange``; those of a user are on one of them."""

    def new_rows(self, observations: Observations) -> dict[str, np.ndarray]:
        """Each of ``newcomers`` → whether the observations are of new users, or of new items: bool [N]."""
        return {group: np.isin(getattr(observations, NEW[group]), new) for group, new in self.newcomers.items()}

    def forward(self, batch: HSTUBatch) -> ModelOutput:
        """Output for a batch on the host, computed by this rank or by its tensor- and context-parallel group."""
        return evaluate_batch(self.model, batch, self.mesh)

    def _limited(self, batches: Iterable[HSTUBatch]) -> Iterator[HSTUBatch]:
        for batch in islice(batches, self.config.trainer.max_eval_iters):
            self._mark()
            yield batch

    def _mark(self) -> None:
        self.mesh.heartbeat.mark()
        self.between_batches()


class RankingEvaluator(Evaluator):
    """Metrics of the predicted actions of labelled items."""

    def observe(self, batches: Iterable[HSTUBatch]) -> Observations:
        """See Evaluator."""
        nothing = np.zeros(0, dtype=np.int64)
        no_results = np.zeros((0, 1), dtype=np.float32)
        found = [Observations(nothing, nothing, nothing, nothing, no_results, nothing, nothing)]
        requests_before = 0
        with evaluation_mode(self.model):
            for batch in self._limited(batches):
                logits = self.forward(batch).logits
                assert logits is not None, "the model has no ranking head"
                requests = (requests_before + np.arange(batch.batch_size)) * self.mesh.world_size + self.mesh.rank
                requests_before += batch.batch_size
                labels = batch.labels if batch.label_values is None else batch.label_values.T.contiguous()
                found.append(of_ranking(batch, self.model.roles.item, on_host(logits), on_host(labels), requests))
        return Observations.joined(found[1:] or found)

    def metrics(self, observations: Observations, exchange: Exchange = ALONE) -> dict[str, float]:
        """See Evaluator."""
        args, task = cast(RankingArgs, self.config.task_args), cast(RankingDense, unwrap_dense(self.model).task)
        num_tasks = task.num_tasks if task.is_multi_task else None
        rows = observations.results, observations.labels, observations.users
        return ranking_metrics(
            args.eval_metrics, *rows, num_tasks=num_tasks, label_offset=task.label_offset, exchange=exchange
        )


class MultiTaskEvaluator(RankingEvaluator):
    """Metrics of each of RankingArgs.tasks over the items with a label of this task, named as "AUC/click"."""

    @property
    def tasks(self) -> list[RankingTask]:
        """The tasks of the model. RankingArgs.tasks may leave out some of them."""
        return cast(MultiTaskDense, unwrap_dense(self.model).task).each_task

    def metrics(self, observations: Observations, exchange: Exchange = ALONE) -> dict[str, float]:
        """See Evaluator."""
        results: dict[str, float] = {}
        labels = torch.from_numpy(observations.labels.T)
        evaluated = {each.task_name: each for each in tasks_of(self.config)}
        ends = np.cumsum([task.args.output_width for task in self.tasks])[:-1]
        of_tasks = np.split(observations.results, ends, axis=1)
        for task, predictions in zip(self.tasks, of_tasks, strict=True):
            args = evaluated.get(task.args.task_name)
            if args is None:
                continue
            metrics = TaskMetrics(
                args.metrics_in_force, args.kind, task=args.task_name, label_offset=task.first_class, exchange=exchange
            )
            # Without a batch on any rank, nothing has the width of its rows.
            of_task = task.labels(labels).numpy() if exchange.total(len(observations)) else np.zeros(0)
            rows = predictions, of_task, observations.users, observations.requests
            results |= {f"{name}/{args.task_name}": value for name, value in metrics.compute(*rows).items()}
        return results


class RetrievalEvaluator(Evaluator):
    """Metrics of the ranks of the held-out items in the whole corpus."""

    def __init__(self, config: RunConfig, model: GRModel, mesh: Mesh, source: BatchSource) -> None:
        super().__init__(config, model, mesh)
        self.args = cast(RetrievalArgs, config.task_args)
        self.source = source
        self._warnings: set[str] = set()

    @cached_property
    def newcomers(self) -> Mapping[str, np.ndarray]:
        """See Evaluator."""
        return self.source.newcomers

    def observe(self, batches: Iterable[HSTUBatch]) -> Observations:
        """See Evaluator. The corpus loses a user's ``seen`` items, also the held-out item: it is then a miss."""
        corpus, found, num_seen, pending = self.corpus(), [], 0, self._limited(batches)
        rounds = chain([pending], (chain([batch], pending) for batch in pending))
        with evaluation_mode(self.model):
            for some in rounds:
                queries, clocks, events, history = self._collect_queries(some, corpus.ids.device)
                of_targets = target_ranks(queries, corpus, self.exchange)
                ranks, scores = (each.reshape(clocks, len(events)).T for each in of_targets)
                users, targets = queries.user_ids[: len(events)], queries.targets[: len(events)]
                found.append(Observations(users, targets, history, events, ranks, scores, events))
                num_seen += queries.is_target_seen[: len(events)].sum()
        observations = Observations.joined(found)
        missed, targets_of_all = self.exchange.total([num_seen, len(observations)])
        if missed:
            why = "are items that their user had before, which filter_seen = True leaves out: they count as misses"
            warning = f"eval: {missed} of {targets_of_all} targets {why}"
            if warning not in self._warnings:  # once per split, not at each evaluation
                log.warning(warning)
            self._warnings.add(warning)
        return observations

    def _collect_queries(
        self, batches: Iterable[HSTUBatch], device: torch.device
    ) -> tuple[Queries, int, np.ndarray, np.ndarray]:
        """Queries of this rank, the number per user, rows of the held-out events and lengths of histories, int64 [U].

        The U queries at the time of the request come before the U at the time of the last event, if there are any.
        Leaves the rest of the batches where a rank has collected ROUND_NUMBERS.
        """
        collected, asked_at = 0, 1
        vectors: list[Tensor] = []
        nothing = np.zeros(0, dtype=np.int64)
        columns = [(nothing,) * 6]
        for number, batch in enumerate(batches, 1):
            real = np.flatnonzero(on_host(batch.user_ids) >= 0)
            asked = [batch] if batch.request_times is None else [batch, replace(batch, request_times=None)]
            queries, rows = [self.forward(each).queries for each in asked], torch.from_numpy(real).to(device)
            vectors.append(torch.stack([cast(Tensor, each).float()[rows] for each in queries]))
            events = real if batch.target_events is None else on_host(batch.target_events)[real]
            seen, seen_lengths = nothing, np.zeros(len(real), dtype=np.int64)
            if batch.seen is not None:  # padding rows have no seen items
                seen, seen_lengths = on_host(batch.seen.values), on_host(batch.seen.lengths)[real]
            users, targets = on_host(batch.user_ids)[real], on_host(batch.labels)[real]
            columns.append((users, targets, seen, seen_lengths, events, batch.item_lengths[real]))
            collected += len(real) * _NUMBERS_PER_QUERY + len(seen)
            if number == asked_at:  # a collective: again after as many batches, or half of those that seem to be left
                left = ROUND_NUMBERS - (most := max(1, int(self.exchange.total(collected, ReduceOp.MAX))))
                if left <= 0:
                    break
                asked_at += max(1, min(number, left * number // (2 * most)))
        joined = torch.cat(vectors or [torch.zeros((1, 0, 1), device=device)], dim=1)
        *of_queries, events, history = map(np.concatenate, zip(*columns, strict=True))
        arrays = (np.tile(each, len(joined)) for each in of_queries)
        return Queries(joined.flatten(0, 1), *arrays), len(joined), events, history

    def metrics(self, observations: Observations, exchange: Exchange = ALONE) -> dict[str, float]:
        """See Evaluator."""
        return {
            f"{name}{clock}": value
            for ranks, clock in zip(observations.results.T, ("", f"/{AT_LAST_EVENT}"), strict=False)
            for name, value in retrieval_metrics(self.args.eval_metrics, ranks, exchange).items()
        }

    def corpus(self, ids: np.ndarray | None = None) -> Corpus:
        """The items ``ids``, ascending. Default: items in the dynamic table if there is one and no tower, else all."""
        if ids is None and not self.args.item_tower:
            for table in dynamic_tables(self.model).values():
                if self.source.roles.item in table.spec.features:
                    ids = np.sort(self.exchange.gathered(on_host(table.slots.content()[0])))
        if ids is None:
            ids = self.source.item_ids()
        if ids is None:
            ids = np.arange(self.source.cardinalities[self.source.roles.item], dtype=np.int64)
        ids_on_device = torch.from_numpy(ids).to(self.mesh.device)
        return Corpus(self.embed_items, ids_on_device, self.args.l2_norm_eps, between=self._mark)

    def embed_items(self, ids: Tensor) -> Tensor:
        """Item vectors, not normalised, for item ids. Collective if a table is sharded."""
        self._mark()
        features = self.source.tower_features(on_host(ids)) if self.args.item_tower else None
        return self.model.embed_items(ids, features)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context without dropout and gradients. The former mode is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
