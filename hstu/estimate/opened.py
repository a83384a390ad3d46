"""What a configuration names, opened at most once for all checks of ``--validate-only``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import nn

from hstu.base.errors import UserError
from hstu.checkpoint.find import candidates
from hstu.checkpoint.tensors import AVERAGE, TABLES, WEIGHTS
from hstu.config.args import DatasetArgs, EmbeddingArgs, OptimizerArgs
from hstu.config.incomplete import Unknown
from hstu.config.rules.ranking_tasks import tasks_of
from hstu.config.run_config import RunDraft
from hstu.data.datasets import DATASETS, resolve_name
from hstu.data.features.roles import FeatureRoles, benchmark_roles, resolve_roles
from hstu.data.store.sequence_store import SequenceStore
from hstu.estimate.plan import roles_without_data
from hstu.model.embedding import TableSpec, table_specs
from hstu.model.inputs import SequenceFeatures
from hstu.observe.run_directory import default_path
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.optim.dense import match_part_optimizers
from hstu.parallel.table_optimizer import STATES, TableTraining, is_rowwise
from hstu.train.batch_source import BatchSource
from hstu.train.builder import TaskModel, task_module
from hstu.train.directories import directory_of_checkpoints
from hstu.train.sources import open_source
from hstu.train.store_source import open_store
from hstu.train.tables import choose_tables, predefined_tables

T = TypeVar("T")


class Attempt(Generic[T]):
    """The result of ``function``, or the error with which it failed."""

    def __init__(self, function: Callable[[], T]) -> None:
        self.error: UserError | None = None
        try:
            self._value = function()
        except UserError as error:
            self.error = error

    @property
    def value(self) -> T:
        """The result. Raises Unknown after an error, which one check reports for all."""
        if self.error is not None:
            raise Unknown
        return self._value


@dataclass(frozen=True)
class Labels:
    """The actions of the data, as label_offset reads them."""

    roles: FeatureRoles
    cardinalities: dict[str, int]
    least_action: int


@dataclass
class Opened:
    """What the gin files name, opened at most once."""

    run: RunDraft

    @cached_property
    def store(self) -> Attempt[SequenceStore]:
        """The preprocessed data."""
        return Attempt(lambda: open_store(self._own_dataset))

    @cached_property
    def roles(self) -> Attempt[FeatureRoles]:
        """The features that the model sees; those of a built-in dataset are known before it is preprocessed."""
        dataset = self.run.dataset
        if not isinstance(dataset, DatasetArgs):
            return Attempt(lambda: benchmark_roles(dataset))
        tower = self.run.has_item_tower
        if self.store.error is None:
            tasks = tasks_of(self.run)
            return Attempt(lambda: resolve_roles(self.store.value, dataset, self.run.located, tasks, tower))
        name = resolve_name(dataset.dataset_name)
        spec = DATASETS[name] if name else None
        tasks, numbers = tasks_of(self.run), self.run.numbers
        return Attempt(lambda: roles_without_data(dataset, spec, tasks, numbers, tower))

    @cached_property
    def tables(self) -> Attempt[tuple[EmbeddingArgs, ...]]:
        """One table for each feature."""
        run, roles = self.run, self.roles.value
        if not isinstance(run.dataset, DatasetArgs):
            return Attempt(lambda: tuple(run.embeddings))
        predefined = predefined_tables(self._own_dataset, self.store.value, run.network)
        return Attempt(lambda: choose_tables(run.embeddings, predefined, roles.names, run.located, roles.numbers))

    @cached_property
    def specs(self) -> Attempt[tuple[TableSpec, ...]]:
        """The tables as the model has them."""
        run, roles, tables = self.run, self.roles.value, self.tables.value
        args, ranks = run.retrieval, run.world_size
        negatives = args is not None and args.negatives != "in_batch"
        return Attempt(lambda: table_specs(tables, run.network, roles, negatives, ranks, run.located))

    @cached_property
    def task(self) -> TaskModel:
        """The dense part of the model without tensor parallelism, on the meta device: shapes without memory."""
        run, roles = self.run, self.roles.value
        if isinstance(run.dataset, DatasetArgs):
            max_items = run.dataset.max_sequence_length
        else:
            groups = (group for group in run.dataset.feature_args if roles.item in group.feature_names)
            max_items = next(groups).max_sequence_length
        features = SequenceFeatures.of(roles, max_items)
        with torch.device("meta"):
            return task_module(run, features, REFERENCE_KERNELS)

    @property
    def dense_weights(self) -> dict[str, nn.Parameter]:
        """The trained weights of ``task`` by their names in the model."""
        named = self.task.named_parameters()
        return {f"task.{name}": weight for name, weight in named if weight.requires_grad}

    @cached_property
    def tensor_sizes(self) -> dict[str, torch.Size]:
        """Tensor of a checkpoint of this run → size, as TrainState.tensors names them; dynamic tables apart."""
        args, specs = self.run.optimizer, [spec for spec in self.specs.value if spec.dynamic is None]
        of_parts = match_part_optimizers(self.dense_weights, args)
        sizes = {f"{WEIGHTS}task.{name}": tensor.size() for name, tensor in self.task.state_dict().items()}
        sizes |= {f"{TABLES}{spec.name}": torch.Size((spec.rows, spec.dim)) for spec in specs}
        for name, weight in self.dense_weights.items():
            states = _dense_states(of_parts[name].optimizer, args)
            sizes |= {f"optimizer.dense.{name}.{state}": weight.size() for state in states}
            if of_parts[name].optimizer != "sgd":
                sizes[f"optimizer.dense.{name}.step"] = torch.Size(())
        for spec in specs:
            averages = (AVERAGE,) if spec.replicated and args.ema_decay > 0 else ()
            for state in (*TableTraining.of(spec, args).states, *averages):
                shape = (spec.rows,) if is_rowwise(state) else (spec.rows, spec.dim)
                sizes[f"optimizer.tables.{spec.name}.{state}"] = torch.Size(shape)
        return sizes

    @cached_property
    def source(self) -> Attempt[BatchSource]:
        """Samples, splits and batches."""
        config = self.run.finish()
        return Attempt(lambda: open_source(config, world_size=self.run.world_size))

    @cached_property
    def directories(self) -> Attempt[tuple[Path, Path]]:
        """Where the run would write, and where its checkpoints would be; neither is created."""
        path = Path(self.run.trainer.output_dir or default_path(self.run.source_files))
        return Attempt(lambda: (path, directory_of_checkpoints(self.run, path)))

    @cached_property
    def checkpoint(self) -> Attempt[Path | None]:
        """The checkpoint to start from, if there is any."""
        load_dir, save_dir = self.run.trainer.ckpt_load_dir, self.directories.value[1]
        return Attempt(lambda: next(iter(candidates(load_dir, save_dir)), None))

    @property
    def operative_gin(self) -> str:
        """The configuration in force; empty while some of it is wrong."""
        try:
            return self.run.finish().operative_gin()
        except Unknown:
            return ""

    @property
    def _own_dataset(self) -> DatasetArgs:
        dataset = self.run.dataset
        if not isinstance(dataset, DatasetArgs):
            raise Unknown
        return dataset


def _dense_states(optimizer: str, args: OptimizerArgs) -> tuple[str, ...]:
    """Names of what is kept for each number of a weight of the dense part."""
    states = STATES["adagrad" if optimizer == "rowwise_adagrad" else optimizer]
    states = ("momentum_buffer",) if optimizer == "sgd" and args.momentum > 0 else states
    return (*states, AVERAGE) if args.ema_decay > 0 else states
