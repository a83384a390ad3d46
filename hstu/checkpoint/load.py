"""Reading a checkpoint or an export into a run, on any number of ranks, whole or in part."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hstu.checkpoint.agree import agree
from hstu.checkpoint.architecture import Difference, differences
from hstu.checkpoint.dynamic import dynamic_problems, read_dynamic_tables
from hstu.checkpoint.manifest import file_problems, read_manifest
from hstu.checkpoint.match import LoadOptions, Match, match
from hstu.checkpoint.state import TrainState, set_random_state
from hstu.checkpoint.tensor_files import CONSOLIDATED, TensorFiles, open_tensors
from hstu.config.errors import DataError
from hstu.parallel.cut_tensor import CutTensor
from hstu.parallel.embedding import dynamic_tables
from hstu.parallel.mesh import Mesh

log = logging.getLogger(__name__)

_SHOWN_PROBLEMS = 10
_EVERYTHING = LoadOptions()


def load(path: str | Path, state: TrainState, mesh: Mesh, options: LoadOptions = _EVERYTHING) -> list[str]:
    """Read a checkpoint into ``state`` in place. Collective; ranks, groups and sharding may be others than at saving.

    Returns what did not fit, as lines; strict: nothing. Raises DataError, on all ranks alike, for damaged or missing
    files and, if strict, for anything that does not fit, with the lines of the two configurations that differ. On
    another number of ranks, or of ranks in a tensor-parallel group, the dropout generators keep their fresh seeds.
    """
    root = Path(path)
    problems = [problem for part in agree(lambda: _share_of_file_problems(root, mesh), mesh) for problem in part]
    if problems:
        raise DataError(_message(root, problems, [], "Load another one."))
    found, lines = agree(lambda: _matched(root, state, options), mesh)[mesh.rank]
    tables = dynamic_tables(state.model)
    gaps = agree(lambda: dynamic_problems(root, tables, options.optimizer), mesh)[mesh.rank]
    if gaps and options.strict:
        raise DataError(_message(root, gaps, [], _remedy(found)))
    agree(lambda: _read_tensors(open_tensors(root), found, state, mesh), mesh)
    agree(lambda: read_dynamic_tables(root, tables, mesh.rank, mesh.world_size, options.optimizer), mesh)
    if options.optimizer:
        _restore_progress(root, state, mesh)
    if found.problems() or lines or gaps:
        report = [*found.report(lines), *gaps]
        log.warning("%s was loaded in part:\n%s", root, "\n".join(f"  {line}" for line in report))
        return report
    return []


def _share_of_file_problems(root: Path, mesh: Mesh) -> list[str]:
    """Each rank checks its part of the files."""
    files = read_manifest(root)
    return file_problems(root, {name: files[name] for name in sorted(files)[mesh.rank :: mesh.world_size]})


def _matched(root: Path, state: TrainState, options: LoadOptions) -> tuple[Match, list[Difference]]:
    """What is to be read, and the lines that make another model. Raises DataError for what is refused."""
    if options.optimizer and (root / CONSOLIDATED).is_file():
        raise DataError(
            f"{root} is an export, which has weights alone. Set TrainerArgs.ckpt_load_optimizer = False to start "
            "from them at iteration 0."
        )
    sizes = {name: tensor.size() for name, tensor in state.tensors().items()}
    found = match(sizes, open_tensors(root).sizes, options)
    differing = differences((root / "operative.gin").read_text(), state.operative_gin) if state.operative_gin else []
    of_network = [entry for entry in differing if entry.is_of_network]
    if found.mistakes:
        raise DataError(_message(root, list(found.mistakes), [], "Mend the file."))
    if options.strict and (found.problems() or of_network):
        shown = [entry for entry in differing if entry.shapes_tensors]
        raise DataError(_message(root, found.problems(), shown, _remedy(found)))
    return found, of_network


def _remedy(found: Match) -> str:
    remedy = "Load another one, or change the model back. TrainerArgs.ckpt_load_strict = False loads what fits"
    of_optimizer = all(problem.startswith("optimizer.") for problem in found.problems())
    if found.problems() and of_optimizer:
        return f"{remedy}; ckpt_load_optimizer = False the weights alone, and starts at iteration 0."
    return f"{remedy} and reports the rest."


def _read_tensors(files: TensorFiles, found: Match, state: TrainState, mesh: Mesh) -> None:
    tensors = state.tensors()
    pending = dict(found.stored_names)
    while pending:  # two tensors of the run may ask for the same one, but of one reading each name is asked once
        part = {stored: name for name, stored in pending.items()}
        files.read(
            {stored: _target(tensors[name], files.sizes[stored]) for stored, name in part.items()}, mesh.world_group
        )
        pending = {name: stored for name, stored in pending.items() if part[stored] != name}


def _target(tensor: Tensor | CutTensor, stored: torch.Size) -> CutTensor:
    """Where to read a tensor of size ``stored`` to; a table may have more or fewer rows than that."""
    target = tensor if isinstance(tensor, CutTensor) else CutTensor.whole(tensor)
    return target if target.size() == stored else target.with_rows(stored[0])


def _restore_progress(root: Path, state: TrainState, mesh: Mesh) -> None:
    progress: Mapping[str, Any] = json.loads((root / "progress.json").read_text())
    state.load_progress(dict(progress))
    ranks, group = progress["world_size"], progress.get("tensor_parallel_size", 1)
    if (ranks, group) == (mesh.world_size, mesh.tp_size):  # the generators of a group must agree
        set_random_state(torch.load(root / f"rng_rank{mesh.rank}.pt", weights_only=True), mesh.device)
    else:
        log.info("%s was saved by %d ranks in groups of %d: dropout starts from fresh seeds", root, ranks, group)


def _message(root: Path, problems: list[str], differing: list[Difference], remedy: str) -> str:
    lines = _shortened(list(dict.fromkeys(problems)))
    if differing:
        lines += ["The configurations differ in:", *_shortened([str(entry) for entry in differing])]
    return "\n  ".join([f"cannot load the checkpoint {root}:", *lines]) + f"\n{remedy}"


def _shortened(lines: list[str]) -> list[str]:
    more = len(lines) - _SHOWN_PROBLEMS
    return [*lines[:_SHOWN_PROBLEMS], f"and {more} more"] if more > 0 else lines
