"""Reading a checkpoint or an export into a run, on any number of ranks, whole or in part."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from hstu.checkpoint.agree import agree
from hstu.checkpoint.architecture import Difference, differences
from hstu.checkpoint.dynamic import Wanted, dynamic_problems, read_dynamic_tables, read_tables
from hstu.checkpoint.manifest import DamagedCheckpoint, file_problems, read_manifest
from hstu.checkpoint.match import LoadOptions, Match, match
from hstu.checkpoint.names import TABLES, split
from hstu.checkpoint.row_ids import MovedRows, RowIds, moved_rows
from hstu.checkpoint.state import TrainState, set_random_state
from hstu.checkpoint.target import Target
from hstu.checkpoint.tensor_files import CONSOLIDATED, TensorFiles, open_tensors, read_description
from hstu.config.errors import DataError
from hstu.data.batch import NEGATIVES
from hstu.parallel.embedding import dynamic_tables
from hstu.parallel.mesh import Mesh

log = logging.getLogger(__name__)

_SHOWN_PROBLEMS = 10
_EVERYTHING = LoadOptions()


def load(path: str | Path, state: TrainState, mesh: Mesh, options: LoadOptions = _EVERYTHING) -> list[str]:
    """Read a checkpoint into ``state`` in place. Collective; ranks, groups and sharding may be others than at saving.

    Returns what did not fit, as lines; strict: nothing. Raises, on all ranks alike, DamagedCheckpoint for damaged or
    missing files and, if strict, DataError for anything that does not fit, with the lines of the two configurations
    that differ. On another number of ranks, or of ranks in a tensor-parallel group, the dropout generators keep their
    fresh seeds.
    """
    root = Path(path)
    problems = [problem for part in agree(lambda: _share_of_file_problems(root, mesh), mesh) for problem in part]
    if problems:
        raise DamagedCheckpoint(_message(root, problems, [], "Load another one."))
    matched: list[tuple[Match, list[Difference]]] = []  # not exchanged: it may have a number for each row of a table
    agree(lambda: matched.append(_matched(root, state, options)), mesh)
    found, lines = matched[0]
    agree(lambda: _read_tensors(open_tensors(root), found, state, mesh), mesh)
    gaps = agree(lambda: _read_dynamic(root, state, mesh, options), mesh)[mesh.rank]
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
    sizes, files = {name: tensor.size() for name, tensor in state.tensors().items()}, open_tensors(root)
    own_dynamic = [f"{TABLES}{name}" for name in dynamic_tables(state.model)]
    stored_tables = [f"{TABLES}{name}" for name in read_description(root).get("tables", {})]
    found = match(sizes, files.sizes, options, _moved_rows(root, files, state, options), (own_dynamic, stored_tables))
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


def _moved_rows(
    root: Path, files: TensorFiles, state: TrainState, options: LoadOptions, *, dynamic: bool = False
) -> dict[str, MovedRows]:
    """Tables, static or dynamic ones, as weights, whose rows are of other ids in the checkpoint."""
    stored_tables, moved = read_description(root).get("tables", {}), {}
    for table in state.model.specs:
        if (table.dynamic is not None) != dynamic:
            continue
        name = f"{TABLES}{table.name}"
        features = [feature for feature in table.features if feature != NEGATIVES]
        former = stored_tables.get(_stored_table(options, table.name), {}).get("features", [])
        if len(former) == len(features):
            stored = RowIds.from_files(files, former)
            count = sum(map(state.ids.count, features)) if dynamic else table.rows
            if rows := moved_rows(count, state.ids.listed(features), stored.listed(former)):
                moved[name] = rows
    return moved


def _read_tensors(files: TensorFiles, found: Match, state: TrainState, mesh: Mesh) -> None:
    tensors = state.tensors()
    pending = dict(found.stored_names)
    while pending:  # two tensors of the run may ask for the same one, but of one reading each name is asked once
        part = {stored: name for name, stored in pending.items()}
        targets = {
            stored: Target(tensors[name], files.sizes[stored], found.moved.get(split(name)[0]))
            for stored, name in part.items()
        }
        files.read({stored: target.pieces for stored, target in targets.items()}, mesh.world_group)
        for target in targets.values():
            target.finish()
        pending = {name: stored for name, stored in pending.items() if part[stored] != name}


def _read_dynamic(root: Path, state: TrainState, mesh: Mesh, options: LoadOptions) -> list[str]:
    """Read the dynamic tables; what they lack, which is an error if strict."""
    tables = dynamic_tables(state.model)
    if not tables:
        return []
    moved = _moved_rows(root, open_tensors(root), state, options, dynamic=True)
    stored, wanted = read_tables(root), []
    for name, table in tables.items():
        stored_name = _stored_table(options, name)
        wanted.append(Wanted(table, stored_name, stored.get(stored_name, []), moved.get(f"{TABLES}{name}")))
    gaps = dynamic_problems(wanted, with_states=options.optimizer)
    if gaps and options.strict:
        raise DataError(_message(root, gaps, [], "TrainerArgs.ckpt_load_strict = False loads what fits."))
    read_dynamic_tables(wanted, mesh.rank, mesh.world_size, with_states=options.optimizer)
    return gaps


def _stored_table(options: LoadOptions, name: str) -> str:
    """What the checkpoint calls a table."""
    return options.renamed.stored_name(f"{TABLES}{name}").removeprefix(TABLES)


def _restore_progress(root: Path, state: TrainState, mesh: Mesh) -> None:
    progress = read_description(root)
    state.load_progress(progress)
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
