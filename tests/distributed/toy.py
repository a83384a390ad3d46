"""A tiny task and its batches, enough to train tables and a dense part over any number of ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torchrec import JaggedTensor

from hstu.config.args import DynamicEmbeddingArgs, EmbeddingArgs, NetworkArgs, OptimizerArgs, PartOptimizerArgs
from hstu.data.batch import NEGATIVES, HSTUBatch, keyed_jagged
from hstu.model.embedding import table_specs
from hstu.model.gr_model import GRModel
from hstu.model.outputs import ModelOutput
from hstu.optim.optimizers import Optimizers, build_optimizers
from hstu.parallel import mesh as mesh_module
from hstu.parallel.dense import replicate_dense
from hstu.parallel.embedding import shard

USERS, ITEMS, ACTIONS = 23, 41, 5
GLOBAL_BATCH = 12
FEATURES = ("user", "item", "action", NEGATIVES)


class ToyTask(nn.Module):
    """Squared error of an MLP on item rows (of two lookups), action rows and the user's row."""

    def __init__(self, dim: int, user_dim: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.Linear(user_dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, embeddings: dict[str, JaggedTensor], batch: HSTUBatch) -> ModelOutput:
        items, actions, users = (embeddings[name] for name in ("item", "action", "user"))
        per_token = self.project(users.values()).repeat_interleave(items.lengths()[users.lengths() > 0], dim=0)
        hidden = self.norm(items.values() + actions.values() + per_token)
        predictions = torch.tanh(self.head(self.dropout(hidden))).squeeze(1)
        extra = embeddings[NEGATIVES].values().square().sum()
        loss = (predictions - batch.labels.float()).square().sum() + extra
        return ModelOutput(loss, batch.num_labels.sum())


def global_sequences(step: int, empty_from: int | None = None) -> list[dict[str, np.ndarray]]:
    """The GLOBAL_BATCH sequences of a step; those from ``empty_from`` on are padding."""
    rng = np.random.default_rng(1000 + step)
    sequences = []
    for index in range(GLOBAL_BATCH):
        length = 0 if empty_from is not None and index >= empty_from else int(rng.integers(1, 7))
        user = rng.integers(0, USERS, 1 if length else 0)
        items, actions = rng.integers(0, ITEMS, length), rng.integers(0, ACTIONS, length)
        sequences.append(
            {"user": user, "item": items, "action": actions, NEGATIVES: rng.integers(0, ITEMS, length // 2)}
        )
    return sequences


def make_batch(step: int, rank: int, world_size: int, empty_from: int | None = None) -> HSTUBatch:
    """This rank's contiguous share of the global batch."""
    share = GLOBAL_BATCH // world_size
    mine = global_sequences(step, empty_from)[rank * share : (rank + 1) * share]
    values = {key: np.concatenate([sequence[key] for sequence in mine]).astype(np.int64) for key in FEATURES}
    lengths = {key: np.array([len(sequence[key]) for sequence in mine], np.int64) for key in FEATURES}
    item_lengths = lengths["item"]
    return HSTUBatch(
        features=keyed_jagged(values, lengths),
        num_candidates=torch.zeros(share, dtype=torch.int64),
        num_labels=torch.from_numpy(item_lengths),
        labels=torch.from_numpy(values["item"] % 2),
        user_ids=torch.arange(share),
        real_batch_size=int((item_lengths > 0).sum()),
        item_lengths=item_lengths,
        num_candidates_host=np.zeros(share, np.int64),
        num_labels_total=int(item_lengths.sum()),
    )


def make_config(
    optimizer: str = "sgd",
    sharding: str = "row_wise",
    replicated: tuple[str, ...] | list[str] = ("action",),
    dim: int = 8,
    user_dim: int = -1,
    learning_rate: float = 0.1,
    init_seed_offset: int = 0,
    dropout: float = 0.0,
    items: int = ITEMS,
    item_table: str = "item_table",
    dynamic: dict[str, dict[str, Any]] | None = None,
    trained: dict[str, dict[str, Any]] | None = None,
    parts: list[dict[str, Any]] | None = None,
    **optimizer_args: Any,
) -> Any:
    """The parts of a RunConfig that the toy needs.

    ``dynamic``: feature → options of its dynamic table; ``trained``: feature → how its table is trained; ``parts``:
    arguments of the PartOptimizerArgs.
    """
    by_part = [PartOptimizerArgs(**part) for part in parts or ()]
    tables = [("user", USERS), ("item", items), ("action", ACTIONS)]
    return SimpleNamespace(
        dropout=dropout,
        trainer=SimpleNamespace(seed=7 + init_seed_offset, pipeline_type="none"),
        optimizer=OptimizerArgs(
            optimizer_str=optimizer, learning_rate=learning_rate, part_optimizers=by_part, **optimizer_args
        ),
        network=NetworkArgs(
            num_layers=1, hidden_size=dim, num_attention_heads=1, kv_channels=4, contextual_embedding_dim=user_dim
        ),
        embeddings=tuple(
            DynamicEmbeddingArgs(**common, **dynamic[name])
            if dynamic and name in dynamic
            else EmbeddingArgs(
                **common,
                item_vocab_size_or_capacity=rows,
                sharding=sharding,
                sharding_type="data_parallel" if name in replicated else "model_parallel",
            )
            for name, rows in tables
            for table in [item_table if name == "item" else f"{name}_table"]
            for own in [(trained or {}).get(name, {})]
            for common in [{"feature_names": [name], "table_name": table, "init_std": 0.5, **own}]
        ),
    )


def build(config: Any, mesh: mesh_module.Mesh) -> tuple[GRModel, Optimizers]:
    """The toy model, sharded and replicated, with its optimizers."""
    mesh_module.seed_initial_weights(config.trainer.seed)
    dim, user_dim = config.network.hidden_size, config.network.contextual_embedding_dim
    specs = table_specs(
        config.embeddings, config.network, ["user"], "item", lookup_negatives=True, world_size=mesh.world_size
    )
    task = ToyTask(dim, user_dim if user_dim > 0 else dim, config.dropout)
    model, tables = shard(GRModel(specs, task, FEATURES, "item", config.trainer.seed), config, mesh)
    replicate_dense(model, mesh)
    return model, build_optimizers(model, config.optimizer, tables, mesh)


def train_step(model: GRModel, optimizers: Optimizers, mesh: mesh_module.Mesh, batch: HSTUBatch) -> float:
    """One optimizer step on the global mean loss, which is returned."""
    optimizers.zero_grad()
    output = model(batch)
    totals = torch.stack([output.loss_sum.detach(), output.num_labels.float()])
    torch.distributed.all_reduce(totals, group=mesh.dp_group)
    (output.loss_sum * (mesh.dp_size / totals[1].clamp(min=1))).backward()
    optimizers.step()
    return float(totals[0] / totals[1].clamp(min=1))
