"""Collators for one split of a store, roles and hashing taken from that store, and their batches."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hstu.config.args import DatasetArgs, Task
from hstu.data.batches.batch import HSTUBatch, TensorGroup
from hstu.data.batches.collate import Assembler, Collator
from hstu.data.features.roles import resolve_roles
from hstu.data.sampling.negatives import Negatives
from hstu.data.sampling.sampler import EvalSampler
from hstu.data.sampling.samples import SampleTable, build_samples
from hstu.data.sampling.splits import Split
from hstu.data.store.reader import StoreReader
from hstu.data.store.sequence_store import SequenceStore


def build_collator(
    store: SequenceStore,
    samples: SampleTable,
    args: DatasetArgs,
    task: Task,
    *,
    batch_size: int,
    seed: int,
    negatives: Negatives | None = None,
    wants_timestamps: bool = False,
    wants_seen: bool = False,
    recoding: Mapping[str, np.ndarray] | None = None,
) -> Collator:
    """The collator of one split of a store. ``recoding``: see StoreReader."""
    roles = resolve_roles(store, args)
    return Collator(
        StoreReader(
            store,
            samples,
            roles,
            wants_timestamps=wants_timestamps,
            wants_seen=wants_seen,
            recoding=recoding,
        ).read,
        Assembler(batch_size, task, roles, store.cardinality(roles.item), seed, negatives),
    )


def collator_of(
    store: SequenceStore,
    task: Task = "retrieval",
    split: Split = "train",
    *,
    length: int = 100,
    candidates: int = 0,
    batch_size: int = 4,
    seed: int = 0,
    args: dict[str, Any] | None = None,
    **options: Any,
) -> Collator:
    dataset = DatasetArgs(dataset_name="toy", max_sequence_length=length, max_num_candidates=candidates, **(args or {}))
    samples = build_samples(store, dataset, task, split, seed)
    return build_collator(store, samples, dataset, task, batch_size=batch_size, seed=seed, **options)


def num_samples(collator: Collator) -> int:
    reader = getattr(collator.read, "__self__", None)
    assert isinstance(reader, StoreReader)
    return len(reader.samples)


def batches_of(collator: Collator, world_size: int = 1, rank: int = 0) -> list[HSTUBatch]:
    """One pass in file order."""
    sampler = EvalSampler(num_samples(collator), collator.assembler.batch_size, rank, world_size)
    return [collator(plan) for plan in sampler]


def host(tensor: torch.Tensor | None) -> np.ndarray:
    """The values of a tensor that must be there."""
    assert tensor is not None
    return tensor.numpy()


def tensors_of(batch: TensorGroup) -> dict[str, torch.Tensor]:
    """Name of a field → its tensor, those of groups as "seen.values"."""
    found: dict[str, torch.Tensor] = {}
    for name, part in vars(batch).items():
        if isinstance(part, torch.Tensor):
            found[name] = part
        elif isinstance(part, KeyedJaggedTensor):
            found |= {f"{name}.values": part.values(), f"{name}.lengths": part.lengths()}
        elif isinstance(part, TensorGroup):
            found |= {f"{name}.{inner}": tensor for inner, tensor in tensors_of(part).items()}
    return found


def assert_same(batch: HSTUBatch, expected: HSTUBatch) -> None:
    assert batch.features.keys() == expected.features.keys()
    assert batch.features.length_per_key() == expected.features.length_per_key()
    ours, theirs = tensors_of(batch), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"user_ids"}:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name
    for name in ("item_lengths", "num_candidates_host"):
        assert np.array_equal(getattr(batch, name), getattr(expected, name)), name
    for name in ("batch_size", "real_batch_size", "num_labels_total"):
        assert getattr(batch, name) == getattr(expected, name), name
