"""A tiny task and its batches, enough to train tables and a dense part over any number of ranks."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from torch import nn

from hstu.checkpoint.save import Snapshot, write
from hstu.checkpoint.state import TrainState
from hstu.config.args import (
    DynamicEmbeddingArgs,
    EmbeddingArgs,
    NetworkArgs,
    OptimizerArgs,
    PartOptimizerArgs,
    PrecisionArgs,
)
from hstu.data.batches.batch import NEGATIVES, HSTUBatch, keyed_jagged
from hstu.data.features.roles import FeatureRoles
from hstu.data.sampling.sampler import SamplerPosition
from hstu.model.embedding import table_specs
from hstu.model.gr_model import DenseModel, GRModel
from hstu.model.stack import ModelOutput
from hstu.optim.optimizers import Optimizers, build_optimizers
from hstu.parallel import mesh as mesh_module
from hstu.parallel.collectives import gather_objects
from hstu.parallel.data_parallel import average_sparse_gradients, replicate_dense, unwrap_dense
from hstu.parallel.tables import shard, sharded_weights

USERS, ITEMS, ACTIONS = 23, 41, 5
GLOBAL_BATCH = 12
FEATURES = ("user", "item", "action", NEGATIVES)
ROLES = FeatureRoles("item", None, ("user",))


class ToyTask(nn.Module):
    """Squared error of an MLP on item rows (of two lookups), action rows and the user's row."""

    def __init__(self, dim: int, user_dim: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.Linear(user_dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, embeddings: Mapping[str, torch.Tensor], batch: HSTUBatch) -> ModelOutput:
        items, actions, users = (embeddings[name] for name in ("item", "action", "user"))
        lengths = batch.features["item"].lengths()[batch.features["user"].lengths() > 0]
        hidden = self.norm(items + actions + self.project(users).repeat_interleave(lengths, dim=0))
        predictions = torch.tanh(self.head(self.dropout(hidden))).squeeze(1)
        extra = embeddings[NEGATIVES].square().sum()
        loss = (predictions - batch.labels.float()).square().sum() + extra
        return ModelOutput(loss)


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
    return to_batch(global_sequences(step, empty_from)[rank * share : (rank + 1) * share])


def to_batch(
    sequences: Sequence[Mapping[str, np.ndarray]], id_of: Callable[[np.ndarray], np.ndarray] | None = None
) -> HSTUBatch:
    """``id_of``: the ids to be looked up in place of the codes of users and items."""
    values = {key: np.concatenate([sequence[key] for sequence in sequences]).astype(np.int64) for key in FEATURES}
    lengths = {key: np.array([len(sequence[key]) for sequence in sequences], np.int64) for key in FEATURES}
    item_lengths, labels = lengths["item"], torch.from_numpy(values["item"] % 2)
    if id_of is not None:
        values = {key: codes if key == "action" else id_of(codes) for key, codes in values.items()}
    return HSTUBatch(
        features=keyed_jagged(values, lengths),
        num_candidates=torch.zeros(len(sequences), dtype=torch.int64),
        num_labels=torch.from_numpy(item_lengths),
        labels=labels,
        user_ids=torch.arange(len(sequences)),
        real_batch_size=int((item_lengths > 0).sum()),
        item_lengths=item_lengths,
        num_candidates_host=np.zeros(len(sequences), np.int64),
        num_labels_host=item_lengths,
    )


class ToyOptions(TypedDict, total=False):
    """What may be chosen of a toy run."""

    optimizer: str
    optimizer_args: Mapping[str, Any]
    """Further arguments of OptimizerArgs."""
    sharding: str
    replicated: Sequence[str]
    """Features whose tables are replicated."""
    dim: int
    user_dim: int
    init_seed_offset: int
    dropout: float
    items: int
    item_table: str
    dynamic: Mapping[str, Mapping[str, Any]]
    """Feature → options of its dynamic table."""
    trained: Mapping[str, Mapping[str, Any]]
    """Feature → how its table is trained."""
    parts: Sequence[Mapping[str, Any]]
    """Arguments of each PartOptimizerArgs."""
    exchange: str
    """PrecisionArgs.table_exchange_dtype."""


def make_config(**options: Unpack[ToyOptions]) -> Any:
    """The parts of a RunConfig that the toy needs."""
    tables: list[EmbeddingArgs] = []
    for name, rows in (("user", USERS), ("item", options.get("items", ITEMS)), ("action", ACTIONS)):
        common: dict[str, Any] = {
            "feature_names": [name],
            "table_name": options.get("item_table", "item_table") if name == "item" else f"{name}_table",
            "init_std": 0.5,
            **options.get("trained", {}).get(name, {}),
        }
        if name in options.get("dynamic", {}):
            tables.append(DynamicEmbeddingArgs(**common, **options["dynamic"][name]))
        else:
            common["sharding_type"] = (
                "data_parallel" if name in options.get("replicated", ("action",)) else "model_parallel"
            )
            sharding = options.get("sharding", "row_wise")
            tables.append(EmbeddingArgs(**common, item_vocab_size_or_capacity=rows, sharding=sharding))
    return SimpleNamespace(
        dropout=options.get("dropout", 0.0),
        trainer=SimpleNamespace(seed=7 + options.get("init_seed_offset", 0), pipeline_type="none"),
        optimizer=OptimizerArgs(
            optimizer_str=options.get("optimizer", "sgd"),
            learning_rate=0.1,
            part_optimizers=[PartOptimizerArgs(**part) for part in options.get("parts", ())],
            **options.get("optimizer_args", {}),
        ),
        precision=PrecisionArgs(table_exchange_dtype=options.get("exchange", "float32")),
        network=NetworkArgs(
            num_layers=1,
            hidden_size=options.get("dim", 8),
            num_attention_heads=1,
            kv_channels=4,
            contextual_embedding_dim=options.get("user_dim", -1),
        ),
        embeddings=tuple(tables),
    )


def build(config: Any, mesh: mesh_module.Mesh) -> tuple[GRModel, Optimizers]:
    """The toy model, sharded and replicated, with its optimizers."""
    mesh_module.seed_initial_weights(config.trainer.seed)
    dim, user_dim = config.network.hidden_size, config.network.contextual_embedding_dim
    specs = table_specs(config.embeddings, config.network, ROLES, lookup_negatives=True, world_size=mesh.world_size)
    task = ToyTask(dim, user_dim if user_dim > 0 else dim, config.dropout)
    model, tables = shard(GRModel(specs, task, FEATURES, ROLES, config.trainer.seed), config, mesh)
    replicate_dense(model, mesh)
    return model, build_optimizers(model, config.optimizer, tables, mesh)


def train_step(model: GRModel, optimizers: Optimizers, mesh: mesh_module.Mesh, batch: HSTUBatch) -> float:
    """One optimizer step on the global mean loss, which is returned."""
    optimizers.zero_grad()
    output = model(batch)
    totals = torch.stack([output.loss_sum.detach(), batch.num_labels.sum().float()])
    torch.distributed.all_reduce(totals, group=mesh.dp_group)
    (output.loss_sum * (mesh.dp_size / totals[1].clamp(min=1))).backward()
    average_sparse_gradients(model.dense)
    optimizers.step()
    return float(totals[0] / totals[1].clamp(min=1))


def dense_of(model: GRModel) -> DenseModel:
    """The dense part without what replicates it."""
    dense = unwrap_dense(model)
    assert isinstance(dense, DenseModel)
    return dense


def full_tables(model: GRModel, mesh: mesh_module.Mesh) -> dict[str, Any]:
    """All tables as nested lists, assembled from the ranks' shards; padding columns cut off."""
    shards = {
        table: [(shard.metadata.shard_offsets, shard.tensor.tolist()) for shard in weight.local_shards()]
        for table, weight in sharded_weights(model).items()
    }
    tables = {}
    by_rank = gather_objects(shards, mesh.world_group)
    for spec in model.specs:
        if spec.replicated:
            tables[spec.name] = dense_of(model).replicated.weight(spec.name).tolist()
            continue
        whole = torch.full((spec.rows, spec.stored_dim), float("nan"))
        for (row, col), values in (part for rank in by_rank for part in rank[spec.name]):
            if values:  # a small table leaves some ranks without rows
                part = torch.tensor(values)
                whole[row : row + part.shape[0], col : col + part.shape[1]] = part
        assert not whole[:, spec.dim :].any(), "columns that only pad a row must stay zero"
        tables[spec.name] = whole[:, : spec.dim].tolist()
    return tables


def new_state(mesh: mesh_module.Mesh, **options: Unpack[ToyOptions]) -> TrainState:
    """The toy as a trainer holds it, with dropout seeded."""
    model, optimizers = build(make_config(**options), mesh)
    mesh_module.seed_dropout(mesh)
    return TrainState(model, optimizers, operative_gin="TrainerArgs.seed = 7\n")


def train_state(state: TrainState, mesh: mesh_module.Mesh, steps: int) -> list[float]:
    """So many steps from where the state is, at a learning rate that falls; the losses."""
    losses = []
    for _ in range(steps):
        state.optimizers.set_lr_multiplier(1.0 / (1 + state.iteration))
        batch = make_batch(state.iteration, mesh.rank, mesh.world_size)
        losses.append(train_step(state.model, state.optimizers, mesh, batch))
        state.iteration += 1
        state.position = SamplerPosition(0, 12 * state.iteration)
    return losses


def save(directory: Path, state: TrainState, mesh: mesh_module.Mesh) -> Path:
    """Write ``state`` as ``directory/iteration_<n>`` and return that path."""
    return write(directory, Snapshot.of(state, mesh), mesh)
