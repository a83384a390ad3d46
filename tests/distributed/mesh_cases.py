"""What runs on each rank in test_mesh.py."""

from __future__ import annotations

from typing import Any

import torch

from hstu.parallel import mesh as mesh_module
from hstu.parallel.collectives import all_gather, gather_objects, gather_rows, max_over_ranks, sum_over_ranks


def describe(tensor_parallel_size: int = 1) -> dict[str, Any]:
    """Ranks, threads and the first random numbers before and after seeding dropout."""
    mesh = mesh_module.start(tensor_parallel_size, timeout_s=60, seed=5, deterministic=True, allow_tf32=True)
    weights = torch.rand(2).tolist()
    mesh_module.seed_dropout(mesh)
    result = {
        "ranks": [mesh.rank, mesh.world_size, mesh.dp_rank, mesh.dp_size, mesh.tp_rank, mesh.tp_size],
        "hosts": [mesh.local_rank, mesh.local_world_size],
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


def collectives() -> dict[str, Any]:
    """Values and gradients of the collectives; rank r has r + 1 rows."""
    mesh = mesh_module.start(timeout_s=60)
    group, rank = mesh.world_group, mesh.rank
    local = torch.full((2, 1), float(rank + 1), requires_grad=True)
    gathered = all_gather(local, group)
    weights = torch.arange(1.0, len(gathered) + 1)[:, None] * (rank + 1)
    (gathered * weights).sum().backward()

    rows = torch.full((rank + 1, 2), float(rank), requires_grad=True)
    many, ids = gather_rows(rows, torch.arange(rank + 1), group)
    (many * (ids >= 0)[:, None]).sum().backward()
    result = {
        "gathered": gathered.flatten().tolist(),
        "gradient": local.grad.flatten().tolist() if local.grad is not None else None,
        "rows": many[:, 0].tolist(),
        "ids": ids.tolist(),
        "row_gradient": rows.grad.tolist() if rows.grad is not None else None,
        "max": max_over_ranks(10 + rank, group),
        "sum": sum_over_ranks(torch.tensor(1.5 + rank), group).item(),
        "objects": gather_objects({"rank": rank}, group),
    }
    mesh_module.finish()
    return result


def rank_one_fails() -> None:
    """Rank 1 leaves without the others."""
    mesh = mesh_module.start(timeout_s=60)
    try:
        if mesh.rank == 1:
            raise ValueError("rank 1 has had enough")
        torch.distributed.barrier()
    finally:
        mesh_module.finish()
