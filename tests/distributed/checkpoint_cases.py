"""What runs on each rank in test_resume.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hstu.checkpoint.agree import CheckpointFailure
from hstu.checkpoint.load import load
from hstu.checkpoint.match import LoadOptions
from hstu.checkpoint.param_map import ParamMap
from hstu.checkpoint.save import save
from hstu.checkpoint.state import TrainState
from hstu.config.errors import DataError
from hstu.data.sampler import SamplerPosition
from hstu.parallel import mesh as mesh_module
from tests.distributed.table_cases import full_tables
from tests.distributed.tensor_cases import consolidated
from tests.distributed.toy import build, make_batch, make_config, train_step


def _new_state(mesh: mesh_module.Mesh, config_args: dict[str, Any]) -> TrainState:
    model, optimizers = build(make_config(**config_args), mesh)
    mesh_module.seed_dropout(mesh)
    return TrainState(model, optimizers, operative_gin="TrainerArgs.seed = 7\n")


def _train(state: TrainState, mesh: mesh_module.Mesh, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        state.optimizers.set_lr_multiplier(1.0 / (1 + state.iteration))
        batch = make_batch(state.iteration, mesh.rank, mesh.world_size)
        losses.append(train_step(state.model, state.optimizers, mesh, batch))
        state.iteration += 1
        state.position = SamplerPosition(0, 12 * state.iteration)
    return losses


def saved_after_three_steps(directory: str, **config_args: Any) -> dict[str, Any]:
    """Train three steps and save; the weights and states, and the loss of the next step."""
    mesh = mesh_module.start(timeout_s=60)
    state = _new_state(mesh, config_args)
    _train(state, mesh, 3)
    save(directory, state, mesh)
    result = {"tensors": consolidated(state, mesh), "next_losses": _train(state, mesh, 1)}
    mesh_module.finish()
    return result


def interrupted_and_not(directory: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """For each case: three steps, a checkpoint, two more; the same two in a new model that loads the checkpoint."""
    mesh = mesh_module.start(timeout_s=60)
    results = {}
    for name, config_args in cases.items():
        first = _new_state(mesh, config_args)
        before = _train(first, mesh, 3)
        path = save(Path(directory) / name, first, mesh)
        noise_straight_on = torch.rand(3).tolist()
        straight_on = _train(first, mesh, 2)

        second = _new_state(mesh, config_args | {"init_seed_offset": 1})
        load(path, second, mesh)
        noise_resumed = torch.rand(3).tolist()
        resumed = _train(second, mesh, 2)
        results[name] = {
            "before": before,
            "straight_on": [straight_on, noise_straight_on, full_tables(first.model, mesh)],
            "resumed": [resumed, noise_resumed, full_tables(second.model, mesh)],
            "position": [second.iteration, second.position.consumed],
            "names": sorted(second.tensors()),
        }
    mesh_module.finish()
    return results


def continue_from(directory: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Load what ``interrupted_and_not`` saved, on other ranks or in other tables, and train the two steps.

    ``saved_as`` of a case: whose checkpoint; its own where there is none.
    """
    mesh = mesh_module.start(timeout_s=60)
    results = {}
    for name, case in cases.items():
        config_args = dict(case)
        saved_as = config_args.pop("saved_as", name)
        state = _new_state(mesh, config_args | {"init_seed_offset": 1})
        load(Path(directory) / saved_as / "iteration_00000003", state, mesh)
        results[name] = {"losses": _train(state, mesh, 2), "tables": full_tables(state.model, mesh)}
    mesh_module.finish()
    return results


def load_in_part(directory: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Load ``directory``, a checkpoint, with each case's ``options``; what was there before and after, and the report.

    The other arguments of a case are those of ``make_config``; ``renamed``: the entries of a rename map.
    """
    mesh = mesh_module.start(timeout_s=60)
    results = {}
    for name, case in cases.items():
        config_args = dict(case)
        renamed, options = ParamMap(config_args.pop("renamed", {})), config_args.pop("options", {})
        state = _new_state(mesh, config_args | {"init_seed_offset": 1})
        before = consolidated(state, mesh)
        try:
            report = load(directory, state, mesh, LoadOptions(**options, renamed=renamed))
        except DataError as error:
            report = [str(error)]
        after = consolidated(state, mesh)
        position = [state.iteration, state.position.consumed, state.optimizers.tables.steps]
        losses = _train(state, mesh, 1)
        results[name] = {"before": before, "after": after, "report": report, "position": position, "losses": losses}
    mesh_module.finish()
    return results


def load_damaged(directory: str, cases: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Case → the message of the DataError that loading ``directory/<case>`` raises."""
    mesh = mesh_module.start(timeout_s=60)
    messages = {}
    for name, config_args in cases.items():
        try:
            load(Path(directory) / name, _new_state(mesh, config_args), mesh)
            messages[name] = "loaded without an error"
        except DataError as error:
            messages[name] = str(error)
    mesh_module.finish()
    return messages


def save_into(directory: str) -> str:
    """The message of what saving raises."""
    mesh = mesh_module.start(timeout_s=60)
    try:
        save(directory, _new_state(mesh, {}), mesh)
    except CheckpointFailure as error:
        mesh_module.finish()
        return str(error)
    return "saved"


def save_again(directory: str) -> list[list[str]]:
    """Save an iteration, the same again, and with other weights; the names in the directory after each."""
    mesh = mesh_module.start(timeout_s=60)
    state, names = _new_state(mesh, {}), []
    for state.operative_gin in ("first", "second", "third"):
        if state.operative_gin == "third":
            with torch.no_grad():
                next(state.model.dense.parameters()).add_(1)
        save(directory, state, mesh)
        names.append(
            sorted(f"{path.name} {(path / 'operative.gin').read_text()}" for path in Path(directory).iterdir())
        )
    mesh_module.finish()
    return names
