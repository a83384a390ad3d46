"""A collator for one split of a store, roles and hashing taken from that store."""

from collections.abc import Mapping

import numpy as np

from hstu.config.args import DatasetArgs, Task
from hstu.data.collate import Assembler, Collator, StoreReader
from hstu.data.negatives import ItemDistribution, Negatives, count_items
from hstu.data.roles import resolve_roles
from hstu.data.samples import SampleTable, StochasticLength
from hstu.data.store import SequenceStore


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
    wants_earlier: bool = False,
    stochastic_length: StochasticLength | None = None,
    recoding: Mapping[str, np.ndarray] | None = None,
) -> Collator:
    """The collator of one split of a store. ``recoding``: see StoreReader."""
    roles = resolve_roles(store, args)
    corpus = None
    if negatives is not None and negatives.exponent:
        counts = count_items(store, roles.item, samples)
        corpus = ItemDistribution(len(counts), counts**negatives.exponent)
    return Collator(
        StoreReader(
            store,
            samples,
            roles,
            wants_timestamps=wants_timestamps,
            wants_seen=wants_seen,
            wants_earlier=wants_earlier,
            recoding=recoding,
            stochastic_length=stochastic_length,
        ),
        Assembler(batch_size, task, roles, store.cardinality(roles.item), seed, negatives, corpus=corpus),
    )
