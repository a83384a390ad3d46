"""Time dynamic tables beside FBGEMM's static tables on one device: mapping ids to slots, and whole training steps.

    python scripts/bench/dynamic.py [--device cuda] [--output docs/benchmarks/dynamic/gpu.json]

Ids are Zipf-distributed. In the stream "fits" every id has a row from the start; in "evicts" there are several ids per
row. Static tables have as many rows, into which ids are hashed. A training step exchanges ids (with one rank), maps
them to rows, looks the rows up and updates them in backward by rowwise_adagrad. "cached" is a table in host memory with
a cache in GPU memory; "split" has rows in both memories. All run in turn in every round. Times are by the wall clock,
and every step starts and ends with an idle device.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from harness import WARM_UP, Row, attempt, begin, finish, operator_command_line, time_in_turn
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from hstu.base.hashing import hash_ids
from hstu.config.args import DynamicEmbeddingArgs, EmbeddingArgs, NetworkArgs, OptimizerArgs, PrecisionArgs
from hstu.data.batches.batch import keyed_jagged
from hstu.data.features.roles import FeatureRoles
from hstu.model.embedding import table_specs
from hstu.model.gr_model import GRModel
from hstu.observe.logging import quiet_libraries
from hstu.ops.select import select_slot_kernels
from hstu.parallel import mesh as meshes
from hstu.parallel.dynamic.create import CpuSlots
from hstu.parallel.dynamic.slots import Counters, Policy, SlotTable, TorchSlots, score
from hstu.parallel.dynamic.table import DynamicTable
from hstu.parallel.table_optimizer import TableOptimizer
from hstu.parallel.tables import dynamic_tables, shard

LEARNING_RATE = 0.01
SCATTER = 0x9E3779B97F4A7C15
"""Factor that spreads popularity ranks over all of int64."""
POLICIES: tuple[Policy, ...] = ("lru", "lfu")
BASELINE = "static TBE"
SIZES = {"cpu": (4096, 4096, 8), "cuda": (10_000_000, 1 << 20, 128)}
"""Default rows, lookups and columns for each device."""
Step = Callable[[int], object]
"""Takes the number of the batch."""


def zipf(rng: np.random.Generator, count: int, options: argparse.Namespace) -> np.ndarray:
    """Ids int64 [count] of a bounded Zipf distribution, by inversion of its continuous distribution function."""
    power = 1 - options.alpha
    ranks = ((options.distinct**power - 1) * rng.random(count) + 1) ** (1 / power)
    return (ranks.astype(np.uint64) * np.uint64(SCATTER)).view(np.int64)


class Stream:
    """Batches of Zipf-distributed ids on the device, raw and hashed into the rows of the table: one per round."""

    def __init__(self, distinct: int, options: argparse.Namespace, device: torch.device) -> None:
        bounds = argparse.Namespace(alpha=options.alpha, distinct=distinct)
        rng = np.random.default_rng(distinct)
        drawn = [zipf(rng, options.lookups, bounds) for _ in range(WARM_UP + options.rounds)]
        lengths = np.full(len(drawn[0]) // options.sequence_length, options.sequence_length)
        self.offsets = torch.arange(len(lengths) + 1, device=device) * options.sequence_length
        self.ids = [torch.from_numpy(ids).to(device) for ids in drawn]
        self.raw = [keyed_jagged({"item": ids}, {"item": lengths}).to(device) for ids in drawn]
        rows = [hash_ids(ids, options.rows) for ids in drawn]
        self.hashed = [keyed_jagged({"item": ids}, {"item": lengths}).to(device) for ids in rows]


def fill(slots: SlotTable, device: torch.device) -> None:
    """Give a slot to every id of the stream "fits", as if each had occurred once in a first batch."""
    ids = torch.from_numpy((np.arange(1, slots.capacity, dtype=np.uint64) * np.uint64(SCATTER)).view(np.int64))
    ids = ids.to(device)
    slots.restore(ids, score(slots.policy, torch.ones_like(ids), 1))


def rows_of(steps: Mapping[str, Step], options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """One record per step function: median and fastest milliseconds, and the rate."""
    for name, times in time_in_turn(steps, device, options.rounds).items():
        row = {"ms": round(statistics.median(times), 3), "fastest_ms": round(min(times), 3)}
        yield {"variant": name, **row, "mega_ids_s": round(options.lookups / row["ms"] / 1e3, 2)}


def slot_kinds(
    report: Row, options: argparse.Namespace, device: torch.device
) -> dict[str, Callable[[Policy], SlotTable]]:
    """The implementations for the device. Where Triton cannot run, the report gets the reason."""
    kinds: dict[str, Callable[[Policy], SlotTable]] = {
        "PyTorch": lambda policy: TorchSlots(options.rows, policy, device=device)
    }
    if device.type != "cuda":
        return {"C++": lambda policy: CpuSlots(options.rows, policy), **kinds}
    kernels, unsupported_reason = select_slot_kernels(device)
    if kernels is None:
        report["no_triton"] = unsupported_reason
        return kinds
    return {"Triton": lambda policy: TorchSlots(options.rows, policy, 0, device, kernels), **kinds}


def look_up(table: SlotTable, stream: Stream, number: int) -> None:
    """Look a batch up without inserting ids."""
    table.lookup(stream.ids[number])


def assign(table: SlotTable, stream: Stream, first_step: int, number: int) -> None:
    """Look a batch up and insert its new ids, as in training."""
    table.assign(stream.ids[number], first_step + number)


def slots_report(streams: Mapping[str, Stream], report: Row, options: argparse.Namespace, device: torch.device) -> None:
    """Map ids to slots without touching rows: lookups alone, and training on both streams."""
    kinds = slot_kinds(report, options, device)
    tables = {f"{kind} {policy}": make(policy) for kind, make in kinds.items() for policy in POLICIES}
    for table in tables.values():
        fill(table, device)
    looked_up = {name: partial(look_up, table, streams["fits"]) for name, table in tables.items()}
    add_rows(report, "slots", looked_up, "fits, lookup only", options, device)
    first_step = 2
    for name, stream in streams.items():
        assigned = {kind: partial(assign, table, stream, first_step) for kind, table in tables.items()}
        add_rows(report, "slots", assigned, name, options, device)
        first_step += len(stream.ids)


def add_rows(
    report: Row, section: str, steps: Mapping[str, Step], stream: str, options: argparse.Namespace, device: torch.device
) -> None:
    """Time all steps on a stream, unless the report has them."""
    attempt(report, section, {"stream": stream}, lambda: list(rows_of(steps, options, device)), options.output)


def sharded_table(
    mesh: meshes.Mesh, rows: int, dim: int, optimizer: str, **dynamic: Any
) -> tuple[GRModel, TableOptimizer]:
    """A table of the feature "item", as in training; dynamic, if options of DynamicEmbeddingArgs are given."""
    common: dict[str, Any] = {"feature_names": ["item"], "table_name": "item", "item_vocab_size_or_capacity": rows}
    args: EmbeddingArgs = EmbeddingArgs(**common, sharding_type="model_parallel", sharding="row_wise")
    if dynamic:
        args = DynamicEmbeddingArgs(**common, **dynamic)
    network = NetworkArgs(num_layers=1, hidden_size=dim, num_attention_heads=1, kv_channels=4)
    specs = table_specs([args], network, FeatureRoles("item", None, ()), world_size=mesh.world_size)
    optimizer_args = OptimizerArgs(optimizer_str=optimizer, learning_rate=LEARNING_RATE)
    config: Any = SimpleNamespace(
        optimizer=optimizer_args, trainer=SimpleNamespace(seed=1, pipeline_type="none"), precision=PrecisionArgs()
    )
    return shard(GRModel(specs, nn.Identity(), ["item"], FeatureRoles("item", None, ()), seed=1), config, mesh)


class StaticTable:
    """FBGEMM's table-batched embedding without TorchRec."""

    def __init__(self, options: argparse.Namespace, device: torch.device, cached: bool) -> None:
        on_gpu = device.type == "cuda"
        fast = EmbeddingLocation.MANAGED_CACHING if cached else EmbeddingLocation.DEVICE
        location = fast if on_gpu else EmbeddingLocation.HOST
        self.table = SplitTableBatchedEmbeddingBagsCodegen(
            [(options.rows, options.dim, location, ComputeDevice.CUDA if on_gpu else ComputeDevice.CPU)],
            cache_load_factor=options.cached,
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=LEARNING_RATE,
            pooling_mode=PoolingMode.NONE,
            bounds_check_mode=BoundsCheckMode.FATAL,
        )
        for weight in self.table.split_embedding_weights():
            weight.zero_()

    def train(self, stream: Stream, grad: Tensor, number: int) -> None:
        """One training step."""
        self.table(stream.hashed[number].values(), stream.offsets).backward(grad)


class ShardedTable:
    """A sharded table as in training, static or dynamic."""

    def __init__(self, options: argparse.Namespace, mesh: meshes.Mesh, **dynamic: Any) -> None:
        """``dynamic``: options of DynamicEmbeddingArgs, for a dynamic table."""
        self.is_dynamic = bool(dynamic)
        self.model, self.optimizer = sharded_table(mesh, options.rows, options.dim, "rowwise_adagrad", **dynamic)
        for table in self.dynamic():
            fill(table.slots, table.rows.device)
            table.step = 1

    def dynamic(self) -> Sequence[DynamicTable]:
        """A list of the dynamic table; empty if the table is static."""
        return list(dynamic_tables(self.model).values())

    def train(self, stream: Stream, grad: Tensor, number: int) -> None:
        """One training step."""
        features: KeyedJaggedTensor = (stream.raw if self.is_dynamic else stream.hashed)[number]
        self.optimizer.zero_grad()
        self.model.embedding[0](features)["item"].values().backward(grad)
        self.optimizer.step()


def train_report(streams: Mapping[str, Stream], report: Row, options: argparse.Namespace, device: torch.device) -> None:
    """Training steps of whole tables, and their time relative to FBGEMM's table with all rows in GPU memory."""
    mesh = meshes.start()
    part = {"evict_strategy": "lru", "item_vocab_gpu_capacity_ratio": options.cached}
    kinds: dict[str, Callable[[], StaticTable | ShardedTable]] = {
        BASELINE: lambda: StaticTable(options, device, cached=False),
        "static TBE, cached": lambda: StaticTable(options, device, cached=True),
        "static, sharded": lambda: ShardedTable(options, mesh),
        **{f"dynamic {policy}": partial(ShardedTable, options, mesh, evict_strategy=policy) for policy in POLICIES},
        "dynamic lru, cached": lambda: ShardedTable(options, mesh, **part, caching=True),
        "dynamic lru, split": lambda: ShardedTable(options, mesh, **part, caching=False),
    }
    grad = torch.randn(options.lookups, options.dim, device=device) * 1e-3
    tables: dict[str, StaticTable | ShardedTable] = {}

    def try_out(name: str) -> list[Row]:
        table = kinds[name]()
        table.train(streams["fits"], grad, 0)
        tables[name] = table
        return [{}]

    for name in kinds:
        attempt(report, "tables", {"variant": name}, partial(try_out, name), options.output)

    def timed(stream: Stream) -> list[Row]:
        rows = list(
            rows_of({name: partial(each.train, stream, grad) for name, each in tables.items()}, options, device)
        )
        for row in rows:
            row["times_baseline"] = round(row["ms"] / rows[0]["ms"], 3)
            table = tables[row["variant"]]
            for dynamic in table.dynamic() if isinstance(table, ShardedTable) else ():
                counters = Counters(*dynamic.pop_figures()[1:-1].tolist())
                row["hit_rate"] = round(counters.hits / counters.lookups, 4)
                row["evictions_a_batch"] = counters.evictions // len(stream.ids)
        return rows

    for stream_name, stream in streams.items():
        attempt(report, "train", {"stream": stream_name}, partial(timed, stream), options.output)
    meshes.finish()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    add = (commands := operator_command_line(__doc__)).add_argument
    add("--rows", type=int, help="10 M on a GPU")
    add("--lookups", type=int, help="ids per batch; 1,048,576 on a GPU")
    add("--dim", type=int, help="columns; 128 on a GPU")
    add("--sequence-length", type=int, default=256, help="length of the sequences of a batch")
    add("--alpha", type=float, default=1.05, help="of Zipf's distribution")
    add("--pressure", type=int, default=5, help="distinct ids per row in the stream that evicts")
    add("--cached", type=float, default=0.1, help="share of the rows that a table in both memories has in GPU memory")
    options = commands.parse_args(argv)
    for name, size in zip(("rows", "lookups", "dim"), SIZES[options.device], strict=True):
        if getattr(options, name) is None:
            setattr(options, name, size)
    options.lookups -= options.lookups % options.sequence_length
    return options


def main() -> None:
    """Measure and print."""
    options = parse()
    quiet_libraries()
    device, report = begin(options)
    streams = {
        "fits": Stream(options.rows, options, device),
        "evicts": Stream(options.rows * options.pressure, options, device),
    }
    report |= {name: getattr(options, name) for name in ("rows", "lookups", "dim", "alpha", "pressure", "cached")}
    slots_report(streams, report, options, device)
    train_report(streams, report, options, device)
    finish(report, options)


if __name__ == "__main__":
    main()
