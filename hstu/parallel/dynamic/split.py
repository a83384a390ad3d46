"""Dynamic tables that lie partly in GPU memory: two physical tables, and one table to everything outside the lookup.

FBGEMM gives a table one place, but a lookup any number of tables. Of a split table, slots [0, n) of each rank are a
table of the same name and the others one called ``<name>/host``, with a feature each. Ids are exchanged under the names
of the real features alone; once they have become slots, those of the second table are looked up beside those of the
first, and the rows put back into the order of the ids. Which memory is which is the planner's matter: on a CPU both are
in host memory, looked up by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec import EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.sharding.rw_sequence_sharding import RwSequenceEmbeddingSharding

from hstu.config.errors import ConfigError
from hstu.model.embedding import DynamicEmbeddingCollection
from hstu.parallel.dynamic.budget import MemoryPlan

_HOST = "/host"


def part_names(table: str, memory: MemoryPlan) -> list[str]:
    """The physical tables of a dynamic table, in the order of their slots."""
    return [table] if memory.split_at is None else [table, table + _HOST]


def table_of(part: str) -> str:
    """The table that a physical table is part of."""
    return part.removesuffix(_HOST)


def in_parts(collections: nn.ModuleList, memory: Mapping[str, MemoryPlan]) -> nn.ModuleList:
    """Collections, on the meta device, in which those tables are split whose plan of ``memory`` says so.

    Raises ConfigError where a name of a table or feature could not be told from that of a part.
    """
    dynamic = [collection for collection in collections if isinstance(collection, DynamicEmbeddingCollection)]
    tables = [table for collection in dynamic for table in collection.embedding_configs()]
    names = [name for table in tables for name in (table.name, *table.feature_names)]
    if taken := sorted({name for name in names if name.endswith(_HOST)}):
        raise ConfigError([f"names of dynamic tables and their features may not end in {_HOST!r}: {', '.join(taken)}"])
    return nn.ModuleList(
        DynamicEmbeddingCollection(
            tables=[part for table in collection.embedding_configs() for part in _parts(table, memory[table.name])],
            device=torch.device("meta"),
        )
        if isinstance(collection, DynamicEmbeddingCollection)
        else collection
        for collection in collections
    )


def _parts(table: EmbeddingConfig, memory: MemoryPlan) -> list[EmbeddingConfig]:
    if memory.split_at is None:
        return [table]
    rows = memory.split_at * memory.ranks
    return [
        replace(table, num_embeddings=rows),
        replace(
            table,
            name=table.name + _HOST,
            num_embeddings=table.num_embeddings - rows,
            feature_names=[name + _HOST for name in table.feature_names],
        ),
    ]


class OwnerSharding(RwSequenceEmbeddingSharding):
    """Row-wise sharding whose exchanges know the real features only; its lookup knows those of both parts."""

    def looked_up(self) -> list[str]:
        """The features of the lookup, in its order."""
        return super().feature_names()

    def feature_names(self) -> list[str]:
        """See EmbeddingSharding."""
        return [name for name in super().feature_names() if table_of(name) == name]

    def embedding_names(self) -> list[str]:
        """See EmbeddingSharding. No two tables have a feature in common: what is looked up is called as it is."""
        return self.feature_names()

    def _get_num_features(self) -> int:
        return len(self.feature_names())


class Parting:
    """Slots as rows of parts. What is the same for every batch is on the device from the start."""

    def __init__(
        self, keys: Sequence[str], looked_up: Sequence[str], split_at: Mapping[str, int], device: torch.device
    ) -> None:
        """``keys``, ``looked_up``: the features that are exchanged, and those of the lookup, in their orders;
        ``split_at``: real feature → slots in the first part of its table, if that is split.
        """
        names = [key + part for part in ("", _HOST) for key in keys]
        places = [looked_up.index(name) if name in looked_up else -1 for name in names]
        first_rows = [split_at.get(key, torch.iinfo(torch.int64).max) for key in keys]
        self._looked_up = list(looked_up)
        self._keys = torch.arange(len(keys), device=device)
        self._first_rows = torch.tensor(first_rows, device=device)
        self._place_of_name = torch.tensor(places, device=device)
        self._name_of_place = torch.tensor([names.index(name) for name in looked_up], device=device)

    def __call__(self, features: KeyedJaggedTensor) -> tuple[KeyedJaggedTensor, Tensor]:
        """(The features of the lookup, the place of each of n slots' row there, int64 [n]).

        ``features``: slots, with the ``keys``. The rows of a bag stay in their order.
        """
        slots, lengths = features.values(), features.lengths()
        key_of = self._keys.repeat_interleave(features.stride()).repeat_interleave(lengths, output_size=len(slots))
        first_rows = self._first_rows[key_of]
        second = slots >= first_rows
        order = self._place_of_name[key_of + len(self._keys) * second].argsort(stable=True)
        counted = functional.pad(second.cumsum(0), (1, 0))[features.offsets()]
        in_second = counted.diff().to(lengths.dtype)
        by_name = torch.cat([lengths - in_second, in_second]).view(2 * len(self._keys), -1)
        rows = KeyedJaggedTensor(
            keys=self._looked_up,
            values=torch.where(second, slots - first_rows, slots)[order],
            lengths=by_name[self._name_of_place].flatten(),
            stride=features.stride(),
        )
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return rows, places
