"""Embedding tables without parallelism: their specifications, initial rows, and the replicated tables.

model_parallel tables become TorchRec EmbeddingCollections, sharded by hstu.parallel.tables. They are on the meta
device, because no rank ever holds a whole table. data_parallel tables are nn.Embeddings in the dense model.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec import EmbeddingCollection, EmbeddingConfig

from hstu.base.errors import ConfigError
from hstu.config.args import DynamicEmbeddingArgs, EmbeddingArgs, NetworkArgs
from hstu.config.option import located
from hstu.data.batches.batch import NEGATIVES, POOL, HSTUBatch, of_negatives, of_pool
from hstu.data.features.roles import FeatureRoles

_INIT_BLOCK_ROWS = 4096
_MOST_SLOTS = 2**31 - 1  # the index of a dynamic table stores row numbers as int32
_DIM_MULTIPLE = 4  # FBGEMM requires rows of a multiple of 4 floats, also on the CPU


@dataclass(frozen=True)
class TableSpec:
    """One table of ``rows`` × ``dim`` numbers, and the features (keys of the batch) that look up its rows."""

    name: str
    rows: int
    dim: int
    features: tuple[str, ...]
    replicated: bool
    sharding: str
    init_std: float
    dynamic: DynamicEmbeddingArgs | None = None
    """Set for a table that accepts any id. Each rank holds an equal number of rows; its last row is zero."""
    optimizer: str | None = None
    """Optimizer of this table; None: the optimizer of all tables."""
    learning_rate: float | None = None
    """Peak learning rate of this table; None: the rate of all tables."""
    compute_kernel: str | None = None
    """TorchRec's compute kernel; None: the planner chooses."""

    @property
    def stored_dim(self) -> int:
        """Columns of a sharded table. Those beyond ``dim`` are zero, get no gradient, and lookups cut them off."""
        return -(-self.dim // _DIM_MULTIPLE) * _DIM_MULTIPLE

    @property
    def collection(self) -> tuple[int, bool]:
        """Key of the collection of a sharded table. TorchRec requires one width per collection."""
        return self.stored_dim, self.dynamic is not None


def table_specs(
    embeddings: Sequence[EmbeddingArgs],
    network: NetworkArgs,
    roles: FeatureRoles,
    lookup_negatives: bool = False,
    world_size: int = 1,
) -> tuple[TableSpec, ...]:
    """Specs of all tables, in the given order.

    The role of a table's features sets its width: contextual_embedding_dim or item_embedding_dim, where -1 means
    hidden_size, or SIDE_WIDTH. ``lookup_negatives``: batches also carry NEGATIVES, looked up in the item table, and
    their tower features. ``world_size``: ranks that share the rows of dynamic tables. Raises ConfigError if features of
    different widths share a table, nn.ModuleDict forbids a name, or a rank gets more than 2^31 - 1 dynamic rows.
    """
    specs, problems = [], []
    for table in embeddings:
        dims = {feature: roles.width(feature, network) for feature in table.feature_names}
        if len(set(dims.values())) > 1:
            text = (
                f"the features of table {table.table_name!r} have rows of different widths "
                f"({', '.join(f'{feature} {dim}' for feature, dim in dims.items())}); give them tables of their own, "
                "or equal widths in NetworkArgs.contextual_embedding_dim and item_embedding_dim"
            )
            problems.append(located(table, "feature_names", text))
        name = table.table_name
        if hasattr(nn.ModuleDict(), name) or (table.sharding_type == "model_parallel" and "." in name):
            text = (
                "PyTorch's module dictionaries, which hold tables by their names, cannot have that one; call it "
                f"{name.replace('.', '_') + '_table'!r}, say"
            )
            problems.append(located(table, "table_name", text))
        negatives = [NEGATIVES] if roles.item in table.feature_names else []
        negatives += [of_negatives(name) for name in table.feature_names if name in roles.tower]
        dynamic = table if isinstance(table, DynamicEmbeddingArgs) else None
        rows = table.item_vocab_size_or_capacity
        share = -(-rows // world_size)
        if dynamic is not None and share > _MOST_SLOTS:
            text = (
                f"the table {name!r} would have {share:,} rows per rank, but a rank can have {_MOST_SLOTS:,} at most: "
                "use more ranks, or a smaller capacity"
            )
            problems.append(located(table, "item_vocab_size_or_capacity", text))
        specs.append(
            TableSpec(
                name=table.table_name,
                rows=rows if dynamic is None else (share + 1) * world_size,
                dim=min(dims.values()),
                features=(*table.feature_names, *(negatives if lookup_negatives else ())),
                replicated=table.sharding_type == "data_parallel",
                sharding=table.sharding,
                init_std=table.init_std,
                dynamic=dynamic,
                optimizer=table.optimizer_str,
                learning_rate=table.learning_rate,
                compute_kernel=table.compute_kernel,
            )
        )
    ConfigError.raise_if(problems)
    return tuple(specs)


def initial_row_blocks(spec: TableSpec, seed: int, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the initial rows [start, stop) of a table as blocks (first row, float32 [n, dim]) of bounded size.

    The values, N(0, init_std²), depend only on the seed, the table's name and the block's index. They are therefore the
    same for any sharding and number of ranks. Each block is drawn by one thread; PyTorch's setting limits the threads.
    """

    def draw(block: int) -> Tensor:
        digest = hashlib.blake2b(f"{seed}/{spec.name}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return torch.randn((_INIT_BLOCK_ROWS, spec.dim), generator=generator)

    blocks = range(start // _INIT_BLOCK_ROWS, -(-stop // _INIT_BLOCK_ROWS))
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        drawn = deque(pool.submit(draw, block) for block in blocks[:threads])
        for block in blocks:
            rows = drawn.popleft().result().mul_(spec.init_std)
            if block + threads in blocks:
                drawn.append(pool.submit(draw, block + threads))
            first = block * _INIT_BLOCK_ROWS
            low, high = max(start, first), min(stop, first + _INIT_BLOCK_ROWS)
            yield low, rows[low - first : high - first]


def look_up(ids: Tensor, weight: Tensor) -> Tensor:
    """Return rows of a table, float32 [n, dim], for int64 ids [n]. The gradient is sparse on a CPU."""
    return functional.embedding(ids, weight, sparse=weight.device.type == "cpu")


class DynamicEmbeddingCollection(EmbeddingCollection):
    """Tables that accept any id. TorchRec selects their sharder by this type."""


def build_collections(specs: Iterable[TableSpec]) -> nn.ModuleList:
    """Sharded tables as EmbeddingCollections on the meta device, one per ``TableSpec.collection``."""
    collections: dict[tuple[int, bool], list[EmbeddingConfig]] = {}
    for spec in specs:
        if not spec.replicated:
            config = EmbeddingConfig(
                name=spec.name,
                num_embeddings=spec.rows,
                embedding_dim=spec.stored_dim,
                feature_names=list(spec.features),
                init_fn=lambda _: None,  # hstu.parallel.tables writes the initial rows once the shards exist
            )
            collections.setdefault(spec.collection, []).append(config)
    return nn.ModuleList(
        (DynamicEmbeddingCollection if dynamic else EmbeddingCollection)(tables=tables, device=torch.device("meta"))
        for (_, dynamic), tables in collections.items()
    )


class ReplicatedTables(nn.Module):
    """The data_parallel tables: each rank has all rows.

    Gradients are sparse on a CPU, so the cost of a step is proportional to the rows looked up. They are dense on a GPU:
    the host cannot count the distinct rows, and DDP averages the gradients.
    """

    def __init__(self, specs: Iterable[TableSpec], seed: int, item_feature: str) -> None:
        super().__init__()
        self.specs = {spec.name: spec for spec in specs if spec.replicated}
        self._item_feature = item_feature
        self.tables = nn.ModuleDict()
        for spec in self.specs.values():
            weight = torch.empty(spec.rows, spec.dim)
            for first, rows in initial_row_blocks(spec, seed, 0, spec.rows):
                weight[first : first + len(rows)] = rows
            self.tables[_module_name(spec.name)] = nn.Embedding(spec.rows, spec.dim, _weight=weight)

    def weight(self, table: str) -> nn.Parameter:
        """Rows of one table, [rows, dim]."""
        return self.tables[_module_name(table)].get_parameter("weight")

    def weights(self) -> dict[str, nn.Parameter]:
        """Table → rows."""
        return {name: self.weight(name) for name in self.specs}

    def forward(self, batch: HSTUBatch) -> dict[str, Tensor]:
        """Rows float32 [n, dim] of a batch's ids and of its pool of negatives, by the keys of replicated tables."""
        rows: dict[str, Tensor] = {}
        if not self.specs:
            return rows
        ids, pool = batch.features.to_dict(), batch.negatives
        pool_features = {} if pool.pool_features is None else pool.pool_features.to_dict()
        for name, weight in self.weights().items():
            for feature in self.specs[name].features:
                rows[feature] = look_up(ids[feature].values(), weight)
                if feature in pool_features:
                    rows[of_pool(feature)] = look_up(pool_features[feature].values(), weight)
                if feature == self._item_feature and pool.pool_ids is not None:
                    rows[POOL] = look_up(pool.pool_ids, weight)
        return rows


def _module_name(table: str) -> str:
    return table.replace(".", "/")
