"""Every two settings of parallelism that may meet do meet in a run that must equal the single process."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu.checkpoint.state import TrainState
from hstu.config.args import Task
from hstu.config.rules import validate
from hstu.data.sampling.sampler import even_bounds
from hstu.parallel.mesh import Mesh
from tests.config.gin_files import ALL_RULES
from tests.distributed.launch import Launch, free_port, run_ranks, started_mesh
from tests.distributed.tensor_cases import RunOptions, consolidated, make_config, new_run, train_steps, write_store

TABLES = ("item_id", "action", "age", "genres", "year", "watched")
RETRIEVAL = (
    "RetrievalArgs.item_tower = True",
    "RetrievalArgs.mask_seen = True",
    "RetrievalArgs.later_target_weights = [0.5, 0.25]",
)
STEPS = 6
"""More than an epoch, which is 3 batches of the 23 users of ranking and 5 of the 33 of retrieval."""
RTOL = 1e-5
ATOL = 2.4e-7
"""Two units in the last place of 1: weights near zero are what is left of larger updates, summed in another order.

It is this small with adam_eps = 1e-4 (tensor_cases.py) and a small learning rate: of a gradient that cancels out to
nothing but rounding Adam and Adagrad make a step, learning_rate / adam_eps times as large.
"""


Row = TypeVar("Row", bound=tuple[Any, ...])


class Case(NamedTuple):
    """A run: a level for each factor."""

    world: int
    tp: int
    cp: int
    sharding: str
    optimizer: str
    pipeline: str
    dense_sharding: str
    task: Task
    by_tokens: bool
    """Sequence parallelism."""
    balanced: bool

    def __str__(self) -> str:
        parts = [f"{self.world} ranks", f"tp {self.tp}", f"cp {self.cp}", *self[3:8]]
        return ", ".join(parts + ["by tokens"] * self.by_tokens + ["balanced"] * self.balanced)


FACTORS: dict[str, tuple[Any, ...]] = {
    "world": (2, 4),
    "tp": (1, 2),
    "cp": (1, 2),
    "sharding": ("row_wise", "table_wise", "column_wise", "data_parallel"),
    "optimizer": ("sgd", "rowwise_adagrad", "adam"),
    "pipeline": ("none", "native", "prefetch"),
    "dense_sharding": ("none", "weights"),
    "task": ("ranking", "retrieval"),
    "by_tokens": (False, True),
    "balanced": (False, True),
}


def _means_something(case: Case) -> bool:
    # Groups are made of ranks, tokens are split within a group, and dense weights are shared by several ranks. One
    # moment per row cannot be kept by ranks that have parts of a row.
    in_groups = case.tp * case.cp <= case.world
    is_shared = case.world > case.tp or case.dense_sharding == "none"
    is_refused = case.optimizer == "rowwise_adagrad" and case.sharding == "column_wise"
    return in_groups and is_shared and (case.tp > 1 or not case.by_tokens) and not is_refused


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

    It differs by what a user does not expect to change the numbers. rowwise_adagrad means adagrad for replicated
    tables.
    """
    differs = case.sharding == "data_parallel" and case.optimizer == "rowwise_adagrad"
    sharding = "data_parallel" if differs else "row_wise"
    return Case(1, 1, 1, sharding, case.optimizer, "none", "none", case.task, by_tokens=False, balanced=False)


def options(case: Case) -> RunOptions:
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
            # Of the two encodings one is added to tokens, the other to what heads compute.
            f"NetworkArgs.position_encoding = {'absolute' if case.task == 'ranking' else 'relative_bias'!r}",
            f"NetworkArgs.num_factors = {2 if case.task == 'ranking' else 0}",
            f"NetworkArgs.max_attention_span = {8 if case.task == 'ranking' else None}",
            *(RETRIEVAL if case.task == "retrieval" else ()),
            # Divided by the longest sequence attention is so little that sgd hardly moves its weights.
            "NetworkArgs.scaling_seqlen = 1",
        ],
    }


def run(cases: Sequence[Case], store: str) -> dict[Case, list[str]]:
    """Run the cases, none refused, in one launch for each number of ranks; what is wrong with each, or nothing."""
    expected = _launch(store, 1, [alone(case) for case in cases])[0]
    results: dict[Case, list[str]] = {}
    for world in {case.world for case in cases}:
        here = [case for case in cases if case.world == world]
        ranks = _launch(store, world, here)
        results |= {case: _problems(case, [rank[str(case)] for rank in ranks], expected) for case in here}
    return results


def _launch(store: str, world: int, cases: Sequence[Case]) -> list[dict[str, Any]]:
    by_sizes: dict[tuple[int, int], dict[str, RunOptions]] = {}
    for case in cases:
        by_sizes.setdefault((case.tp, case.cp), {})[str(case)] = options(case)
    groups = [Group(*sizes, free_port(), runs) for sizes, runs in by_sizes.items()]
    return run_ranks(Launch(world, 120.0 + 10 * len(cases)), run_groups, store, groups)


@dataclass(frozen=True)
class Group:
    """Runs in groups of ``tp`` tensor-parallel and ``cp`` context-parallel ranks, which meet at ``port``."""

    tp: int
    cp: int
    port: int
    runs: dict[str, RunOptions]


def run_groups(store: str, groups: Sequence[Group]) -> dict[str, Any]:
    """On a rank: the runs of all groups, name → what ``_train`` returns."""
    results: dict[str, Any] = {}
    for group in groups:
        with started_mesh(group.tp, group.cp, group.port) as mesh:
            results |= {name: _train(mesh, store, run) for name, run in group.runs.items()}
    return results


def _train(mesh: Mesh, store: str, run: RunOptions) -> dict[str, Any]:
    """The losses and gradient norms, the users of this rank in each step, and the whole weights before and after."""
    config = make_config(store, mesh.world_size, **run)
    validate(config, mesh.world_size, rules=ALL_RULES)
    source, state = new_run(mesh, config)
    told: dict[str, Any] = {"losses": [], "norms": [], "users": [], "initial": _weights(state, mesh)}
    for result in train_steps(mesh, config, source, state, STEPS):
        told["losses"].append(float(result.loss))
        told["norms"].append([float(result.grad_norms[name]) for name in ("grad_norm", "grad_norm_tables")])
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
    reference = expected[str(alone(case))]
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
        yield from _far(f"gradient norms of rank {rank}", told["norms"], reference["norms"], 0.0)
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


def all_cases() -> list[Case]:
    """All combinations that mean something."""
    return [case for case in (Case(*levels) for levels in product(*FACTORS.values())) if _means_something(case)]


CASES = covering(all_cases())


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, list[str]]:
    path = tmp_path_factory.mktemp("matrix") / "store"
    write_store(path)
    return run(CASES, str(path))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_equals_the_single_process(problems: Any, case: Case) -> None:
    assert not problems[case], "\n".join(problems[case])


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.booleans(), st.integers(0, 1)), min_size=1))
def test_every_pair_of_the_rows_that_may_be_is_in_a_chosen_row(rows: list[tuple[int, ...]]) -> None:
    chosen = covering(rows)
    assert set(chosen) <= set(rows)
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, rows))
