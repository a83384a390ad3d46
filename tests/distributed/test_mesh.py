"""How ranks start: groups, seeds, limits and devices.

Ranks that were started with different configurations, code or data end at once and say in what they differ.
"""

import ctypes
import dataclasses
import os
import re
import resource
import socket
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from hstu.base import errors
from hstu.base.errors import ConfigError
from hstu.parallel import mesh as mesh_module
from hstu.parallel.collectives import require_equal
from hstu.parallel.mesh import Mesh
from hstu.train import main
from hstu.train.main import run_facts, source_digest
from tests.conftest import write_small_store
from tests.distributed.launch import EndedRank, Launch, run_cases, run_ranks, run_to_their_ends
from tests.helpers import error_of
from tests.train.tiny import skip_measuring_the_peak, tiny_config, walks


def describe(tensor_parallel_size: int = 1, context_parallel_size: int = 1) -> dict[str, Any]:
    """Ranks, threads and the first random numbers before and after seeding dropout."""
    files = len(os.listdir("/proc/self/fd"))
    mesh = mesh_module.start(
        tensor_parallel_size, context_parallel_size, timeout_s=60, seed=5, deterministic=True, allow_tf32=True
    )
    files, keys = len(os.listdir("/proc/self/fd")) - files, mesh.store.num_keys() if mesh.store else 0
    weights = torch.rand(2).tolist()
    mesh_module.seed_dropout(mesh)
    result = {
        "ranks": [mesh.rank, mesh.world_size, mesh.dp_rank, mesh.dp_size, mesh.tp_rank, mesh.tp_size],
        "context": [mesh.cp_rank, mesh.cp_size],
        "groups": {
            name: dist.get_process_group_ranks(getattr(mesh, f"{name}_group"))
            for name in ("tp", "cp", "tp_cp", "dp", "dp_cp")
        },
        "local_world_size": mesh.local_world_size,
        "device": mesh.device.type,
        "files": files,
        "keys": keys,
        "main": mesh.is_main,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "weights": weights,
        "dropout": torch.rand(2).tolist(),
    }
    mesh_module.finish()
    return result


def test_ranks_threads_and_seeds_on_two_ranks() -> None:
    first, second = run_ranks(2, describe)
    assert first["ranks"] == [0, 2, 0, 2, 0, 1]
    assert second["ranks"] == [1, 2, 1, 2, 0, 1]
    assert second["local_world_size"] == 2
    assert [first["main"], second["main"]] == [True, False]
    assert second["files"] <= 16 and second["keys"] <= 2 * 2 + 2, (first, second)
    assert first["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
    assert first["deterministic"] and first["tf32"] == [True, True]
    assert first["weights"] == second["weights"]
    assert first["dropout"] != second["dropout"]
    assert first["weights"] != first["dropout"]


def test_groups_of_neighbours_share_a_dense_model() -> None:
    ranks = run_ranks(4, describe, tensor_parallel_size=2, context_parallel_size=2)
    assert [result["ranks"] for result in ranks] == [[rank, 4, 0, 1, rank % 2, 2] for rank in range(4)]
    assert [result["context"] for result in ranks] == [[0, 2], [0, 2], [1, 2], [1, 2]]
    assert ranks[2]["groups"] == {
        "tp": [2, 3],
        "cp": [0, 2],
        "tp_cp": [0, 1, 2, 3],
        "dp": [2],
        "dp_cp": [0, 2],
    }
    assert max(result["files"] for result in ranks[1:]) <= 28 and ranks[1]["keys"] <= 4 * 4 + 2, ranks
    assert all(result["weights"] == ranks[0]["weights"] for result in ranks)
    assert all(result["dropout"] == ranks[0]["dropout"] for result in ranks)


@pytest.mark.parametrize("world_size", [512, 4096])
@pytest.mark.parametrize(("tp", "cp", "created"), [(1, 1, 1), (2, 1, 3), (1, 4, 3), (4, 2, 5)])
def test_a_rank_creates_only_its_own_groups(
    monkeypatch: pytest.MonkeyPatch, world_size: int, tp: int, cp: int, created: int
) -> None:
    create = Mock(side_effect=dist.new_group)
    monkeypatch.setattr(dist, "new_group", create)
    for rank in (0, world_size // 2, world_size - 1):
        create.reset_mock()
        monkeypatch.setattr(mesh_module, "_join_world", lambda *_: join_fake_world(rank, world_size))  # noqa: B023
        mesh = mesh_module.start(tp, cp)
        fields = {name: getattr(mesh, f"{name}_group") for name in ("world", "tp", "cp", "tp_cp", "dp", "dp_cp")}
        members = {name: dist.get_process_group_ranks(group) for name, group in fields.items()}
        position = {name: getattr(mesh, f"{name}_rank") for name in ("tp", "cp", "tp_cp", "dp")}
        mesh_module.finish(wait=False)
        assert create.call_count == created
        assert len(set(fields.values())) == len(set(map(tuple, members.values()))), "equal ranks share a group"
        assert {name: len(ranks) for name, ranks in members.items()} == {
            "world": world_size,
            "tp": tp,
            "cp": cp,
            "tp_cp": tp * cp,
            "dp": world_size // (tp * cp),
            "dp_cp": world_size // tp,
        }
        assert {name: members[name].index(rank) for name in position} == position
        assert rank == (mesh.dp_rank * cp + mesh.cp_rank) * tp + mesh.tp_rank


def join_fake_world(rank: int, world_size: int) -> dist.Store:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    return FakeStore()


@pytest.mark.parametrize(
    ("rank", "world_size", "by_torchrun", "limits", "outcome"),
    [
        (0, 8, True, (1024, 4096), "kept"),
        (1, 4096, True, (1024, 65536), "raised"),
        (0, 4096, True, (65536, 65536), "kept"),
        (0, 512, True, (1024, 65536), "Run ulimit -n 1224 before the launcher"),
        (0, 512, False, (1024, 65536), "raised"),
        (0, 4096, False, (4096, 4096), "needs 16,584 open files, but the limits here are 4,096"),
        (5, 4096, True, (1024, 4096), "rank 5 of 4096 or its launcher needs 4,296 open files"),
    ],
)
def test_the_limit_of_open_files_is_raised_or_too_low_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    world_size: int,
    by_torchrun: bool,
    limits: tuple[int, int],
    outcome: str,
) -> None:
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, value: set_to.append(value))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(by_torchrun))
    if outcome in ("kept", "raised"):
        mesh_module._allow_open_files(rank, world_size)
        assert set_to == [(limits[1], limits[1])] * (outcome == "raised")
    else:
        with pytest.raises(ConfigError, match=outcome):
            mesh_module._allow_open_files(rank, world_size)


@pytest.mark.parametrize(("hidden", "error", "count"), [("0", 0, 2), ("0", 803, 0), ("0", 100, 0), ("-1", 0, 2)])
def test_gpus_that_torch_cannot_use_end_the_start_unless_they_are_hidden(
    monkeypatch: pytest.MonkeyPatch, hidden: str, error: int, count: int
) -> None:
    def write_count(pointer: Any) -> None:
        pointer._obj.value = count

    driver = SimpleNamespace(cuInit=lambda flags: error, cuDeviceGetCount=write_count)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    if hidden == "-1" or error == 100:
        assert mesh_module._pick_device(0).type == "cpu"
    else:
        with pytest.raises(ConfigError, match="this machine has NVIDIA GPUs, but torch cannot"):
            mesh_module._pick_device(0)


def test_a_port_in_use_is_a_mistake_of_the_configuration_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        values = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=rf"rank 0 cannot join the others at 127.0.0.1:{port} .*EADDRINUSE"):
            mesh_module.start(timeout_s=5)


def test_a_process_alone_keeps_the_number_of_threads_that_its_caller_chose() -> None:
    before, chosen = torch.get_num_threads(), (os.cpu_count() or 1) + 1
    torch.set_num_threads(chosen)
    try:
        mesh_module.start()
        mesh_module.finish()
        assert torch.get_num_threads() == chosen
    finally:
        torch.set_num_threads(before)


def compare(mesh: Mesh, facts: list[dict[str, str]]) -> str:
    return error_of(lambda: require_equal(facts[mesh.rank], mesh.world_group, ConfigError), ConfigError)


def test_facts_are_compared_whatever_their_order_and_differences_name_both_sides() -> None:
    same = {"seed": "1", "rate": "0.1"}
    cases = {
        "equal": [same, {"rate": "0.1", "seed": "1"}, same],
        "two differ": [same, {"seed": "2", "rate": "0.1"}, {"seed": "1"}],
    }
    for rank in run_cases(3, {name: partial(compare, facts=facts) for name, facts in cases.items()}):
        assert rank["equal"] == "no error"
        lines = rank["two differ"].splitlines()
        assert lines[0] == "rank 0 and rank 1 would not train the same run; they differ in:"
        assert re.fullmatch(r"  seed = 1 on rank 0 \(\S+\), 2 on rank 1 \(\S+\)", lines[1])
        assert len(lines) == 3 and "the same code and the same data" in lines[2]


def start_unlike(stores: list[str], output: str, options: list[dict[str, Any]], tp: list[int]) -> None:
    """A run, as the entry scripts start it, that is another one on each rank."""
    torch.set_num_threads(1)
    skip_measuring_the_peak()
    errors._TIME_TO_REPORT_S = 0.0  # no launcher kills the ranks that report later
    rank = int(os.environ["RANK"])
    config = tiny_config("retrieval", stores[rank], output, **options[rank])
    parallel = dataclasses.replace(config.tensor_parallel, tensor_model_parallel_size=tp[rank])
    sys.exit(main.run(dataclasses.replace(config, tensor_parallel=parallel)))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A store, a copy of it at another place, and one with as many items that have other raw ids."""
    folder = tmp_path_factory.mktemp("stores")
    vocabularies = {"first": np.arange(11), "copy": np.arange(11), "other": np.arange(11) + 1}
    for name, ids in vocabularies.items():
        write_small_store(folder / name, **walks(), item_ids=ids.tolist())
    return {name: str(folder / name) for name in vocabularies}


def run(paths: list[str], output: Path, options: list[dict[str, Any]], tp: tuple[int, int] = (1, 1)) -> list[EndedRank]:
    return run_to_their_ends(Launch(2, 90), start_unlike, paths, str(output), options, list(tp))


def test_another_configuration_on_one_rank_ends_all(stores: dict[str, str], tmp_path: Path) -> None:
    others = {"trainer": {"seed": 7, "train_batch_size": 2}, "optimizer": {"learning_rate": 0.02}}
    ranks = run([stores["first"]] * 2, tmp_path, [{}, others], tp=(1, 2))
    assert [rank.exit_code for rank in ranks] == [2, 2]
    for name, first, second in (
        ("TrainerArgs.seed", "1234", "7"),
        ("TrainerArgs.train_batch_size", "8", "2"),
        ("OptimizerArgs.learning_rate", "0.01", "0.02"),
        ("TensorModelParallelArgs.tensor_model_parallel_size", "1", "2"),
    ):
        assert re.search(rf"  {re.escape(name)} = {first} on rank 0 \(\S+\), {second} on rank 1 ", ranks[0].output)
    assert not (tmp_path / "run").exists()


def test_another_vocabulary_of_equal_size_on_one_rank_ends_all(stores: dict[str, str], tmp_path: Path) -> None:
    ranks = run([stores["first"], stores["other"]], tmp_path, [{}, {}])
    assert [rank.exit_code for rank in ranks] == [3, 3]
    assert re.search(r"vocabulary\.item_id\S* of the data = \w{64} on rank 0 .*, \w{64} on rank 1", ranks[0].output)
    assert "sequence.item_id" not in ranks[0].output, "the codes are equal"


def test_the_code_is_among_what_is_compared(stores: dict[str, str], tmp_path: Path) -> None:
    facts, of_copy = (run_facts(tiny_config("ranking", stores[name], tmp_path)) for name in ("first", "copy"))
    assert facts == of_copy, "each host may have a copy of the data"
    assert facts["SHA-256 of the code in hstu"] == source_digest() and "version of torch" in facts
    for folder, text in (("a", "x = 1\n"), ("b", "x = 2\n"), ("c", "x = 1\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "module.py").write_text(text)
        (tmp_path / folder / "notes.txt").write_text(folder)
    assert source_digest(tmp_path / "a") == source_digest(tmp_path / "c") != source_digest(tmp_path / "b")
