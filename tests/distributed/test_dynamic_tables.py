"""Dynamic tables trained by real ranks: as static ones where there is room, and right where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hstu.checkpoint.dynamic import read_table
from hstu.checkpoint.export import export
from hstu.checkpoint.safetensors_file import open_file
from hstu.parallel.dynamic.times import last_of_all
from tests.distributed.launch import free_port, run_ranks
from tests.distributed.tensor_cases import write_store

OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam")
PIPELINES = ("none", "native", "prefetch")
PRESSED = {"lru": {}, "lfu": {"evict_strategy": "lfu"}, "hashed": {"dist_type": "hash_roundrobin"}}
MIXED = {"user": {"optimizer_str": "rowwise_adagrad", "learning_rate": 0.05}, "item": {"learning_rate": 0.02}}
CASES: dict[str, dict[str, Any]] = {
    **{f"static/{name}": {"call": "beside_static", "optimizer": name} for name in OPTIMIZERS},
    **{
        f"static/{kind}": {"call": "beside_static", "optimizer": "adam", "dist_type": kind, "dim": 6}
        for kind in ("continuous", "hash_roundrobin")
    },
    "static/mixed": {"call": "beside_static", "optimizer": "adam", "trained": MIXED, "sparse_max_gradient": 0.01},
    **{
        f"{pipeline}/{name}": {"call": "in_pipeline", "pipeline": pipeline, "optimizer": name}
        for pipeline in PIPELINES
        for name in ("rowwise_adagrad", "adam")
    },
    **{
        f"none/{name}": {"call": "in_pipeline", "pipeline": "none", "optimizer": "adagrad", **options}
        for name, options in PRESSED.items()
    },
    **{f"looked at/{name}": {"call": "looked_at", "optimizer": name} for name in ("sgd", "adam")},
}
BUDGET = {"item_vocab_gpu_capacity": 5.0}
"""Of 12 rows."""
SPLIT = {f"split/{case}": {**CASES[case], **BUDGET} for case in ("native/rowwise_adagrad", "prefetch/adam", "none/lfu")}


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks("tests.distributed.dynamic_cases:run_cases", request.param, timeout_s=120, cases=CASES | SPLIT)


def cases(prefix: str) -> list[str]:
    return [name for name in CASES if name.startswith(prefix)]


@pytest.mark.parametrize("case", cases("static/"))
def test_with_room_for_all_ids_a_run_is_that_of_a_static_table_exactly(results: Any, case: str) -> None:
    for of_rank in results:
        static, dynamic = of_rank[case]["losses"]
        assert static == dynamic and len(set(static)) == len(static)
        for feature, same in of_rank[case]["same"].items():
            assert all(same) and len(same) > 15, feature


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_pipelines_give_ids_their_rows_in_the_order_of_the_steps(results: Any, optimizer: str) -> None:
    for of_rank in results:
        runs = [of_rank[f"{pipeline}/{optimizer}"] for pipeline in PIPELINES]
        assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("case", SPLIT)
def test_a_table_in_two_parts_is_trained_as_one_that_lies_in_one_piece_exactly(results: Any, case: str) -> None:
    for of_rank in results:
        split, whole = of_rank[case], of_rank[case.removeprefix("split/")]
        assert (split["parts"], whole["parts"]) == ([1, 2], [1, 1])
        assert split | {"parts": None} == whole | {"parts": None}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NEEDS AN NVIDIA GPU: rows in two memories, and a cache")
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_rows_are_trained_the_same_wherever_they_lie(optimizer: str) -> None:
    common = {"call": "in_pipeline", "optimizer": optimizer, "item_vocab_size_or_capacity": 38}
    options = {"whole": {}, "split": BUDGET, "cached": {"item_vocab_gpu_capacity": 1.0, "caching": True}}  # 32 lines
    placed = {
        f"{pipeline}/{name}": {"pipeline": pipeline, **common, **of_case}
        for pipeline in ("none", "prefetch")
        for name, of_case in options.items()
    }
    (told,) = run_ranks("tests.distributed.dynamic_cases:run_cases", 1, timeout_s=120, cases=placed)
    expected = told["none/whole"]
    for result in told.values():
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert all(result["fresh"]) and result["counters"] == expected["counters"]
        for id_, row in expected["rows"]["item_table"].items():
            assert result["rows"]["item_table"][id_] == pytest.approx(row, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("case", [*cases("none/"), "native/adam"])
def test_slots_that_change_hands_begin_anew(results: Any, case: str) -> None:
    for of_rank in results:
        result = of_rank[case]
        assert all(result["fresh"]) and len(result["fresh"]) > 2
        counters = result["counters"]["item_table"]
        assert counters["evictions"] > 0 and counters["lookups"] > counters["hits"] > 0
        assert counters["waiting"] == 0


@pytest.mark.parametrize("case", cases("looked at/"))
def test_an_evaluation_finds_rows_of_known_ids_and_zeros_for_others(results: Any, case: str) -> None:
    for of_rank in results:
        result = of_rank[case]
        assert result["known"] > 15
        assert result["rows_are_found"] and result["others_are_zero"] and result["unchanged"]


def test_ranks_groups_and_pipelines_train_what_one_process_trains(tmp_path: Path) -> None:
    write_store(tmp_path / "store")
    runs = {"adam": ("adam", 0.005), "rowwise": ("rowwise_adagrad", 0.005)}

    def group(tp: int, pipeline: str) -> dict[str, Any]:
        bindings = [f"TensorModelParallelArgs.tensor_model_parallel_size = {tp}"]
        if tp > 1:  # a table in two parts
            bindings.append("item_id/DynamicEmbeddingArgs.item_vocab_gpu_capacity = 13")
        common = {"pipeline": pipeline, "dynamic": ["item_id", "age"], "bindings": bindings}
        cases = {
            f"{name}/{tp}": {"optimizer": optimizer, "learning_rate": rate, **common}
            for name, (optimizer, rate) in runs.items()
        }
        return {"tp": tp, "port": free_port(), "cases": cases}

    here = "tests.distributed.matrix_cases:run"
    alone = run_ranks(here, 1, timeout_s=60, store=str(tmp_path / "store"), groups=[group(1, "none")])[0]
    groups = [group(1, "prefetch"), group(2, "native"), group(4, "none")]
    for told in run_ranks(here, 4, timeout_s=120, store=str(tmp_path / "store"), groups=groups):
        assert len(told) == 6
        for name, result in told.items():
            assert result["losses"] == pytest.approx(alone[f"{name.partition('/')[0]}/1"]["losses"], rel=1e-5), name


def test_a_checkpoint_goes_on_with_equal_losses_on_two_then_four_then_one_rank(tmp_path: Path) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    here = "tests.distributed.dynamic_cases"
    original = run_ranks(f"{here}:save_and_go_on", 2, timeout_s=60, directory=first)[0]
    split = {"save_to": second, "in_gpu_memory": 9.0}  # a checkpoint does not know whether a table was
    on_four = run_ranks(f"{here}:load_and_go_on", 4, timeout_s=60, directory=first, **split)[0]
    on_one = run_ranks(f"{here}:load_and_go_on", 1, timeout_s=60, directory=second)[0]
    too_small = run_ranks(f"{here}:load_and_go_on", 1, timeout_s=60, directory=first, capacity=9)[0]
    for case, expected in original.items():
        assert len(expected["held"]) > 15
        for resumed in (on_four[case], on_one[case]):
            assert resumed["held"] == expected["held"]
            assert resumed["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        kept = too_small[case]["held"]
        assert len(kept) == 9 and kept.items() <= expected["held"].items()
        checkpoints = [Path(directory) / case / "iteration_00000000" for directory in (first, second)]
        exported = open_file(export(checkpoints[0], tmp_path / "exports" / case) / "model.safetensors")
        ids, rows = (exported[f"dynamic.item_table.{part}"].tolist() for part in ("ids", "weight"))
        assert ids == sorted(map(int, expected["held"])), "of both ranks"
        assert dict(zip(map(str, ids), rows, strict=True)) == expected["held"]
        two, four = ([part.times for part in read_table(path, "item_table")] for path in checkpoints)
        assert len(two) == 2 and all(step_of_last == 3 for *_, (_, step_of_last) in two)
        assert four == [last_of_all(two)] * 4
