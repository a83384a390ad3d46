"""Tensor, sequence and context parallelism change where a run computes, not what: all is compared with one process."""

from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pytest
import torch

from hstu.checkpoint.load import load
from hstu.ops.dropout import draw
from hstu.parallel.layer_comm import ProcessGroupComm
from hstu.parallel.mesh import Mesh
from hstu.train.builder import build_evaluator
from tests.distributed.launch import Launch, run_cases
from tests.distributed.tensor_cases import (
    MIXED,
    USER_TASKS,
    RunOptions,
    consolidated,
    make_config,
    new_run,
    train,
    write_store,
)
from tests.distributed.toy import save

BY_TOKENS = "NetworkArgs.sequence_parallel = True"
RELATIVE = "NetworkArgs.position_encoding = 'relative_bias'"
CLIP = "TrainerArgs.max_grad_norm = 0.05"
WINDOW = "NetworkArgs.max_attention_span = (3, 8)", "NetworkArgs.min_full_attention_tokens = 2"
TRUNCATED = "NetworkArgs.truncate_after_layer = 1", "NetworkArgs.truncate_to_items = 3"
PUBLISHED = "NetworkArgs.norm_affine = False", "NetworkArgs.uvqk_bias = False", "NetworkArgs.output_bias = True"
TOWER = "RetrievalArgs.item_tower = True"
SEEN = "RetrievalArgs.mask_seen = True"
LIMIT = "OptimizerArgs.sparse_max_gradient = 0.001"
CASES: dict[str, Any] = {
    "ranking, by tokens": {"bindings": [BY_TOKENS, RELATIVE, CLIP], "sharding": "table_wise"},
    "ranking, recomputed": {
        "optimizer": "adam",
        "bindings": [RELATIVE, CLIP, "NetworkArgs.recompute_layer = True", *PUBLISHED, *WINDOW],
    },
    "ranking, candidates, by tokens": {
        "optimizer": "adam",
        "replicated": ["item_id", "action", "age"],
        "bindings": [
            BY_TOKENS,
            "DatasetArgs.max_num_candidates = 2",
            *TRUNCATED,
            "NetworkArgs.recompute_input_layernorm = True",
            "RankingArgs.eval_metrics = ('LOGLOSS', 'NE')",  # equal candidates tie, but for rounding: no AUC
        ],
    },
    "ranking, mixed, two widths": {
        "optimizer": "adam",
        "bindings": [
            *MIXED,
            CLIP,
            "OptimizerArgs.ema_decay = 0.9",
            "NetworkArgs.item_embedding_dim = 8",
            "NetworkArgs.contextual_embedding_dim = 4",
        ],
    },
    "ranking, tasks, by tokens": {"bindings": [BY_TOKENS, *USER_TASKS]},
    "retrieval, draws, by tokens": {
        "task": "retrieval",
        "optimizer": "adam",
        "bindings": [BY_TOKENS, RELATIVE, "RetrievalArgs.num_negatives = 9", TOWER, *PUBLISHED, *WINDOW],
    },
    "retrieval, uniform, seen": {
        "task": "retrieval",
        "optimizer": "adagrad",
        "replicated": ["year"],
        "bindings": ["RetrievalArgs.negatives = 'uniform'", "RetrievalArgs.num_negatives = 2", SEEN, LIMIT],
    },
    "retrieval, shared": {
        "task": "retrieval",
        "replicated": ["item_id", "year"],
        "bindings": [
            "RetrievalArgs.negatives = 'uniform'",
            "RetrievalArgs.num_negatives = 9",
            "RetrievalArgs.shared_negatives = True",
            LIMIT,
            TOWER,
        ],
    },
    "retrieval, uniform, logQ": {
        "task": "retrieval",
        "sharding": "column_wise",
        "bindings": [
            "RetrievalArgs.negatives = 'uniform'",
            "RetrievalArgs.num_negatives = 4",
            "RetrievalArgs.logq_correction = True",
            *TRUNCATED,
        ],
    },
    "retrieval, full, by tokens": {
        "task": "retrieval",
        "optimizer": "adam",
        "bindings": [
            "RetrievalArgs.negatives = 'full'",
            SEEN,
            BY_TOKENS,
            "NetworkArgs.interleave_actions = False",
            LIMIT,
        ],
    },
}
BFLOAT16 = {"bfloat16": {**CASES["ranking, by tokens"], "bindings": [BY_TOKENS, "NetworkArgs.dtype_str = 'bfloat16'"]}}
GRIDS = [(2, 2, 1), pytest.param((4, 2, 2), marks=pytest.mark.slow)]
"""(ranks, ranks of a tensor-parallel group, ranks of a context-parallel group)."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: Any) -> str:
    path = tmp_path_factory.mktemp("store") / "toy"
    write_store(path)
    return str(path)


@pytest.fixture(scope="module")
def alone(store: str) -> dict[str, Any]:
    return run_cases(Launch(1, timeout_s=150), trained_and_evaluated(store))[0]


@pytest.fixture(scope="module", params=GRIDS, ids=lambda grid: f"{grid[0]}ranks-tp{grid[1]}-cp{grid[2]}")
def over_ranks(request: Any, store: str) -> tuple[int, list[dict[str, Any]]]:
    ranks, tp, cp = request.param
    return tp, run_cases(Launch(ranks, 200, tp, cp), trained_and_evaluated(store))


def trained_and_evaluated(store: str) -> dict[str, Any]:
    return {name: partial(train_and_evaluate, store=store, **case) for name, case in (CASES | BFLOAT16).items()}


def train_and_evaluate(mesh: Mesh, store: str, **options: Unpack[RunOptions]) -> dict[str, Any]:
    """Losses, initial and final weights, metrics, and how many dense weights this rank holds."""
    config = make_config(store, mesh.world_size, **options)
    source, state = new_run(mesh, config)
    initial = consolidated(state, mesh)
    losses = train(mesh, config, source, state, 6)
    evaluator = build_evaluator(config, source, state.model, mesh)
    return {
        "losses": losses,
        "initial": initial,
        "final": consolidated(state, mesh),
        "metrics": evaluator.evaluate(source.eval_batches("valid")),
        "held": sum(p.numel() for p in state.model.dense.parameters()),
    }


@pytest.mark.parametrize("case", CASES)
def test_a_group_computes_what_one_process_computes(alone: Any, over_ranks: Any, case: str) -> None:
    expected, (tp, results) = alone[case], over_ranks
    assert expected["initial"] == results[0][case]["initial"], "the weights are drawn whole and then cut"
    for result in results:
        np.testing.assert_allclose(result[case]["losses"], expected["losses"], rtol=1e-5)
        assert result[case]["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
    assert expected["losses"][-1] != expected["losses"][0]
    final = results[0][case]["final"]
    assert final.keys() == expected["final"].keys()
    for name, weight in expected["final"].items():
        np.testing.assert_allclose(final[name], weight, rtol=1e-4, atol=2e-6, err_msg=name)
    if tp > 1:
        assert results[0][case]["held"] < expected["held"]


def test_a_group_rounds_to_bfloat16_as_one_process_does(alone: Any, over_ranks: Any) -> None:
    losses = over_ranks[1][0]["bfloat16"]["losses"]
    np.testing.assert_allclose(losses, alone["bfloat16"]["losses"], rtol=0.01)
    assert losses != over_ranks[1][0]["ranking, by tokens"]["losses"], "computed in another type"


MOVED: dict[str, Any] = {
    "mixed": {"optimizer": "adam", "bindings": MIXED},
    "tables": {"task": "retrieval", "optimizer": "adagrad"},
    "dropout": {"bindings": ["NetworkArgs.hidden_dropout = 0.5"]},
}
HOPS = (Launch(2, 120, cp=2), "weights"), (Launch(4, 120, tp=2), "none"), (Launch(1, 120), "none")
"""Ranks and DataParallelArgs.sharding."""
PLACES = (
    {"sharding": "column_wise", "replicated": ["age"]},
    {"sharding": "row_wise", "replicated": ["item_id"]},
    {"sharding": "table_wise", "replicated": []},
)
"""Where the tables of the case "tables" lie at each hop."""


def load_save_and_train(
    mesh: Mesh, store: str, load_from: Path | None, save_to: Path, **options: Unpack[RunOptions]
) -> dict[str, Any]:
    """Load a checkpoint (or train three steps), save it again, and train two steps; weights and losses."""
    config = make_config(store, mesh.world_size, **options)
    source, state = new_run(mesh, config)
    if load_from is None:
        train(mesh, config, source, state, 3)
    else:
        load(load_from / "iteration_00000003", state, mesh)
    stored = consolidated(state, mesh)
    save(save_to, state, mesh)
    losses = train(mesh, config, source, state, 2)
    consolidated(state, mesh)  # refuses replicated weights that are not equal on all ranks: dropout is in step
    return {"stored": stored, "losses": losses}


def test_checkpoints_move_between_groups_shardings_and_places_bit_for_bit(store: str, tmp_path: Path) -> None:
    path: Path | None = None
    before: dict[str, Any] = {}
    for number, (launch, sharding) in enumerate(HOPS):
        target = tmp_path / str(number)
        cases = {
            name: partial(
                load_save_and_train,
                store=store,
                load_from=path and path / name,
                save_to=target / name,
                **case
                | (PLACES[number] if name == "tables" else {})
                | {"bindings": [*case.get("bindings", ()), f"DataParallelArgs.sharding = {sharding!r}"]},
            )
            for name, case in MOVED.items()
        }
        results = run_cases(launch, cases)[0]
        for name, told in before.items():
            assert results[name]["stored"] == told["stored"]
            if name != "dropout":
                np.testing.assert_allclose(results[name]["losses"], told["losses"], rtol=1e-5)
        path, before = target, results


def dropout_masks(mesh: Mesh, store: str) -> dict[str, Any]:
    """Train with dropout; what the ranks of a group must share, and what they must not."""
    dropout = "NetworkArgs.hidden_dropout = 0.5"
    results: dict[str, Any] = {}
    for name, bindings in (("kept", [dropout]), ("recomputed", [dropout, "NetworkArgs.recompute_layer = True"])):
        config = make_config(store, mesh.world_size, bindings=bindings)
        source, state = new_run(mesh, config)
        results[name] = train(mesh, config, source, state, 3)
        consolidated(state, mesh)  # refuses replicated weights that are not equal on all ranks
    comm = ProcessGroupComm(mesh, sequence_parallel=False)
    for place, stream in (("before W_o", comm.dropout_stream), ("input", comm.input_stream)):
        results[place] = draw(torch.Size([64]), 0.5, torch.device("cpu"), stream).tolist()
    return results


def test_dropout_agrees_in_a_group_where_it_must_and_nowhere_else(store: str) -> None:
    ranks = run_cases(Launch(4, 120, tp=2), {"masks": partial(dropout_masks, store=store)})
    first, second, third, fourth = (rank["masks"] for rank in ranks)
    assert first["input"] == second["input"]
    assert third["input"] == fourth["input"]
    assert first["input"] != third["input"], "data-parallel ranks"
    masks = [rank["before W_o"] for rank in (first, second, third, fourth)]
    assert all(masks[i] != masks[j] for i in range(4) for j in range(i)), "split heads"
    assert first["kept"] == first["recomputed"], "what is recomputed drops the same"
    assert all(rank["kept"] == first["kept"] for rank in (second, third, fourth))
