"""Loads a checkpoint or an export into a run on any number of ranks, whole or in part."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor

from hstu.base.errors import DataError
from hstu.checkpoint.directory import (
    DamagedCheckpoint,
    collective_io,
    file_problems,
    listed_files,
    read_manifest,
    torch_load,
    verified_file,
)
from hstu.checkpoint.dynamic import load_table, read_tables, table_problems
from hstu.checkpoint.find import GIN
from hstu.checkpoint.matching import ConfigDifference, LoadOptions, TensorMatch, config_differences, match_tensors
from hstu.checkpoint.phase import Phase, difference
from hstu.checkpoint.raw_ids import RawIds, RowRemap, remap_rows
from hstu.checkpoint.state import TrainState, set_random_state
from hstu.checkpoint.tensors import (
    RANDOM_FILES,
    STATES,
    TABLES,
    StoredTensors,
    read_metadata,
    sizes_of_ranks,
    split_name,
)
from hstu.data.batches.batch import is_of_negatives
from hstu.model.embedding import TableSpec
from hstu.parallel.collectives import gather_objects
from hstu.parallel.mesh import Mesh
from hstu.parallel.shards import ShardedView
from hstu.parallel.tables import dynamic_tables

log = logging.getLogger(__name__)

_SHOWN_PROBLEMS = 10
_EVERYTHING = LoadOptions()


def load(
    path: str | Path, state: TrainState, mesh: Mesh, options: LoadOptions = _EVERYTHING, *, is_checked: bool = False
) -> list[str]:
    """Load a checkpoint into ``state`` in place. Collective. Ranks, groups and sharding may differ from the saving run.

    With other ranks or groups the dropout generators keep their fresh seeds. A changed configuration is logged. Returns
    one line for each thing that did not fit; with ``options.strict`` only for new ids (``options.zero_new_rows``).
    ``is_checked``: ``check_all_files`` has been called.

    Raises, on every rank, DamagedCheckpoint if files are damaged or missing, and DataError, with the differences of the
    configuration, if something does not fit with ``options.strict``, or of other data than ``state.phase``.
    """
    root, specs = Path(path), state.model.specs
    sizes = {name: tensor.size() for name, tensor in state.tensors().items()}
    if not is_checked:
        check_all_files(root, mesh)
    match, differences, remaps = collective_io(
        lambda: match_checkpoint(root, options, sizes, specs, state.raw_ids, state.operative_gin), mesh
    )
    if options.zero_new_rows:
        _zero_tables(match, state)
    collective_io(lambda: _read_tensors(StoredTensors(root), match, state, mesh), mesh)
    dynamic = collective_io(lambda: _read_dynamic(root, state, mesh, options, remaps), mesh)
    rows = "zeros" if options.zero_new_rows else "as initialised"
    new_rows = [
        f"table {name.removeprefix(TABLES)}: {remap.new_ids:,} of {remap.num_ids:,} ids are not in the checkpoint; "
        f"their rows are {rows}"
        for name, remap in remaps.items()
        if options.accepts_new_rows and remap.new_ids
    ]
    if options.optimizer:
        _restore_metadata(root, state, mesh)
        if new_rows:
            log.info("%s: %s", root, "; ".join(new_rows))
        changes = [f"  {entry}" for entry in differences if entry.changes not in ("reports", "model")]
        if changes:
            log.warning("the configuration has changed since %s was saved:\n%s", root, "\n".join(changes))
    of_model = [entry for entry in differences if entry.changes == "model"]
    report = new_rows if options.zero_new_rows else []
    if options.zero_new_rows and (other_data := difference(read_metadata(root).get("trained_on"), state.trained_on)):
        report.append(f"the model was trained on {other_data}")
    if match.problems(options.accepts_new_rows) or of_model or dynamic:
        report += [*match.report(of_model), *dynamic]
        log.warning("%s was loaded in part:\n%s", root, "\n".join(f"  {line}" for line in report))
    return report


def check_all_files(root: Path, mesh: Mesh) -> None:
    """Raise DamagedCheckpoint, on every rank, if files are damaged or missing. Collective: each rank checks some."""

    def own_problems() -> list[str]:
        files = read_manifest(root)
        return file_problems(root, {name: files[name] for name in sorted(files)[mesh.rank :: mesh.world_size]})

    found = gather_objects(collective_io(own_problems, mesh), mesh.world_group)
    if problems := [problem for part in found for problem in part]:
        raise DamagedCheckpoint(_message(root, problems, [], "Load another checkpoint."))


def match_checkpoint(
    root: Path, options: LoadOptions, sizes: Mapping[str, Size], specs: Sequence[TableSpec], raw_ids: RawIds, gin: str
) -> tuple[TensorMatch, list[ConfigDifference], dict[str, RowRemap]]:
    """Return (matches, configuration differences, table weight → remap). Raises DataError if it refuses to load.
    ``sizes``: tensor of the run, named as in TrainState.tensors → size. ``gin``: not compared if empty."""
    if options.optimizer and not listed_files(root, RANDOM_FILES):
        raise DataError(
            f"{root} holds only weights. Set TrainerArgs.ckpt_load_optimizer = False to start from them at iteration 0."
        )
    stored, stored_tables = StoredTensors(root), read_metadata(root).get("tables", {})
    remaps = _remaps(stored, stored_tables, options, specs, raw_ids)
    own_names = [f"{TABLES}{spec.name}" for spec in specs]
    stored_names = [f"{TABLES}{name}" for name in stored_tables]
    if mistakes := options.param_map.problems([*sizes, *own_names], [*stored.sizes, *stored_names]):
        raise DataError(_message(root, mistakes, [], "Correct the file."))
    match = match_tensors(sizes, stored.sizes, options, remaps)
    stored_gin = verified_file(root, GIN).read_text(encoding="utf-8")
    differences = config_differences(stored_gin, gin) if gin else []
    problems = match.problems(options.accepts_new_rows)
    if options.strict and (problems or any(entry.changes == "model" for entry in differences)):
        shown = [entry for entry in differences if entry.changes in ("model", "tensors")]
        remedy = "Load another one, or change the model back. TrainerArgs.ckpt_load_strict = False loads what fits"
        if problems and all(problem.startswith(STATES) for problem in problems):
            remedy += "; ckpt_load_optimizer = False loads only the weights and starts at iteration 0."
        else:
            remedy += " and reports the rest."
        raise DataError(_message(root, problems, shown, remedy))
    return match, differences, remaps


def _remaps(
    tensors: StoredTensors,
    stored_tables: Mapping[str, Any],
    options: LoadOptions,
    specs: Sequence[TableSpec],
    raw_ids: RawIds,
) -> dict[str, RowRemap]:
    """Return table weight → remap, for tables whose rows have other raw ids in the checkpoint."""
    remaps = {}
    for table in specs:
        is_dynamic = table.dynamic is not None
        features = [feature for feature in table.features if not is_of_negatives(feature)]
        stored_features = stored_tables.get(_stored_table(options, table.name), {}).get("features", [])
        if len(stored_features) == len(features):
            rows = sum(map(raw_ids.count, features)) if is_dynamic else table.rows
            stored = RawIds.from_stored(tensors, stored_features)
            own_ids = [raw_ids.features.get(name) for name in features]
            stored_ids = [stored.features.get(name) for name in stored_features]
            remap = remap_rows(rows, own_ids, stored_ids)
            if is_dynamic and any((own is None) != (old is None) for own, old in zip(own_ids, stored_ids, strict=True)):
                remap = RowRemap(None)  # codes on one side, raw ids on the other
            if remap:
                remaps[f"{TABLES}{table.name}"] = remap
    return remaps


def _stored_table(options: LoadOptions, name: str) -> str:
    return options.param_map.stored_name(f"{TABLES}{name}").removeprefix(TABLES)


def _zero_tables(match: TensorMatch, state: TrainState) -> None:
    """Zero the tables to be read, with their moving averages, so that rows without a source are zero."""
    tensors = state.tensors()
    for name in match.stored_names:
        if split_name(name)[0].startswith(TABLES):
            for piece in ShardedView.whole(tensors[name]).shards.values():
                piece.zero_()


def _read_tensors(stored: StoredTensors, match: TensorMatch, state: TrainState, mesh: Mesh) -> None:
    tensors = state.tensors()
    pending = dict(match.stored_names)
    while pending:  # two tensors of the run may share a stored tensor, but each read takes a name once
        batch = {stored_name: name for name, stored_name in pending.items()}
        destinations = {
            stored_name: _Destination(tensors[name], stored.sizes[stored_name], match.remaps.get(split_name(name)[0]))
            for stored_name, name in batch.items()
        }
        stored.read({name: destination.pieces for name, destination in destinations.items()}, mesh.world_group)
        for destination in destinations.values():
            destination.finish()
        pending = {name: stored_name for name, stored_name in pending.items() if batch[stored_name] != name}


class _Destination:
    """Destination of a stored tensor: the live pieces, or a buffer whose remapped rows are copied afterwards."""

    def __init__(self, tensor: Tensor | ShardedView, stored: Size, remap: RowRemap | None) -> None:
        live = ShardedView.whole(tensor)
        self._copies: list[tuple[Tensor, np.ndarray, Tensor]] = []
        if remap is None:
            self.pieces = live if live.size() == stored else live.with_rows(stored[0])
            return
        buffers = []
        for start, piece in live.shards.items():
            assert remap.source_rows is not None
            source = remap.source_rows[start[0] : start[0] + len(piece)]
            found = source[source >= 0]
            if not len(found):
                continue
            first, last = int(found.min()), int(found.max())
            buffer = piece.new_empty((last - first + 1, *piece.shape[1:]))
            buffers.append(((first, *start[1:]), buffer))
            self._copies.append((piece, source - first, buffer))
        self.pieces = ShardedView(stored, buffers)

    def finish(self) -> None:
        for piece, source, buffer in self._copies:
            rows = torch.from_numpy(np.flatnonzero(source >= 0)).to(piece.device)
            piece[rows] = buffer[torch.from_numpy(source[source >= 0]).to(piece.device)]


def _read_dynamic(
    root: Path, state: TrainState, mesh: Mesh, options: LoadOptions, remaps: Mapping[str, RowRemap]
) -> list[str]:
    tables = dynamic_tables(state.model)
    stored = read_tables(root) if tables else {}
    names = {name: _stored_table(options, name) for name in tables}
    sources = [
        (table, names[name], stored.get(names[name], []), remaps.get(f"{TABLES}{name}"))
        for name, table in tables.items()
    ]
    problems = [line for source in sources for line in table_problems(*source, with_states=options.optimizer)]
    if problems and options.strict:
        raise DataError(_message(root, problems, [], "TrainerArgs.ckpt_load_strict = False loads what fits."))
    for source in sources:
        load_table(*source, mesh, with_states=options.optimizer)
    return problems


def _restore_metadata(root: Path, state: TrainState, mesh: Mesh) -> None:
    try:
        stored = read_metadata(root)
        if state.phase == Phase.of(stored) and (changed := difference(stored.get("trained_on"), state.trained_on)):
            raise DataError(f"{root} was trained on other data: {changed}; see TrainerArgs.continue_on")
        state.load_metadata(stored)
        ranks, tp, cp = sizes_of_ranks(stored)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DamagedCheckpoint(
            f"{root / 'progress.json'} is damaged: it lacks a part of the state, {error}. Load another checkpoint."
        ) from error
    if (ranks, tp, cp) == (mesh.world_size, mesh.tp_size, mesh.cp_size):  # a group's generators must agree
        set_random_state(torch_load(verified_file(root, RANDOM_FILES.replace("*", str(mesh.rank)))), mesh.device)
    else:
        log.info("%s was saved by %d ranks in groups of %d: dropout starts from fresh seeds", root, ranks, tp * cp)


def _message(root: Path, problems: list[str], differences: list[ConfigDifference], remedy: str) -> str:
    lines = _shortened(list(dict.fromkeys(problems)))
    if differences:
        lines += ["The configurations differ in:", *_shortened([str(entry) for entry in differences])]
    return "\n  ".join([f"cannot load the checkpoint {root}:", *lines]) + f"\n{remedy}"


def _shortened(lines: list[str]) -> list[str]:
    more = len(lines) - _SHOWN_PROBLEMS
    return [*lines[:_SHOWN_PROBLEMS], f"and {more} more"] if more > 0 else lines
