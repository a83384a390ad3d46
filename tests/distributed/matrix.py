"""Every way to spread a run over processes, against the single process: the matrix.

    python -m tests.distributed.matrix                    # the pairs of tests/distributed/test_matrix.py
    python -m tests.distributed.matrix --all              # all of it
    python -m tests.distributed.matrix --all --world 4 --tp 2 --json matrix.json

A line for each launch, then a summary; exit code 1 and the cases that fail, if any.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from hstu.base.errors import ConfigError
from hstu.checkpoint.state import TrainState
from hstu.config.rules import validate
from hstu.data.sampling.sampler import even_bounds
from hstu.parallel.mesh import Mesh
from tests.config.gin_files import ALL_RULES
from tests.distributed.launch import Launch, RankFailure, free_port, run_ranks, started_mesh
from tests.distributed.tensor_cases import RunOptions, consolidated, make_config, new_run, train_steps, write_store

TABLES = ("item_id", "action", "age", "genres", "year", "watched")
STEPS = 8
"""More than an epoch, which is 3 batches of the 23 users of ranking and 5 of the 33 of retrieval."""
RTOL = 1e-5
ATOL = 2.4e-7
"""Two units in the last place of 1: weights near zero are what is left of larger updates, summed in another order.

It is this small with adam_eps = 1e-4 (tensor_cases.py) and a small learning rate: of a gradient that cancels out to
nothing but rounding Adam and Adagrad make a step, learning_rate / adam_eps times as large.
"""


Row = TypeVar("Row", bound=tuple[Any, ...])
Sizes = tuple[int, int, int | None]
"""Ranks of a tensor-parallel, a context-parallel and a shard group."""


class Case(NamedTuple):
    """One cell: a level for each factor."""

    world: int
    tp: int
    cp: int
    sharding: str
    optimizer: str
    pipeline: str
    task: str
    by_tokens: bool
    """Sequence parallelism."""
    balanced: bool

    def __str__(self) -> str:
        parts = [f"{self.world} ranks", f"tp {self.tp}", f"cp {self.cp}", *self[3:7]]
        return ", ".join(parts + ["by tokens"] * self.by_tokens + ["balanced"] * self.balanced)

    @property
    def clips(self) -> bool:
        """Whether gradients are clipped: with one of the pipelines, for it is no factor of its own."""
        return self.pipeline == "native"

    @property
    def dense_sharding(self) -> str:
        """DataParallelArgs.sharding: each kind meets most other levels, though it is no factor of its own."""
        kinds = ("none", "optimizer", "weights")
        return kinds[(self.balanced + 2 * (self.pipeline == "prefetch") + (self.task == "retrieval")) % 3]

    @property
    def shard_group_size(self) -> int | None:
        """DataParallelArgs.shard_group_size: with some levels, on the ranks that can be two groups of two."""
        return 2 if self.world == 4 and self.tp == 1 and (self.clips or self.balanced) else None

    @property
    def is_refused(self) -> bool:
        """One moment a row cannot be kept by ranks that have parts of a row: the configuration is refused."""
        return self.optimizer == "rowwise_adagrad" and self.sharding == "column_wise"


FACTORS: dict[str, tuple[Any, ...]] = {
    "world": (1, 2, 4),
    "tp": (1, 2, 4),
    "cp": (1, 2, 4),
    "sharding": ("row_wise", "table_wise", "column_wise", "data_parallel"),
    "optimizer": ("sgd", "rowwise_adagrad", "adam"),
    "pipeline": ("none", "native", "prefetch"),
    "task": ("ranking", "retrieval"),
    "by_tokens": (False, True),
    "balanced": (False, True),
}


def all_cases() -> list[Case]:
    """The whole matrix: all combinations that mean something, those that are refused among them."""
    return [case for case in (Case(*levels) for levels in product(*FACTORS.values())) if _means_something(case)]


def pairwise_cases() -> list[Case]:
    """The few of them, none refused, in which all pairs of levels meet."""
    return covering([case for case in all_cases() if not case.is_refused])


def _means_something(case: Case) -> bool:
    # Groups are made of ranks, tokens are split within a group, and one rank has no one to share a batch with.
    in_groups = case.tp * case.cp <= case.world
    return in_groups and (case.tp > 1 or not case.by_tokens) and (case.world > 1 or not case.balanced)


def pairs(row: tuple[Any, ...]) -> set[tuple[tuple[int, Any], tuple[int, Any]]]:
    """The pairs of levels that meet in a row: (factor, its level) twice."""
    return set(combinations(enumerate(row), 2))


def covering(rows: Sequence[Row]) -> list[Row]:
    """Some of ``rows``, which are all that may be, with every pair that is in any of them.

    Greedy: the row with most of the pairs that are missing, of equals the first, until none is missing.
    """
    of_row = {row: pairs(row) for row in rows}
    missing = set().union(*of_row.values())
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(of_row[row] & missing))
        chosen.append(best)
        missing -= of_row[best]
    return chosen


def alone(case: Case) -> Case:
    """The single process that a case is compared with.

    It differs by what a user does not expect to change the numbers. Gradients of replicated tables are clipped with
    those of the dense part, and rowwise_adagrad means adagrad for them.
    """
    differs = case.sharding == "data_parallel" and (case.clips or "adagrad" in case.optimizer)
    sharding = "data_parallel" if differs else "row_wise"
    return Case(1, 1, 1, sharding, case.optimizer, "none", case.task, by_tokens=False, balanced=False)


def options(case: Case, clips: bool) -> RunOptions:
    """The run of a case."""
    replicated = case.sharding == "data_parallel"
    sgd_rate = 0.8 if case.task == "ranking" else 0.4  # all weights of both move enough to be compared
    return {
        "task": case.task,
        "optimizer": case.optimizer,
        "sharding": "auto" if replicated else case.sharding,
        "replicated": TABLES if replicated else (),
        "pipeline": case.pipeline,
        "learning_rate": sgd_rate if case.optimizer == "sgd" else 0.005,
        "bindings": [
            f"TensorModelParallelArgs.tensor_model_parallel_size = {case.tp}",
            f"ContextParallelArgs.context_parallel_size = {case.cp}",
            f"NetworkArgs.sequence_parallel = {case.by_tokens}",
            f"TrainerArgs.enable_balanced_shuffler = {case.balanced}",
            f"DataParallelArgs.sharding = {case.dense_sharding!r}",
            *([f"DataParallelArgs.shard_group_size = {case.shard_group_size}"] * (case.dense_sharding != "none")),
            f"TrainerArgs.max_grad_norm = {0.5 if clips else 0.0}",
            # Of the two encodings one is added to tokens, the other to what heads compute.
            f"NetworkArgs.position_encoding = {'absolute' if case.task == 'ranking' else 'relative_bias'!r}",
            f"NetworkArgs.max_attention_span = {8 if case.task == 'ranking' else None}",
            *(["RetrievalArgs.item_tower = True", "RetrievalArgs.mask_seen = True"] * (case.task == "retrieval")),
            # Divided by the longest sequence attention is so little that sgd hardly moves its weights.
            "NetworkArgs.scaling_seqlen = 1",
        ],
    }


def run(cases: Sequence[Case], store: str) -> dict[Case, list[str]]:
    """Run the cases, none refused, in one launch for each number of ranks; what is wrong with each, or nothing."""
    results: dict[Case, list[str]] = {}
    expected: dict[str, Any] = {}
    for world in sorted({1, *(case.world for case in cases)}):
        here = [case for case in cases if case.world == world]
        groups: dict[Sizes, dict[str, RunOptions]] = {}
        if world == 1:
            groups[1, 1, None] = {_reference(case): options(alone(case), case.clips) for case in cases}
        for case in here:
            groups.setdefault((case.tp, case.cp, case.shard_group_size), {})[str(case)] = options(case, case.clips)
        try:
            ranks = _launch(store, world, groups)
        except RankFailure as failure:
            if world == 1:  # then there is nothing to compare with
                raise
            print(failure, file=sys.stderr)
            last_line = failure.stderr.strip().rpartition("\n")[-1]
            results |= {case: [f"in a launch that failed: {last_line}"] for case in here}
            continue
        if world == 1:
            expected = ranks[0]
        results |= {case: _problems(case, [rank[str(case)] for rank in ranks], expected) for case in here}
    return results


def not_refused(case: Case, store: str) -> list[str]:
    """What is wrong with a case that must be refused before anything is started."""
    config = make_config(store, case.world, **options(case, case.clips))
    try:
        validate(config, case.world, rules=ALL_RULES)
    except ConfigError as error:
        tables = [problem for problem in error.problems if "EmbeddingArgs.sharding = 'column_wise'" in problem]
        return [] if len(tables) == len(error.problems) == len(TABLES) else [f"refused for another reason: {error}"]
    return ["accepted"]


def _reference(case: Case) -> str:
    return f"reference: {alone(case)}{', clipped' if case.clips else ''}"


def _launch(store: str, world: int, by_sizes: dict[Sizes, dict[str, RunOptions]]) -> list[Any]:
    groups = [Group(*sizes, free_port(), cases) for sizes, cases in by_sizes.items()]
    timeout_s = 120.0 + 10 * sum(len(cases) for cases in by_sizes.values())
    return run_ranks(Launch(world, timeout_s), run_groups, store, groups)


@dataclass(frozen=True)
class Group:
    """Runs in groups of ``tp`` tensor-parallel and ``cp`` context-parallel ranks, which meet at ``port``."""

    tp: int
    cp: int
    shards: int | None
    """Size of the shard groups."""
    port: int
    runs: dict[str, RunOptions]


def run_groups(store: str, groups: Sequence[Group]) -> dict[str, Any]:
    """On a rank: the runs of all groups, name → what ``_train`` returns."""
    results = {}
    for group in groups:
        os.environ["MASTER_PORT"] = str(group.port)
        with started_mesh(group.tp, group.cp, group.shards) as mesh:
            results |= {name: _train(mesh, store, run) for name, run in group.runs.items()}
    return results


def _train(mesh: Mesh, store: str, run: RunOptions) -> dict[str, Any]:
    """The losses, the users that this rank trained on in each step, and the whole weights before and after."""
    config = make_config(store, mesh.world_size, **run)
    validate(config, mesh.world_size, rules=ALL_RULES)
    source, state = new_run(mesh, config)
    told: dict[str, Any] = {"losses": [], "users": [], "initial": _weights(state, mesh)}
    for result in train_steps(mesh, config, source, state, STEPS):
        told["losses"].append(float(result.loss))
        told["users"].append(result.batch.user_ids[: result.batch.real_batch_size].tolist())
    try:
        return told | {"weights": _weights(state, mesh)}
    except AssertionError as error:  # raised on all ranks alike, and other cases follow
        return told | {"weights": {}, "unequal": str(error)}


def _weights(state: TrainState, mesh: Mesh) -> dict[str, Any]:
    """On the main rank those of a single process; the other ranks help."""
    whole = consolidated(state, mesh)
    return {name: values for name, values in whole.items() if name.startswith("model.")} if mesh.is_main else {}


def _problems(case: Case, ranks: list[Any], expected: dict[str, Any]) -> list[str]:
    reference = expected[_reference(case)]
    return [*_too_easy(reference), *_other_numbers(ranks, reference), *_other_samples(case, ranks, reference)]


def _too_easy(reference: Any) -> Iterable[str]:
    """Weights that move so little that a wrong gradient would not show, and a run without an uneven batch."""
    sizes = [len(users) for users in reference["users"]]
    if min(sizes[:-1]) == max(sizes):
        yield f"the single process's batches are {sizes}: no epoch ends with a smaller one"
    for name, final in reference["weights"].items():
        moved = np.abs(np.subtract(final, reference["initial"][name])).max()
        is_trained = ".numbers." not in name  # the statistics of numbers stay
        if is_trained and moved < 4 * (RTOL * np.abs(final).max() + ATOL):
            yield f"{name} moves by {moved:.1e} only in the single process"


def _other_numbers(ranks: list[Any], reference: Any) -> Iterable[str]:
    """Losses of all ranks and consolidated weights that are not those of the single process."""
    for rank, told in enumerate(ranks):
        yield from _far(f"losses of rank {rank}", told["losses"], reference["losses"], 0.0)
    if "unequal" in ranks[0]:
        yield f"ranks that should have the same weights differ: {ranks[0]['unequal']}"
        return
    weights = ranks[0]["weights"]
    if weights.keys() != reference["weights"].keys():
        yield f"in one of them only: {sorted(weights.keys() ^ reference['weights'].keys())}"
        return
    for name, weight in reference["weights"].items():
        yield from _far(name, weights[name], weight, ATOL)


def _far(name: str, actual: Any, expected: Any, atol: float) -> Iterable[str]:
    left, right = np.array(actual), np.array(expected)
    if left.shape != right.shape:
        yield f"{name} has the shape {left.shape}, not {right.shape}"
        return
    over = np.abs(left - right) - RTOL * np.abs(right) - atol
    if not (over <= 0).all():  # NaN is far, too
        yield f"{name}: {(~(over <= 0)).sum()} of {over.size} are off, by up to {over.max():.1e} more than allowed"


def _other_samples(case: Case, ranks: list[Any], reference: Any) -> Iterable[str]:
    """Ranks share the single process's batches: in contiguous shares, or else where they are balanced."""
    moved = False
    for step, whole in enumerate(reference["users"]):
        shares = [rank["users"][step] for rank in ranks]
        if sorted(user for share in shares for user in share) != sorted(whole):
            yield f"step {step}: ranks have the users {shares}, the single process {whole}"
        bounds = even_bounds(0, len(whole), case.world)
        moved |= shares != [whole[begin:end] for begin, end in pairwise(bounds)]
    if moved != case.balanced:
        yield f"samples {'were' if moved else 'were not'} moved between ranks"


def main(argv: Sequence[str] | None = None) -> int:
    """See the head of this file."""
    parser = argparse.ArgumentParser(prog="python -m tests.distributed.matrix")
    parser.add_argument("--all", action="store_true", help="the whole matrix, not only what covers its pairs")
    parser.add_argument("--world", type=int, choices=FACTORS["world"], help="only on this many ranks")
    parser.add_argument("--tp", type=int, choices=FACTORS["tp"], help="only with groups of this many ranks")
    parser.add_argument("--cp", type=int, choices=FACTORS["cp"], help="only with context-parallel groups of this many")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result of each case")
    args = parser.parse_args(argv)
    refused = [case for case in all_cases() if case.is_refused]
    wanted = all_cases() if args.all else [*pairwise_cases(), *refused]
    given = {name: getattr(args, name) for name in ("world", "tp", "cp") if getattr(args, name) is not None}
    wanted = [case for case in wanted if all(getattr(case, name) == size for name, size in given.items())]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hstu-matrix-") as directory:
        store = f"{directory}/store"
        write_store(Path(store))
        results = dict(_run_by_grid(wanted, store))
    failed = {str(case): problems for case, problems in results.items() if problems}
    ran = sum(not case.is_refused for case in results)
    print(f"{ran} runs and {len(results) - ran} refusals in {time.monotonic() - begun:.0f} s, {len(failed)} failed")
    for name, problems in failed.items():
        print(f"FAILED {name}\n  " + "\n  ".join(problems))
    if args.json:
        told = {
            str(case): problems or ["refused" if case.is_refused else "equal"] for case, problems in results.items()
        }
        args.json.write_text(json.dumps(told, indent=1) + "\n")
    return 1 if failed or not results else 0


def _run_by_grid(cases: Sequence[Case], store: str) -> Iterable[tuple[Case, list[str]]]:
    """Run the cases, a launch for each number of ranks and size of groups."""
    for sizes in dict.fromkeys(case[:3] for case in cases):
        begun, here = time.monotonic(), [case for case in cases if case[:3] == sizes]
        results = run([case for case in here if not case.is_refused], store)
        results |= {case: not_refused(case, store) for case in here if case.is_refused}
        equal = sum(not problems for problems in results.values())
        seconds = time.monotonic() - begun
        world, tp, cp = sizes
        told = f"{equal} of {len(results)} cases as they must be, {seconds:.0f} s"
        print(f"{world} ranks, tp {tp}, cp {cp}: {told}", flush=True)
        yield from results.items()


if __name__ == "__main__":
    sys.exit(main())
