import ctypes
import os
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hstu.base.errors import ConfigError
from hstu.parallel import mesh as mesh_module
from tests.distributed.launch import run_ranks


def describe(tensor_parallel_size: int = 1, context_parallel_size: int = 1) -> dict[str, Any]:
    """Ranks, threads and the first random numbers before and after seeding dropout."""
    mesh = mesh_module.start(
        tensor_parallel_size, context_parallel_size, timeout_s=60, seed=5, deterministic=True, allow_tf32=True
    )
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
    assert all(result["weights"] == ranks[0]["weights"] for result in ranks)
    assert all(result["dropout"] == ranks[0]["dropout"] for result in ranks)


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
    code = "import torch; from hstu.parallel import mesh; mesh.start(); print(torch.get_num_threads()); mesh.finish()"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["1"]
