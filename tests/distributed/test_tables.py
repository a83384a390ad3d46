from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

import numpy as np
import pytest
import torch
from torchrec import KeyedJaggedTensor

from hstu.parallel.mesh import Mesh, seed_initial_weights
from tests.distributed.launch import Launch, run_cases
from tests.distributed.toy import (
    FEATURES,
    ITEMS,
    ToyOptions,
    ToyTask,
    build,
    dense_of,
    full_tables,
    make_batch,
    make_config,
    train_step,
)
from tests.helpers import error_of

OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam")
LEARNING_RATE = 0.1

CASES: dict[str, Any] = {f"{optimizer}/row_wise": {"optimizer": optimizer} for optimizer in OPTIMIZERS} | {
    "sgd/column_wise": {"optimizer": "sgd", "sharding": "column_wise"},
    "rowwise_adagrad/table_wise": {"optimizer": "rowwise_adagrad", "sharding": "table_wise"},
    "planned, two widths": {"optimizer": "sgd", "sharding": "auto", "user_dim": 4},
    "width no multiple of 4": {"optimizer": "adagrad", "dim": 6},
    "width no multiple of 4, adam": {"optimizer": "adam", "dim": 6, "sharding": "column_wise"},
    "all replicated": {"optimizer": "sgd", "replicated": ["user", "item", "action"]},
    "all replicated, empty ranks": {"optimizer": "adam", "replicated": ["user", "item", "action"], "empty_from": 4},
    "ranks without tokens": {"optimizer": "sgd", "replicated": [], "empty_from": 4},
    "sparse options": {
        "optimizer": "adam",
        "optimizer_args": {"sparse_optimizer_str": "sgd", "sparse_learning_rate": 0.05},
    },
}
OWN = {
    "user": {"optimizer_str": "rowwise_adagrad", "learning_rate": 0.05},
    "item": {"learning_rate": 0.02},
    "action": {"optimizer_str": "sgd", "learning_rate": 0.3},
}
PARTS = [{"regex": "head", "optimizer_str": "sgd", "learning_rate": 0.2}]
LIMIT = 0.01
LIMITED = {"sparse_max_gradient": LIMIT}
MIXED: dict[str, Any] = {
    "adam beside rowwise_adagrad": {"optimizer": "adam", "trained": OWN, "parts": PARTS},
    "columns": {"optimizer": "adagrad", "sharding": "column_wise", "trained": {"user": {"optimizer_str": "adam"}}},
    "limited, mixed": {"optimizer": "adam", "trained": OWN, "parts": PARTS, "optimizer_args": LIMITED},
    "limited columns": {"optimizer": "sgd", "sharding": "column_wise", "optimizer_args": LIMITED},
    "limited, planned": {"optimizer": "adagrad", "sharding": "auto", "optimizer_args": LIMITED, "replicated": []},
}
LONG: dict[str, Any] = {
    "partial row-wise adam": {"optimizer": "partial_rowwise_adam"},
    "limited adagrads": {"optimizer": "adagrad", "trained": OWN, "optimizer_args": {"sparse_max_gradient": 0.05}},
}
"""Cases that train for twenty steps."""
MIXED |= {name: {"steps": 20, **case} for name, case in LONG.items()}
CASES |= MIXED


LOOK_UPS: dict[str, Any] = {
    "row-wise": {"sharding": "row_wise"},
    "adam": {"optimizer": "adam", "sharding": "row_wise"},
    "replicated": {"replicated": ["item"]},
}


@dataclass(frozen=True)
class Training:
    """How one table is trained; only rows that are looked up move."""

    optimizer: str
    learning_rate: float
    max_gradient: float | None = None


@pytest.fixture(scope="module")
def runs() -> dict[int, dict[str, Any]]:
    """All cases, in one launch per world size: world size → case → rank 0's result (trained weights are equal)."""
    trained = {name: partial(train, **args) for name, args in CASES.items()}
    return {size: run_cases(Launch(size, timeout_s=200), trained)[0] for size in (1, 3)}


@pytest.fixture(scope="module")
def on_two_ranks() -> list[dict[str, Any]]:
    cases: dict[str, Any] = {
        **{f"look up/{name}": partial(look_up_items, counts=[0, 9], **args) for name, args in LOOK_UPS.items()},
        "two steps": partial(train, optimizer="adam", sharding="row_wise", steps=2),
        **{dtype: partial(train, optimizer="adagrad", exchange=dtype) for dtype in ("float32", "bfloat16")},
        "rounded": rounded_rows,
    }
    return run_cases(Launch(2, timeout_s=100), cases)


@pytest.fixture(scope="module")
def on_one_rank() -> dict[str, Any]:
    cases: dict[str, Any] = {
        "multipliers": lr_multipliers,
        "one step adam": partial(train, optimizer="adam", steps=1),
        "one step adamw": partial(train, optimizer="adamw", optimizer_args={"weight_decay": 0.1}, steps=1),
        **{f"out of range/{name}": partial(out_of_range_id, optimizer=name) for name in ("sgd", "adam")},
        "other features": swapped_features,
    }
    return run_cases(Launch(1, timeout_s=100), cases)[0]


def train(mesh: Mesh, steps: int = 3, empty_from: int | None = None, **options: Unpack[ToyOptions]) -> dict[str, Any]:
    """Train the toy; the initial and final tables, the dense weights, each step's loss."""
    model, optimizers = build(make_config(**options), mesh)
    initial = full_tables(model, mesh)
    losses = [
        train_step(model, optimizers, mesh, make_batch(step, mesh.rank, mesh.world_size, empty_from))
        for step in range(steps)
    ]
    dense = {name: weight.tolist() for name, weight in dense_of(model).task.named_parameters()}
    return {"initial": initial, "tables": full_tables(model, mesh), "dense": dense, "losses": losses}


def look_up_items(mesh: Mesh, counts: list[int], **options: Unpack[ToyOptions]) -> dict[str, Any]:
    """embed_items on ``counts[rank]`` ids a rank, before and after a training step, and what it must equal."""
    model, optimizers = build(make_config(**options), mesh)
    generator = torch.Generator().manual_seed(mesh.rank)
    ids = torch.randint(0, ITEMS, (counts[mesh.rank],), generator=generator)
    results: dict[str, Any] = {"matches": [], "rng_kept": []}
    for step in range(2):
        noise = torch.get_rng_state()
        rows = model.embed_items(ids)
        results["rng_kept"].append(torch.equal(noise, torch.get_rng_state()))
        table = torch.tensor(full_tables(model, mesh)["item_table"])
        results["matches"].append(torch.equal(rows, table[ids]))
        results["requires_grad"] = rows.requires_grad
        train_step(model, optimizers, mesh, make_batch(step, mesh.rank, mesh.world_size))
    results["tables"] = full_tables(model, mesh)
    return results


def rounded_rows(mesh: Mesh) -> bool:
    """Whether looked-up rows are those of the table in bfloat16."""
    model, _ = build(make_config(exchange="bfloat16"), mesh)
    table, ids = torch.tensor(full_tables(model, mesh)["item_table"]), torch.arange(mesh.rank, ITEMS)
    return torch.equal(model.embed_items(ids), table[ids].bfloat16().float())


def lr_multipliers(mesh: Mesh) -> dict[str, Any]:
    """How far SGD moves dense weights and fused and replicated tables at multipliers 1, 0.5 and 0."""
    moves: dict[str, list[float]] = {"item_table": [], "action_table": [], "dense": []}
    for multiplier in (1.0, 0.5, 0.0):
        model, optimizers = build(make_config(optimizer="sgd", replicated=("action",)), mesh)
        before, weight = full_tables(model, mesh), dense_of(model).task.get_parameter("head.weight")
        head = weight.detach().clone()
        optimizers.set_lr_multiplier(multiplier)
        train_step(model, optimizers, mesh, make_batch(0, mesh.rank, mesh.world_size))
        after = full_tables(model, mesh)
        for table in ("item_table", "action_table"):
            moves[table].append(float((torch.tensor(after[table]) - torch.tensor(before[table])).norm()))
        moves["dense"].append(float((weight - head).norm()))
    return moves


def out_of_range_id(mesh: Mesh, optimizer: str) -> str:
    """What looking up an id beyond the table raises."""
    model, _ = build(make_config(optimizer=optimizer), mesh)
    try:
        model.embed_items(torch.tensor([ITEMS + 5]))
    except (RuntimeError, IndexError) as error:
        return type(error).__name__
    return "no error"


def swapped_features(mesh: Mesh) -> str:
    """What a batch raises whose features stand in another order, all ids of which happen to be in range."""
    model, _ = build(make_config(optimizer="sgd"), mesh)
    batch = make_batch(0, mesh.rank, mesh.world_size)
    model(batch)
    jagged = batch.features.to_dict()
    user, item, action, negatives = FEATURES
    batch.features = KeyedJaggedTensor.from_jt_dict({key: jagged[key] for key in (user, negatives, action, item)})
    return error_of(lambda: model(batch), ValueError)


def largest_difference(left: dict[str, Any], right: dict[str, Any]) -> float:
    """Largest |left - right| over the tensors of both, relative to 1 or the value where that is larger."""
    assert left.keys() == right.keys() and left
    return max(
        float((np.abs(np.array(left[name]) - np.array(right[name])) / np.maximum(1.0, np.abs(right[name]))).max())
        for name in left
    )


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_ranks_trains_the_same_tables_and_dense_weights(runs: Any, case: str) -> None:
    for table, rows in runs[1][case]["tables"].items():
        assert np.abs(np.array(rows) - np.array(runs[1][case]["initial"][table])).max() > 1e-3, "it is trained"
    np.testing.assert_allclose(runs[3][case]["losses"], runs[1][case]["losses"], rtol=1e-6)
    tolerance = 1e-6 if CASES[case]["optimizer"] == "sgd" else 5e-6  # Adagrad and Adam divide by small numbers
    assert largest_difference(runs[3][case]["tables"], runs[1][case]["tables"]) < tolerance
    assert largest_difference(runs[3][case]["dense"], runs[1][case]["dense"]) < tolerance


def test_an_exchange_in_bfloat16_rounds_rows_and_gradients_and_nothing_else(on_two_ranks: Any) -> None:
    assert all(of_rank["rounded"] for of_rank in on_two_ranks)
    rounded, exact = (on_two_ranks[0][dtype]["tables"] for dtype in ("bfloat16", "float32"))
    assert 1e-5 < largest_difference(rounded, exact) < 0.02


def test_initial_rows_depend_on_neither_ranks_nor_sharding(runs: Any) -> None:
    same_width = [case for case, args in CASES.items() if args.get("dim", 8) == 8 and "user_dim" not in args]
    first = runs[1][same_width[0]]["initial"]
    for size in (1, 3):
        for case in same_width:
            assert runs[size][case]["initial"] == first


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_equals_a_float64_reference(runs: Any, optimizer: str) -> None:
    run = runs[3][f"{optimizer}/row_wise"]
    expected, losses, _ = reference_of({"optimizer": optimizer}, run["initial"])
    np.testing.assert_allclose(run["losses"], losses, rtol=1e-5)
    assert largest_difference(run["tables"], expected["tables"]) < 1e-5


@pytest.mark.parametrize("case", MIXED)
def test_each_table_and_part_is_trained_as_it_says_and_equals_a_float64_reference(runs: Any, case: str) -> None:
    for size in (1, 3):
        run = runs[size][case]
        expected, losses, cuts = reference_of(MIXED[case], run["initial"])
        np.testing.assert_allclose(run["losses"], losses, rtol=1e-5)
        assert largest_difference(run["tables"], expected["tables"]) < 1e-5
        assert largest_difference(run["dense"], expected["dense"]) < 1e-5
        assert all(cut > LIMIT for cut in cuts) or not case.startswith("limited")


def reference_of(case: dict[str, Any], initial: dict[str, Any]) -> tuple[dict[str, Any], list[float], list[float]]:
    """What the steps of a case come to."""
    args = case.get("optimizer_args", {})
    name, replicated = case["optimizer"], case.get("replicated", ["action"])
    replicas = "adagrad" if name == "rowwise_adagrad" else name  # what replicated tables make of it
    tables = {
        f"{feature}_table": Training(
            own.get("optimizer_str", replicas if feature in replicated else name),
            own.get("learning_rate", LEARNING_RATE),
            max_gradient=args.get("sparse_max_gradient"),
        )
        for feature in ("user", "item", "action")
        for own in [case.get("trained", {}).get(feature, {})]
    }
    parts = {part["regex"]: (part["optimizer_str"], part["learning_rate"]) for part in case.get("parts", ())}
    return reference({"": (name, LEARNING_RATE)} | parts, tables, initial, case.get("steps", 3))


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


def test_a_batch_with_its_features_in_another_order_is_refused(on_one_rank: Any) -> None:
    assert "the model was built for ['user', 'item', 'action'" in on_one_rank["other features"]


def test_one_multiplier_scales_dense_weights_and_both_kinds_of_tables(on_one_rank: Any) -> None:
    for moves in on_one_rank["multipliers"].values():
        full, half, none = moves
        assert full > 1e-3
        assert half == pytest.approx(full / 2, rel=1e-4)
        assert none == 0.0


# --- The toy trained in float64 by plain torch on one process, each table by its formula

EPS, BETAS = 1e-8, (0.9, 0.999)
TABLE_OF = {"user": "user_table", "item": "item_table", "action": "action_table", FEATURES[3]: "item_table"}
DENSE: dict[str, Any] = {"sgd": torch.optim.SGD} | dict.fromkeys(("adam", "partial_rowwise_adam"), torch.optim.Adam)


def reference(
    dense: dict[str, tuple[str, float]],
    tables: dict[str, Training],
    initial: dict[str, Any],
    steps: int,
) -> tuple[dict[str, Any], list[float], list[float]]:
    """Final tables and dense weights, each step's loss, and how far each step's clamp cut gradients (0: it did not).

    ``dense``: beginning of a weight's name → (optimizer, learning rate) of it; "" is that of all others.
    """
    seed_initial_weights(7)
    task = ToyTask(8, 8, dropout=0.0).double()
    rows_of = {name: torch.tensor(rows, dtype=torch.float64, requires_grad=True) for name, rows in initial.items()}
    optimizers = [
        _dense(name, rate, [w for key, w in task.named_parameters() if _part(key, dense) == part])
        for part, (name, rate) in dense.items()
    ]
    states: dict[str, dict[str, torch.Tensor]] = {name: {} for name in tables}
    losses, cuts = [], []
    for step in range(1, steps + 1):
        batch = make_batch(step - 1, 0, 1)
        embeddings: dict[str, torch.Tensor] = {}
        touched: dict[str, list[torch.Tensor]] = {name: [] for name in rows_of}
        for feature, ids in batch.features.to_dict().items():
            table = TABLE_OF[feature]
            embeddings[feature] = rows_of[table][ids.values()]
            touched[table].append(ids.values())
        output = task(embeddings, batch)
        loss = output.loss_sum / batch.num_labels_total
        losses.append(loss.item())
        for weight in [*task.parameters(), *rows_of.values()]:
            weight.grad = None
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            cut = 0.0
            for name, training in tables.items():
                weight = rows_of[name]
                rows = torch.cat(touched[name]).unique()
                cut = max(cut, _clamp(weight.grad, training.max_gradient))
                update_rows(training, weight, rows, states[name], step)
            cuts.append(cut)
    trained = {name: table.detach().numpy() for name, table in rows_of.items()}
    return {"tables": trained, "dense": {k: w.detach().numpy() for k, w in task.named_parameters()}}, losses, cuts


def _part(name: str, parts: dict[str, tuple[str, float]]) -> str:
    return max((part for part in parts if name.startswith(part)), key=len)


def _dense(name: str, rate: float, weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if name in DENSE:
        return DENSE[name](weights, lr=rate, **({} if name == "sgd" else {"eps": EPS}))
    return torch.optim.Adagrad(weights, lr=rate, eps=EPS)


def _clamp(gradient: torch.Tensor | None, limit: float | None) -> float:
    """How much of the largest entry was cut off."""
    assert gradient is not None
    if limit is None:
        return 0.0
    largest = float(gradient.abs().max())
    gradient.clamp_(-limit, limit)
    return max(0.0, largest - limit)


def update_rows(
    training: Training, table: torch.Tensor, rows: torch.Tensor, state: dict[str, torch.Tensor], t: int
) -> None:
    assert table.grad is not None
    optimizer, rate, gradient = training.optimizer, training.learning_rate, table.grad[rows]
    if optimizer == "sgd":
        table[rows] -= rate * gradient
    elif optimizer in ("adam", "partial_rowwise_adam"):
        first, second = (state.setdefault(key, torch.zeros_like(table)) for key in ("m", "v"))
        first[rows] = BETAS[0] * first[rows] + (1 - BETAS[0]) * gradient
        second[rows] = BETAS[1] * second[rows] + (1 - BETAS[1]) * (
            gradient**2 if optimizer == "adam" else (gradient**2).mean(dim=1, keepdim=True)
        )
        corrected = first[rows] / (1 - BETAS[0] ** t), second[rows] / (1 - BETAS[1] ** t)
        table[rows] -= rate * corrected[0] / (corrected[1].sqrt() + EPS)
    else:
        squares = gradient**2 if optimizer == "adagrad" else (gradient**2).mean(dim=1, keepdim=True)
        total = state.setdefault("sum", torch.zeros_like(table[:, : squares.shape[1]]))
        total[rows] += squares
        table[rows] -= rate * gradient / (total[rows].sqrt() + EPS)
