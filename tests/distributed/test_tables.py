from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.table_reference import Training, reference
from tests.distributed.toy import FEATURES, make_batch

HERE = "tests.distributed.table_cases"
OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam")
SHARDINGS = ("row_wise", "table_wise", "column_wise")
LEARNING_RATE = 0.1

CASES: dict[str, dict[str, Any]] = {
    f"{optimizer}/{sharding}": {"optimizer": optimizer, "sharding": sharding}
    for optimizer in OPTIMIZERS
    for sharding in SHARDINGS
    if (optimizer, sharding) != ("rowwise_adagrad", "column_wise")  # one accumulator a row and shard: differs by design
}
CASES |= {
    "planned": {"optimizer": "sgd", "sharding": "auto"},
    "two widths": {"optimizer": "sgd", "user_dim": 4},
    "width no multiple of 4": {"optimizer": "adagrad", "dim": 6},
    "width no multiple of 4, adam": {"optimizer": "adam", "dim": 6, "sharding": "column_wise"},
    "all replicated": {"optimizer": "sgd", "replicated": ["user", "item", "action"]},
    "all sharded": {"optimizer": "sgd", "replicated": []},
    "ranks without tokens": {"optimizer": "sgd", "empty_from": 4},
    "ranks without tokens, adam": {"optimizer": "adam", "empty_from": 4},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "sparse options": {"optimizer": "adam", "sparse_optimizer_str": "sgd", "sparse_learning_rate": 0.05},
}
OWN = {
    "user": {"optimizer_str": "rowwise_adagrad", "learning_rate": 0.05},
    "item": {"learning_rate": 0.02},
    "action": {"optimizer_str": "sgd", "learning_rate": 0.3},
}
PARTS = [{"regex": "head", "optimizer_str": "sgd", "learning_rate": 0.2}]
LIMIT = 0.01
MIXED = {
    "adam beside rowwise_adagrad": {"optimizer": "adam", "trained": OWN, "parts": PARTS},
    "one optimizer, two rates": {"optimizer": "adam", "trained": {"user": {"learning_rate": 0.3}}, "replicated": []},
    "columns": {"optimizer": "adagrad", "sharding": "column_wise", "trained": {"user": {"optimizer_str": "adam"}}},
    "limited rows": {"optimizer": "rowwise_adagrad", "sparse_max_gradient": LIMIT},
    "limited, mixed": {"optimizer": "adam", "trained": OWN, "parts": PARTS, "sparse_max_gradient": LIMIT},
    "limited columns": {"optimizer": "sgd", "sharding": "column_wise", "sparse_max_gradient": LIMIT},
    "limited, planned": {"optimizer": "adagrad", "sharding": "auto", "sparse_max_gradient": LIMIT, "replicated": []},
}
CASES |= MIXED


LOOK_UPS = {
    "row-wise": {"sharding": "row_wise"},
    "adam": {"optimizer": "adam", "sharding": "row_wise"},
    "replicated": {"replicated": ["item"]},
}
TRACED = {"one width": {}, "two widths": {"user_dim": 4}, "adam": {"optimizer": "adam"}}
ON_TWO_RANKS: dict[str, dict[str, Any]] = {
    **{f"look up/{name}": {"call": "look_up_items", "counts": [0, 9], **args} for name, args in LOOK_UPS.items()},
    **{f"trace/{name}": {"call": "pipelined_modules", **args} for name, args in TRACED.items()},
    "two steps": {"call": "train", "optimizer": "adam", "sharding": "row_wise", "steps": 2},
    "copies": {"call": "copy_optimizer_state", "optimizers": list(OPTIMIZERS)},
}
ON_ONE_RANK: dict[str, dict[str, Any]] = {
    "multipliers": {"call": "lr_multipliers"},
    "one step adam": {"call": "train", "optimizer": "adam", "steps": 1},
    "one step adamw": {"call": "train", "optimizer": "adamw", "weight_decay": 0.1, "steps": 1},
    **{f"out of range/{name}": {"call": "out_of_range_id", "optimizer": name} for name in ("sgd", "adam")},
    "sparse gradients": {"call": "sparse_gradients"},
    "other features": {"call": "swapped_features"},
}


@pytest.fixture(scope="module")
def runs() -> dict[int, dict[str, Any]]:
    """All cases, in one launch a world size: world size → case → rank 0's result (trained weights are equal)."""
    trained = {name: {"call": "train", **args} for name, args in CASES.items()}
    return {size: run_ranks(f"{HERE}:run_cases", size, timeout_s=200, cases=trained)[0] for size in (1, 2, 3)}


@pytest.fixture(scope="module")
def on_two_ranks() -> list[dict[str, Any]]:
    return run_ranks(f"{HERE}:run_cases", 2, timeout_s=100, cases=ON_TWO_RANKS)


@pytest.fixture(scope="module")
def on_one_rank() -> dict[str, Any]:
    results: dict[str, Any] = run_ranks(f"{HERE}:run_cases", 1, timeout_s=100, cases=ON_ONE_RANK)[0]
    return results


def largest_difference(left: dict[str, Any], right: dict[str, Any]) -> float:
    """Largest |left - right| over the tensors of both, relative to 1 or the value where that is larger."""
    assert left.keys() == right.keys() and left
    return max(
        float((np.abs(np.array(left[name]) - np.array(right[name])) / np.maximum(1.0, np.abs(right[name]))).max())
        for name in left
    )


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_ranks_trains_the_same_tables_and_dense_weights(runs: Any, case: str) -> None:
    for size in (2, 3):
        np.testing.assert_allclose(runs[size][case]["losses"], runs[1][case]["losses"], rtol=1e-6)
        tolerance = 1e-6 if CASES[case]["optimizer"] == "sgd" else 5e-6  # Adagrad and Adam divide by small numbers
        assert largest_difference(runs[size][case]["tables"], runs[1][case]["tables"]) < tolerance
        assert largest_difference(runs[size][case]["dense"], runs[1][case]["dense"]) < tolerance


@pytest.mark.parametrize("case", CASES)
def test_training_moves_every_table(runs: Any, case: str) -> None:
    for table, rows in runs[1][case]["tables"].items():
        assert np.abs(np.array(rows) - np.array(runs[1][case]["initial"][table])).max() > 1e-3


def test_initial_rows_depend_on_neither_ranks_nor_sharding(runs: Any) -> None:
    same_width = [case for case, args in CASES.items() if args.get("dim", 8) == 8 and "user_dim" not in args]
    first = runs[1][same_width[0]]["initial"]
    for size in (1, 2, 3):
        for case in same_width:
            assert runs[size][case]["initial"] == first


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_equals_a_float64_reference(runs: Any, optimizer: str) -> None:
    run = runs[2][f"{optimizer}/row_wise"]
    expected, losses, _ = reference_of({"optimizer": optimizer}, run["initial"])
    np.testing.assert_allclose(run["losses"], losses, rtol=1e-5)
    assert largest_difference(run["tables"], expected["tables"]) < 1e-5


@pytest.mark.parametrize("case", MIXED)
def test_each_table_and_part_is_trained_as_it_says_and_equals_a_float64_reference(runs: Any, case: str) -> None:
    for size in (1, 2, 3):
        run = runs[size][case]
        expected, losses, cuts = reference_of(MIXED[case], run["initial"])
        np.testing.assert_allclose(run["losses"], losses, rtol=1e-5)
        assert largest_difference(run["tables"], expected["tables"]) < 1e-5
        assert largest_difference(run["dense"], expected["dense"]) < 1e-5
        assert all(cut > LIMIT for cut in cuts) or not case.startswith("limited")


def reference_of(case: dict[str, Any], initial: dict[str, Any]) -> tuple[dict[str, Any], list[float], list[float]]:
    """What three steps of a case come to."""
    name, replicated = case["optimizer"], case.get("replicated", ["action"])
    replicas = name.removeprefix("rowwise_")  # what the dense part makes of it
    tables = {
        f"{feature}_table": Training(
            own.get("optimizer_str", replicas if feature in replicated else name),
            own.get("learning_rate", LEARNING_RATE),
            lazily=feature not in replicated,
            max_gradient=case.get("sparse_max_gradient"),
        )
        for feature in ("user", "item", "action")
        for own in [case.get("trained", {}).get(feature, {})]
    }
    parts = {part["regex"]: (part["optimizer_str"], part["learning_rate"]) for part in case.get("parts", ())}
    return reference({"": (name, LEARNING_RATE)} | parts, tables, initial, steps=3)


def test_weight_decay_does_not_touch_sharded_or_replicated_tables(on_one_rank: Any) -> None:
    decayed, plain = on_one_rank["one step adamw"], on_one_rank["one step adam"]
    assert decayed["tables"] == plain["tables"]
    weight = np.array(decayed["dense"]["head.weight"]) - np.array(plain["dense"]["head.weight"])
    assert np.abs(weight).max() > 1e-4
    assert decayed["dense"]["head.bias"] == plain["dense"]["head.bias"]


@pytest.mark.parametrize("kind", LOOK_UPS)
def test_items_are_embedded_for_any_number_of_ids_on_each_rank(on_two_ranks: Any, kind: str) -> None:
    for result in on_two_ranks:
        looked_up = result[f"look up/{kind}"]
        assert looked_up["matches"] == [True, True]
        assert looked_up["rng_kept"] == [True, True]
        assert looked_up["requires_grad"] is False


def test_looking_items_up_between_steps_does_not_change_training(on_two_ranks: Any) -> None:
    assert on_two_ranks[0]["look up/adam"]["tables"] == on_two_ranks[0]["two steps"]["tables"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_id_outside_the_table_is_an_error(on_one_rank: Any, optimizer: str) -> None:
    assert on_one_rank[f"out of range/{optimizer}"] in ("RuntimeError", "IndexError")


@pytest.mark.parametrize("kind", TRACED)
def test_torchrec_pipelines_find_every_sharded_collection(on_two_ranks: Any, kind: str) -> None:
    for result in on_two_ranks:
        traced = result[f"trace/{kind}"]
        assert traced["pipelined"] == traced["collections"] == (2 if kind == "two widths" else 1)
        assert traced["not_pipelined"] == []


def test_a_batch_with_its_features_in_another_order_is_refused(on_one_rank: Any) -> None:
    assert "the model was built for ['user', 'item', 'action'" in on_one_rank["other features"]


def test_one_multiplier_scales_dense_weights_and_both_kinds_of_tables(on_one_rank: Any) -> None:
    for moves in on_one_rank["multipliers"].values():
        full, half, none = moves
        assert full > 1e-3
        assert half == pytest.approx(full / 2, rel=1e-4)
        assert none == 0.0


def test_optimizer_state_is_complete_in_its_state_dict(on_two_ranks: Any) -> None:
    assert on_two_ranks[0]["copies"] == dict.fromkeys(OPTIMIZERS, True)


def test_adam_on_the_cpu_gets_gradients_of_the_looked_up_rows_only(on_one_rank: Any) -> None:
    gradients = on_one_rank["sparse gradients"]
    assert len(gradients) == 2
    batch = make_batch(0, 0, 1)
    looked_up = {"user_table": ["user"], "item_table": ["item", FEATURES[3]]}
    for name, (is_sparse, entries) in gradients.items():
        table = next(table for table in looked_up if table in name)
        assert is_sparse
        assert entries == sum(len(batch.features[feature].values()) for feature in looked_up[table])
