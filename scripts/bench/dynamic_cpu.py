"""Throughput of dynamic tables beside TorchRec's managed collision and a static table; prints one JSON object.

torchrun --nproc-per-node 2 scripts/bench/dynamic_cpu.py [--ids 100000000]

Every rank has its part of a Zipf stream with more distinct ids than the table has rows. First, ids are mapped to rows:
the whole stream by the C++ slots, and parts of it by the PyTorch slots and by MCH (MCH/n: new ids get rows after every
n batches). Then whole tables are trained, with exchange of ids and update of rows: dynamic tables, and static tables
with as many rows, into which ids are hashed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch
from harness import command_line, publish
from torch import nn
from torchrec import JaggedTensor
from torchrec.modules.mc_modules import LFU_EvictionPolicy, LRU_EvictionPolicy, MCHManagedCollisionModule

from hstu.base.hashing import hash_ids
from hstu.config.args import DynamicEmbeddingArgs, EmbeddingArgs, NetworkArgs, OptimizerArgs
from hstu.data.batches.batch import keyed_jagged
from hstu.data.features.roles import FeatureRoles
from hstu.model.embedding import table_specs
from hstu.model.gr_model import GRModel
from hstu.observe.logging import quiet_libraries
from hstu.parallel import mesh as meshes
from hstu.parallel.collectives import gather_objects
from hstu.parallel.dynamic.slot_tables import CpuSlots, TorchSlots
from hstu.parallel.dynamic.slots import Counters, Policy, SlotTable
from hstu.parallel.table_optimizer import TableOptimizer
from hstu.parallel.tables import dynamic_tables, shard

LEARNING_RATE = 0.01
SCATTER = 0x9E3779B97F4A7C15
"""Factor that spreads popularity ranks over all of int64."""


def zipf(rng: np.random.Generator, count: int, options: argparse.Namespace) -> np.ndarray:
    """Ids int64 [count] of a bounded Zipf distribution, by inversion of its continuous distribution function."""
    power = 1 - options.alpha
    ranks = ((options.distinct**power - 1) * rng.random(count) + 1) ** (1 / power)
    return (ranks.astype(np.uint64) * np.uint64(SCATTER)).view(np.int64)


def own_batches(mesh: meshes.Mesh, ids: int, options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """This rank's batches of a stream of ``ids`` ids over all ranks. Each rank draws its own ids."""
    rng = np.random.default_rng(mesh.rank)
    for _ in range(ids // mesh.world_size // options.batch):
        yield torch.from_numpy(zipf(rng, options.batch, options))


def rate(batches: Iterator[torch.Tensor], remap: Callable[[torch.Tensor], Any]) -> dict[str, float]:
    """Ids per second of ``remap``. The time to make the batches is not counted."""
    seconds, ids = 0.0, 0
    for batch in batches:
        begun = time.perf_counter()
        remap(batch)
        seconds += time.perf_counter() - begun
        ids += len(batch)
    return {"ids": ids, "ids_per_s": ids / seconds}


def slots_rate(table: SlotTable, batches: Iterator[torch.Tensor]) -> dict[str, float]:
    """The rate of a SlotTable, its hits, insertions and evictions, and memory after half and all of the stream."""
    counts, memory, step = torch.zeros(len(fields(Counters)), dtype=torch.int64), [], 0

    def remap(ids: torch.Tensor) -> None:
        nonlocal step
        step += 1
        counts.add_(table.assign(ids, step).counts)
        memory.append(psutil.Process().memory_info().rss)

    result: dict[str, float] = rate(batches, remap)
    counters = Counters(*counts.tolist())
    result["hit_rate"] = counters.hits / counters.lookups
    result |= {"insertions": counters.insertions, "evictions": counters.evictions, "rows": int(table.size())}
    return result | {"memory_half_mib": memory[len(memory) // 2] / 2**20, "memory_mib": memory[-1] / 2**20}


def mch_rate(policy: Any, capacity: int, interval: int, batches: Iterator[torch.Tensor]) -> dict[str, float]:
    """TorchRec's managed collision: what a sharded collection does with the ids of a training batch."""
    module = MCHManagedCollisionModule(capacity, torch.device("cpu"), policy, interval, input_hash_size=2**63 - 1)
    module.train()

    def remap(ids: torch.Tensor) -> None:
        ids = ids & torch.iinfo(torch.int64).max  # MCH does not accept negative ids
        features = {"table": JaggedTensor(values=ids, lengths=torch.tensor([len(ids)]))}
        module.profile(features)
        module.remap(features)
        module.evict()

    return rate(batches, remap)


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
    config: Any = SimpleNamespace(optimizer=optimizer_args, trainer=SimpleNamespace(seed=1, pipeline_type="none"))
    return shard(GRModel(specs, nn.Identity(), ["item"], FeatureRoles("item", None, ()), seed=1), config, mesh)


def trained(mesh: meshes.Mesh, options: argparse.Namespace, policy: str | None) -> dict[str, float]:
    """Ids per second of training a table: exchange, lookup, backward and update. policy None: a static table."""
    dynamic = {} if policy is None else {"evict_strategy": policy}
    model, optimizer = sharded_table(mesh, options.capacity, options.dim, options.optimizer, **dynamic)

    def step(ids: torch.Tensor) -> None:
        numbers = ids.numpy() if policy is not None else hash_ids(ids.numpy(), options.capacity)
        features = keyed_jagged({"item": numbers}, {"item": np.array([len(numbers)])})
        optimizer.zero_grad()
        rows = model.embedding[0](features)["item"].values()
        torch.autograd.backward([rows], [rows.detach()])
        optimizer.step()

    batches = own_batches(mesh, options.trained_ids, options)
    for _ in range(options.trained_warm_up):
        step(next(batches))
    for table in dynamic_tables(model).values():
        table.pop_figures()
    result = rate(batches, step)
    for table in dynamic_tables(model).values():
        result["hit_rate"] = table.counters.hits / max(1, table.counters.lookups)
    return result


def over_ranks(result: dict[str, float], mesh: meshes.Mesh) -> dict[str, float]:
    """Sum rates and counts over the ranks, and average the hit rate."""
    parts = gather_objects(result, mesh.world_group)
    return {
        name: round(sum(part[name] for part in parts) / (len(parts) if name == "hit_rate" else 1), 4) for name in result
    }


def main() -> None:
    """Measure on all ranks, and print on the first."""
    parser = command_line(__doc__)
    parser.add_argument("--ids", type=int, default=100_000_000, help="of the stream, over all ranks")
    parser.add_argument("--distinct", type=int, default=50_000_000)
    parser.add_argument("--alpha", type=float, default=1.05)
    parser.add_argument("--capacity", type=int, default=1_000_000, help="rows over all ranks")
    parser.add_argument("--batch", type=int, default=100_000, help="ids per rank and step")
    parser.add_argument(
        "--other-ids", type=int, default=8_000_000, help="ids of the part of the stream for MCH and PyTorch"
    )
    parser.add_argument(
        "--mch-intervals", type=int, nargs="+", default=[1, 10], help="batches after which MCH gives rows to new ids"
    )
    parser.add_argument("--trained-ids", type=int, default=6_000_000)
    parser.add_argument("--trained-warm-up", type=int, default=10, help="steps")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--optimizer", default="rowwise_adagrad")
    options = parser.parse_args()
    quiet_libraries()
    mesh = meshes.start()
    torch.set_num_threads(1)
    share = options.capacity // mesh.world_size
    remapped = {}
    policies: list[tuple[Policy, Any]] = [("lru", LRU_EvictionPolicy()), ("lfu", LFU_EvictionPolicy())]
    for name, policy in policies:
        runs: dict[str, Callable[[Iterator[torch.Tensor]], dict[str, float]]] = {
            "C++": partial(slots_rate, CpuSlots(share, name)),
            "PyTorch": partial(slots_rate, TorchSlots(share, name)),
            **{f"MCH/{n}": partial(mch_rate, policy, share, n) for n in options.mch_intervals},
        }
        for kind, run in runs.items():
            batches = own_batches(mesh, options.ids if kind == "C++" else options.other_ids, options)
            remapped[f"{kind} {name}"] = over_ranks(run(batches), mesh)
    training = {
        name: over_ranks(trained(mesh, options, policy), mesh)
        for name, policy in (("static", None), ("dynamic lru", "lru"), ("dynamic lfu", "lfu"))
    }
    if mesh.is_main:
        publish({"options": vars(options), "ranks": mesh.world_size, "remap": remapped, "train": training})
    meshes.finish()


if __name__ == "__main__":
    main()
