"""Recommendations in the user's own ids, from a trained retrieval model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hstu.checkpoint.match import LoadOptions
from hstu.checkpoint.state import TrainState
from hstu.checkpoint.store import CheckpointStore
from hstu.config.args import DatasetArgs, RetrievalArgs
from hstu.config.errors import ConfigError, DataError
from hstu.config.run_config import RunConfig
from hstu.data.collate import ranges
from hstu.data.store import USER_FEATURE, SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.train.builder import build_model, row_ids
from hstu.train.evaluate import Queries, evaluation_mode, recommend
from hstu.train.evaluator import RetrievalEvaluator
from hstu.train.sources import StoreSource


@dataclass(frozen=True)
class Recommendation:
    """The best items of one user, best first: raw ids, titles (raw ids where the data has none), cosines."""

    user: Any
    items: list[Any]
    titles: list[str]
    scores: list[float]


def recommend_for(config: RunConfig, ckpt: str, users: Sequence[Any], top: int, mesh: Mesh) -> list[Recommendation]:
    """The ``top`` items for users by raw id, from their whole histories; items that they know are left out.

    ``config``: of the run that was trained. ``ckpt``: a checkpoint, a directory of them, or an export. Raises
    ConfigError for a run of another kind, DataError for unknown users and missing checkpoints. Collective.
    """
    if not isinstance(config.dataset, DatasetArgs) or not isinstance(config.task_args, RetrievalArgs):
        raise ConfigError("recommendations need a retrieval run on real data")
    source = StoreSource(config, config.dataset, mesh)
    rows = encode_users(source.store, users)
    model, optimizers = build_model(config, source, mesh)
    state = TrainState(model, optimizers, config.operative_gin(), ids=row_ids(source))
    CheckpointStore(ckpt, ckpt, mesh, load_options=LoadOptions(optimizer=False)).restore(state)
    evaluator = RetrievalEvaluator(model, config.task_args, source, mesh)
    with evaluation_mode(model), optimizers.averaged_weights():
        vectors = []
        for batch in source.history_batches(rows):
            queries = model(batch.to(mesh.device)).queries
            vectors.append(queries[: batch.real_batch_size])
        codes, scores = recommend(_with_seen_items(source, rows, torch.cat(vectors)), evaluator.corpus(), top)
    return [
        _in_raw_ids(source.store, user, user_codes[user_codes >= 0], user_scores)
        for user, user_codes, user_scores in zip(users, codes, scores, strict=True)
    ]


def table(recommendations: Iterable[Recommendation]) -> str:
    """The recommendations as lines to print, a block a user."""
    lines = []
    for entry in recommendations:
        lines.append(f"\nuser {entry.user}")
        for place, (item, title, score) in enumerate(zip(entry.items, entry.titles, entry.scores, strict=True), 1):
            raw_id = f"  [{item}]" if title != str(item) else ""
            lines.append(f"  {place:>3}.  {score:6.3f}  {title}{raw_id}")
    return "\n".join(lines)


def encode_users(store: SequenceStore, users: Sequence[Any]) -> np.ndarray:
    """Raw user ids (numbers may be given as strings) → rows of the store, int64. Raises DataError for unknown ones."""
    if store.raw_ids(USER_FEATURE).dtype == object:
        return store.encode(USER_FEATURE, users)
    try:
        numbers = np.array([int(user) for user in users], dtype=np.int64)
    except ValueError as error:
        raise DataError(f"{store.path}: user ids are whole numbers, got {list(users)!r}") from error
    return store.encode(USER_FEATURE, numbers)


def _with_seen_items(source: StoreSource, rows: np.ndarray, vectors: torch.Tensor) -> Queries:
    offsets = source.store.offsets()
    lengths = offsets[rows + 1] - offsets[rows]
    seen = source.store.sequence(source.roles.item)[ranges(offsets[rows], lengths)].astype(np.int64)
    return Queries(vectors, rows, np.full_like(rows, -1), seen, lengths)


def _in_raw_ids(store: SequenceStore, user: Any, codes: np.ndarray, scores: np.ndarray) -> Recommendation:
    raw_ids, titles = store.raw_ids(store.item_feature), store.titles()
    names = raw_ids if titles is None else titles
    return Recommendation(
        user=user,
        items=raw_ids[codes].tolist(),
        titles=[str(name) for name in names[codes]],
        scores=scores[: len(codes)].tolist(),
    )
