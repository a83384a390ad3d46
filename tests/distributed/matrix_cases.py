"""What runs on each rank in matrix.py."""

from __future__ import annotations

import os
from typing import Any

import torch

from hstu.checkpoint.state import TrainState
from hstu.config.validate import validate
from hstu.parallel import mesh as mesh_module
from hstu.parallel.mesh import Mesh
from tests.distributed.tensor_cases import consolidated, make_config, new_run, train_steps

STEPS = 8
"""More than an epoch, which is 3 batches of the 23 users of ranking and 5 of the 33 of retrieval."""


def run(store: str, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Run the ``cases`` of each group, all with its ``tp``, which meets at ``port``; name → what the case told."""
    told = {}
    for group in groups:
        os.environ["MASTER_PORT"] = str(group["port"])
        mesh = mesh_module.start(tensor_parallel_size=group["tp"], timeout_s=60)
        torch.set_num_threads(1)  # the tensors are tiny, and ranks that wait for one another must not spin
        told |= {name: _train(mesh, store, options) for name, options in group["cases"].items()}
        mesh_module.finish()
    return told


def _train(mesh: Mesh, store: str, options: dict[str, Any]) -> dict[str, Any]:
    """The losses, the users that this rank trained on in each step, and the whole weights before and after."""
    config = make_config(store, mesh.world_size, **options)
    validate(config, mesh.world_size)
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
