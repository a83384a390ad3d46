"""Measure how training scales from one rank to two, with one thread and one core per rank; prints one JSON object.

python scripts/bench/scaling_cpu.py retrieval|ranking|random [--steps 4 --rounds 5]

"retrieval" and "ranking" are configs/ml_1m_*.gin and need their data, "random" is benchmark_ranking_balanced.gin made
small; in all of them the item table is sharded row-wise. Weak scaling: each rank has as many sequences as the single
rank; strong scaling: half as many, so that the global batch is the same. "two alone" are two independent processes,
which show what the machine allows. All processes are started first and then take turns. In each round, all of them
train on the same sequences; results are medians over the rounds.

A step consists of communication (the main thread is blocked by a collective that all ranks have begun), waiting (it is
blocked by one that another rank has not begun yet), getting the batch, and computation, which is the rest. A table is
printed to standard error.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from collective_clock import CollectiveClock, Times, split
from harness import ROOT, command_line, publish

WARM_UP_STEPS = 2
ROW_WISE = (
    'item/EmbeddingArgs.feature_names = ["movie_id"]',
    'item/EmbeddingArgs.table_name = "item"',
    "item/EmbeddingArgs.item_vocab_size_or_capacity = 4000",
    'item/EmbeddingArgs.sharding_type = "model_parallel"',
    'item/EmbeddingArgs.sharding = "row_wise"',
)
SMALL = (
    'item/EmbeddingArgs.sharding = "row_wise"',
    "item/EmbeddingArgs.item_vocab_size_or_capacity = 200000",
    "user/EmbeddingArgs.item_vocab_size_or_capacity = 200000",
    "items/FeatureArgs.max_sequence_length = 512",
    "lengths/RandomDistribution.mean = 128",
    "BenchmarkDatasetArgs.num_generated_batches = 64",
    "NetworkArgs.num_layers = 2",
    "NetworkArgs.hidden_size = 256",
    "NetworkArgs.kv_channels = 64",
    'NetworkArgs.dtype_str = "float32"',
    'NetworkArgs.kernel_backend = "pytorch"',
)
TWO_HEADS = ("NetworkArgs.num_attention_heads = 2", "NetworkArgs.kv_channels = 25")
CASES = {  # gin file, task, sequences of the one rank, bindings
    "retrieval": ("configs/ml_1m_retrieval.gin", "retrieval", 128, (*ROW_WISE, *TWO_HEADS)),
    "ranking": ("configs/ml_1m_ranking.gin", "ranking", 32, ROW_WISE),
    "random": ("configs/benchmark_ranking_balanced.gin", "ranking", 16, SMALL),
}
PARTS = ("compute", "data", "communication", "waiting")
ALONE, TOGETHER = "1 rank", "two alone"


def variants_of(case: str, ranks: int, tp_size: int) -> dict[str, Variant]:
    """Name → variant, for this number of ranks."""
    gin_file, task, sequences, bindings = CASES[case]

    def variant(batch_size: int, balanced: bool) -> Variant:
        lines = (
            *bindings,
            f"TrainerArgs.train_batch_size = {batch_size}",
            f"TrainerArgs.enable_balanced_shuffler = {balanced}",
            f"TensorModelParallelArgs.tensor_model_parallel_size = {tp_size}",
            f"NetworkArgs.sequence_parallel = {tp_size > 1}",
            'TrainerArgs.pipeline_type = "none"',
        )
        return Variant(str(ROOT / gin_file), task, lines)

    if ranks == 1:
        return {ALONE: variant(sequences, False), TOGETHER: variant(sequences, False)}
    sizes = {"weak": sequences, "strong": sequences // ranks}
    if tp_size > 1:
        return {f"{name}, tp 2": variant(size, False) for name, size in sizes.items()}
    return {f"{name}{end}": variant(size, bool(end)) for name, size in sizes.items() for end in ("", ", balanced")}


def start(world: World) -> list[Connection]:
    """Start the processes of a world. Returns a pipe to each rank, in rank order."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    pipes = []
    mine = os.sched_getaffinity(0)
    for rank, core in enumerate(world.cores):
        ours, theirs = context.Pipe()
        os.sched_setaffinity(0, {core})  # a child inherits it, for all of its threads
        context.Process(target=serve, args=(theirs, world, rank, port), daemon=True).start()
        os.sched_setaffinity(0, mine)
        theirs.close()  # so that reading from a rank that died raises EOFError
        pipes.append(ours)
    return pipes


def train(pipes: list[Connection], variant: str, steps: int) -> dict[str, float]:
    """Train with all ranks of ``pipes`` on the sequences that a single rank has in ``steps`` steps.

    Returns milliseconds per step (mean over the ranks) and rates (sum over the ranks).
    """
    steps = steps // 2 if variant.startswith("weak") else steps
    for pipe in pipes:
        pipe.send((variant, steps))
    ranks: list[Measured] = [pipe.recv() for pipe in pipes]
    together = variant != TOGETHER  # independent processes never wait for each other
    alone = [rank.ended - rank.begun for rank in ranks]
    elapsed = [max(rank.ended for rank in ranks) - min(rank.begun for rank in ranks)] * len(ranks)
    seconds = elapsed if together else alone
    begun = [rank.times.begun for rank in ranks]
    parts = [split(rank.times, begun if together else begun[:0]) for rank in ranks]
    share = 1e3 / steps / len(ranks)
    communication, waiting = (share * sum(part[index] for part in parts) for index in (0, 1))
    data = share * sum(rank.data_s for rank in ranks)
    step_ms = share * sum(alone)
    return {
        "steps": steps,
        "tokens": sum(rank.tokens for rank in ranks),
        "step_ms": step_ms,
        "compute_ms": step_ms - data - communication - waiting,
        "data_ms": data,
        "communication_ms": communication,
        "waiting_ms": waiting,
        "sequences_per_s": sum(rank.sequences / each for rank, each in zip(ranks, seconds, strict=True)),
        "tokens_per_s": sum(rank.tokens / each for rank, each in zip(ranks, seconds, strict=True)),
    }


def measure(case: str, cores: tuple[int, int], steps: int, rounds: int) -> list[dict[str, dict[str, float]]]:
    """One entry per round: variant → summary."""
    worlds = {
        "first": World(cores[:1], 1, variants_of(case, 1, 1)),
        "second": World(cores[1:], 1, variants_of(case, 1, 1)),
        "data parallel": World(cores, 1, variants_of(case, 2, 1)),
        "tensor parallel": World(cores, 2, variants_of(case, 2, 2)),
    }
    pipes = {name: start(world) for name, world in worlds.items()}
    for pipe in (pipe for of_world in pipes.values() for pipe in of_world):
        pipe.recv()
    turns = {variant: pipes[name] for name, world in worlds.items() for variant in world.variants if name != "second"}
    turns[TOGETHER] = pipes["first"] + pipes["second"]
    order, measured = list(turns), []
    for variant, of_variant in turns.items():
        train(of_variant, variant, WARM_UP_STEPS)
    for _ in range(rounds):
        measured.append({variant: train(turns[variant], variant, steps) for variant in order})
        order = order[1:] + order[:1]  # no variant always follows the same one
    for pipe in (pipe for of_world in pipes.values() for pipe in of_world):
        pipe.send(None)
    return measured


def medians(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Variant → medians over the rounds.

    A share is that of a step. speed_up: tokens per second relative to the single rank in the same round.
    """
    result = {}
    first = (ALONE, TOGETHER)
    for name in sorted(rounds[0], key=lambda name: first.index(name) if name in first else len(first)):
        result[name] = {key: round(statistics.median(row[name][key] for row in rounds), 2) for key in rounds[0][name]}
        for part in PARTS:
            shares = [row[name][f"{part}_ms"] / row[name]["step_ms"] for row in rounds]
            result[name][f"{part}_share"] = round(statistics.median(shares), 4)
        ratios = [row[name]["tokens_per_s"] / row[ALONE]["tokens_per_s"] for row in rounds]
        spread = {"speed_up": statistics.median(ratios), "speed_up_min": min(ratios), "speed_up_max": max(ratios)}
        result[name] |= {key: round(ratio, 3) for key, ratio in spread.items()}
    return result


def table(result: dict[str, dict[str, float]]) -> str:
    """The medians as Markdown."""
    lines = [
        "| | tokens/s | speed-up | ms per step | compute | batch | communication | waiting |",
        "|---|" + "---:|" * 7,
    ]
    for name, row in result.items():
        shares = " | ".join(f"{100 * row[f'{part}_share']:.1f} %" for part in PARTS)
        lines.append(
            f"| {name} | {row['tokens_per_s']:,.0f} | {row['speed_up']:.2f} | {row['step_ms']:.0f} | {shares} |"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Variant:
    """A way to train: a gin file with bindings."""

    gin_file: str
    task: str
    bindings: tuple[str, ...]


@dataclass(frozen=True)
class World:
    """The processes that train together. Rank ``r`` runs on core ``cores[r]``."""

    cores: tuple[int, ...]
    tp_size: int
    variants: dict[str, Variant]


@dataclass
class Measured:
    """Some steps of one rank.

    Begun, ended: seconds on CLOCK_MONOTONIC; data_s: time to get batches, without ``times``; working_s: processor time
    of the main thread, which a blocked thread does not use, for each step.
    """

    begun: float
    ended: float
    data_s: float
    sequences: int
    tokens: int
    times: Times = field(default_factory=Times)
    working_s: list[float] = field(default_factory=list)


def serve(pipe: Connection, world: World, rank: int, port: int) -> None:
    """In the process of a rank: train for each (variant, steps) from ``pipe`` and send Measured, until None arrives."""
    os.environ.update(_launcher_environment(world, rank, port))
    # Imported here, after the environment is set and the process has one core, so that libraries start one thread.
    import torch
    from training import prepare

    from hstu.data.batches.batch import HSTUBatch
    from hstu.observe.logging import quiet_libraries
    from hstu.parallel import mesh as meshes
    from hstu.parallel.ddp import ReplicatedDense
    from hstu.train.flops import FlopCounter

    class Timed:
        """Iterates over batches and adds up the time to get them."""

        def __init__(self, batches: Iterator[HSTUBatch], clock: CollectiveClock) -> None:
            self.batches, self.clock, self.seconds = batches, clock, 0.0

        def __iter__(self) -> Iterator[HSTUBatch]:
            return self

        def __next__(self) -> HSTUBatch:
            begun, blocked = time.monotonic(), self.clock.times.blocked_s
            batch = next(self.batches)
            self.seconds += time.monotonic() - begun - (self.clock.times.blocked_s - blocked)
            return batch

    quiet_libraries()
    clock = CollectiveClock()
    mesh = meshes.start(tensor_parallel_size=world.tp_size)
    torch.set_num_threads(1)
    prepared = {}
    for name, variant in world.variants.items():
        run = prepare(variant.gin_file, variant.bindings, variant.task, mesh)
        if isinstance(run.model.dense, ReplicatedDense):
            clock.watch(run.model.dense)
        flops = FlopCounter(run.config.network, run.source.roles)
        prepared[name] = run.pipeline, Timed(run.batches(), clock), flops
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        name, steps = order
        pipeline, batches, flops = prepared[name]
        torch.distributed.barrier()
        clock.restart()
        batches.seconds = 0.0
        measured = Measured(time.monotonic(), 0.0, 0.0, 0, 0)
        for _ in range(steps):
            worked = time.thread_time()
            batch = pipeline.progress(batches).batch
            measured.working_s.append(time.thread_time() - worked)
            measured.sequences += batch.real_batch_size
            measured.tokens += flops.count(batch)[0]
        measured.ended, measured.data_s, measured.times = time.monotonic(), batches.seconds, clock.restart()
        pipe.send(measured)
    meshes.finish()


def _launcher_environment(world: World, rank: int, port: int) -> dict[str, str]:
    """The environment variables that torchrun sets."""
    ranks: Sequence[int] = world.cores
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(ranks), "LOCAL_WORLD_SIZE": len(ranks)}
    fixed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return {name: str(value) for name, value in names.items()} | fixed


def main() -> None:
    """Measure one case."""
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("case", choices=tuple(CASES))
    parser.add_argument("--steps", type=int, default=4, help="timed steps of the single rank per round, an even number")
    parser.add_argument("--cores", type=int, nargs=2, default=(0, 1))
    options = parser.parse_args()
    os.chdir(ROOT)  # preprocessed data is named relative to it
    rounds = measure(options.case, tuple(options.cores), options.steps, options.rounds)
    result = medians(rounds)
    print(table(result), file=sys.stderr)
    given = {"steps": options.steps, "rounds": options.rounds}
    gin_file, _, sequences, bindings = CASES[options.case]
    case = {"gin_file": gin_file, "sequences_of_one_rank": sequences, "bindings": bindings}
    machine = platform.processor() or platform.machine()
    publish({"case": options.case, **given, **case, "machine": machine, "medians": result, "each": rounds})


if __name__ == "__main__":
    main()
