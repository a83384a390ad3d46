"""What ``--validate-only`` checks beyond the gin files: the data, the checkpoint and the machine that they need.

A check gets the run, which lacks the values that are wrong, and ``Opened``, what the files name. Like a rule
(hstu/config/rules), it yields a Problem for each mistake and ends without one where it reads something unknown.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import psutil
import torch

from hstu.base.errors import ConfigError, UserError
from hstu.checkpoint.directory import file_problems, read_manifest
from hstu.checkpoint.find import AUTO
from hstu.checkpoint.load import ModelShape, match_checkpoint
from hstu.checkpoint.matching import LoadOptions
from hstu.checkpoint.raw_ids import RawIds
from hstu.config.args import Args, DatasetArgs, RankingArgs
from hstu.config.incomplete import apply
from hstu.config.problems import Problem, did_you_mean
from hstu.config.rules.task import label_leak
from hstu.config.run_config import RunDraft
from hstu.data.features.roles import FeatureRoles
from hstu.data.store.sequence_store import SequenceStore
from hstu.estimate.dry_run import dry_run
from hstu.estimate.estimate import size
from hstu.estimate.memory import beside_tables, memory
from hstu.estimate.opened import Attempt, Labels, Opened
from hstu.estimate.plan import plan_workload
from hstu.estimate.tables import TableShards, plan_tables
from hstu.estimate.workload import Workload
from hstu.model.stack import kernel_shapes
from hstu.observe.logging import quiet_libraries
from hstu.ops.costs import FLOAT32
from hstu.ops.select import select_kernels
from hstu.optim.dense import match_part_optimizers
from hstu.parallel.table_optimizer import TableTraining, is_rowwise
from hstu.parallel.tables import check_kernels, check_memory, room_of_rank
from hstu.train.label_codes import label_offset
from hstu.train.tables import check_rows


def what_the_file_names_fits(run: RunDraft) -> Iterator[Problem]:
    """Apply all checks. An error that ends one is told where no problem explains it."""
    quiet_libraries()
    opened, found, errors = Opened(run), 0, []
    for check in CHECKS:
        try:
            for problem in apply((check,), run, opened):
                found += 1
                yield problem
        except UserError as error:
            errors.append(error)
    if not found:
        for each in errors:
            yield from reported(run, run.dataset, _place_of_data(run.dataset), each)


def reported(run: RunDraft, part: Args, parameter: str, error: UserError | None) -> Iterator[Problem]:
    """The problems of a failed attempt, at the place that they name, or else at ``part.parameter``."""
    if error is None:
        return
    places = tuple(f"{name}:" for name in (*run.source_files, "--gin-bindings"))
    for text in error.problems if isinstance(error, ConfigError) else [str(error)]:
        yield Problem(text) if text.startswith(places) else run.problem(part, parameter, text)


# --- data ----------------------------------------------------------------------------------------------------------


def data_can_be_opened(run: RunDraft, opened: Opened) -> Iterator[Problem]:
    """dataset_path, or the directory of a built-in dataset, and eval_dataset_path hold intact stores."""
    dataset = run.dataset
    if isinstance(dataset, DatasetArgs):
        yield from reported(run, dataset, _place_of_data(dataset), opened.store.error)
        if path := dataset.eval_dataset_path:
            yield from reported(run, dataset, "eval_dataset_path", Attempt(lambda: SequenceStore.open(path)).error)


def features_are_in_the_data(run: RunDraft, opened: Opened) -> Iterator[Problem]:
    """The data has the named features, each in its role."""
    store, error = opened.store.value, opened.roles.error
    yield from reported(run, run.dataset, "dataset_name", error)
    for table in run.embeddings if error is not None else ():
        if unknown := [name for name in table.feature_names if name not in store.features]:
            text = f"the data has no feature {', '.join(map(repr, unknown))}; it has {', '.join(store.features)}"
            yield run.problem(table, "feature_names", text + did_you_mean(unknown[0], store.features))


def tables_fit_the_data(run: RunDraft, opened: Opened) -> Iterator[Problem]:
    """Static tables have rows for all ids, and every feature has one table."""
    store = opened.store.value
    names = (*store.features, *store.time_features)
    cardinalities = {name: store.cardinality(name) for name in names if store.feature(name).cardinality is not None}
    known = [table for table in run.embeddings if set(table.feature_names) <= cardinalities.keys()]
    raw = tuple(name for name in cardinalities if store.feature(name).raw)
    too_small = Attempt(lambda: check_rows(known, cardinalities, run.located, raw)).error
    yield from reported(run, run.dataset, "dataset_name", too_small)
    yield from reported(run, run.dataset, "dataset_name", opened.tables.error)


def specs_can_be_made(run: RunDraft, opened: Opened) -> Iterator[Problem]:
    """The tables have possible names, widths and sizes."""
    yield from reported(run, run.dataset, "dataset_name", opened.specs.error)


def samples_can_be_made(run: RunDraft, opened: Opened) -> Iterator[Problem]:
    """The splits have samples, the ids of a second store are known, and the batches of a rank have room."""
    if isinstance(run.dataset, DatasetArgs) and [
        *features_are_in_the_data(run, opened),
        *tables_fit_the_data(run, opened),
    ]:
        return  # the same again
    yield from reported(run, run.dataset, _place_of_data(run.dataset), opened.source.error)


def _place_of_data(dataset: Args) -> str:
    """The parameter that says where the data is."""
    is_named = isinstance(dataset, DatasetArgs)
    return "dataset_path" if getattr(dataset, "dataset_path", None) else "dataset_name" if is_named else "feature_args"


# --- model ---------------------------------------------------------------------------------------------------------


def masks_hide_the_labels(run: RunDraft, opened: Opened) -> Iterator[Problem]:
    """With the contextual features of the data: see ``label_leak``."""
    yield from label_leak(run, has_context=bool(opened.roles.value.contextual))


def head_fits_the_labels(run: RunDraft, opened: Opened) -> Iterator[Problem]:
    """The head of a ranking model has a class for every action of the data."""
    args, dataset = run.task_args, run.dataset
    if not isinstance(args, RankingArgs) or args.tasks is not None:
        return
    if isinstance(dataset, DatasetArgs):
        store = opened.store.value
        action = dataset.action_feature_name or store.action_feature
        if action is not None and action not in store.features:
            return  # reported as a feature
        roles = FeatureRoles(store.item_feature, action, ())
        ids, least = ({action: store.cardinality(action)}, store.least_value(action)) if action else ({}, 0)
        labels = Labels(roles, ids, least)
    else:
        tables = {name: table.item_vocab_size_or_capacity for table in run.embeddings for name in table.feature_names}
        labels = Labels(opened.roles.value, tables, 0)
    error = Attempt(lambda: label_offset(args, labels, run.located)).error
    yield from reported(run, args, "prediction_head_arch", error)


def part_optimizers_have_an_effect(run: RunDraft, opened: Opened) -> Iterator[Problem]:
    """Every regular expression of part_optimizers finds a weight that is not an earlier one's."""
    args = run.optimizer
    if args.part_optimizers:
        attempt = Attempt(lambda: match_part_optimizers(opened.dense_weights, args, run.located))
        yield from reported(run, args, "part_optimizers", attempt.error)


def kernels_run_here(run: RunDraft, opened: Opened) -> Iterator[Problem]:
    """The kernels that strict_kernel_backend demands can run on this machine."""
    network, tp = run.network, run.tensor_parallel.tensor_model_parallel_size
    shapes, device = kernel_shapes(network, tp), torch.device(_device_type())
    attempt = Attempt(lambda: select_kernels(network.kernel_backend, network.strict_kernel_backend, device, shapes))
    if attempt.error is not None:
        yield run.problem(network, "kernel_backend", str(attempt.error))


def kernels_of_tables_run_here(run: RunDraft, opened: Opened) -> Iterator[Problem]:
    """The device has the kernels that EmbeddingArgs.compute_kernel demands."""
    tables = {table.table_name: table for table in run.embeddings}
    for spec in opened.specs.value:
        if spec.compute_kernel is not None:
            error = Attempt(partial(check_kernels, [spec], run.optimizer, _device_type())).error
            yield from reported(run, tables[spec.name], "compute_kernel", error)


# --- checkpoint ----------------------------------------------------------------------------------------------------


def checkpoint_can_be_read(run: RunDraft, opened: Opened) -> Iterator[Problem]:
    """ckpt_load_dir holds a complete checkpoint whose files are intact, and ckpt_param_map can be read."""
    trainer = run.trainer
    yield from reported(run, trainer, "ckpt_param_map", Attempt(lambda: LoadOptions.from_args(trainer)).error)
    yield from reported(run, trainer, "ckpt_load_dir", opened.checkpoint.error)
    if (root := opened.checkpoint.value) is not None:
        damage = Attempt(lambda: file_problems(root, read_manifest(root)))
        for problem in damage.value if damage.error is None else [str(damage.error)]:
            yield run.problem(trainer, "ckpt_load_dir", problem, is_warning=trainer.ckpt_load_dir == AUTO)


def checkpoint_fits_the_model(run: RunDraft, opened: Opened) -> Iterator[Problem]:
    """The checkpoint holds the weights of this model and, where they are loaded, the states of its optimizers."""
    if list(checkpoint_can_be_read(run, opened)):
        return
    trainer = run.trainer
    root, options = opened.checkpoint.value, LoadOptions.from_args(trainer)
    if root is None:
        return
    raw_ids = RawIds()
    if isinstance(run.dataset, DatasetArgs):
        raw_ids = RawIds.from_store(opened.store.value, opened.roles.value.names)
    shape = ModelShape(opened.tensor_sizes, opened.specs.value, raw_ids, opened.operative_gin)
    yield from reported(run, trainer, "ckpt_load_dir", Attempt(lambda: match_checkpoint(root, shape, options)).error)


# --- machine -------------------------------------------------------------------------------------------------------


def memory_is_enough(run: RunDraft, opened: Opened) -> Iterator[Problem]:
    """The estimated memory of a rank is not more than it has on this machine."""
    device, ranks_here = _device_type(), int(os.environ.get("LOCAL_WORLD_SIZE", run.world_size))
    workload = plan_workload(run.finish(), run.world_size, ranks_here, device)
    plan = Attempt(partial(_plan_with_room, workload, ranks_here))
    yield from reported(run, run.dataset, _place_of_data(run.dataset), plan.error)
    needed = sum(memory(workload, plan.value, dry_run(workload, workload.largest)).values())
    if device == "cuda":
        has, owner = torch.cuda.get_device_properties(0).total_memory, "the GPU"
    else:
        has, owner = psutil.virtual_memory().total // ranks_here, "this host" if ranks_here == 1 else "a rank's share"
    if needed > has:
        text = (
            f"a rank needs about {size(needed)}, and {owner} has {size(has)}; scripts/estimate.py shows what "
            "needs the memory, also on another --device, and with --fit what fits. Lower the batch, shard the tables "
            "over more ranks (model_parallel), or recompute layers (NetworkArgs.recompute_layer)"
        )
        yield run.problem(run.trainer, "train_batch_size", text)


def _plan_with_room(workload: Workload, ranks_here: int) -> tuple[TableShards, ...]:
    """The shards of the tables. Raises ConfigError for tables that the host or the ranks have no room for."""
    check_memory(workload.specs, workload.config, ranks_here, workload.world_size)
    room = room_of_rank(torch.device(workload.device_type), ranks_here, lambda: beside_tables(workload))
    return plan_tables(workload, room)


def directories_can_be_written(run: RunDraft, opened: Opened) -> Iterator[Problem]:
    """output_dir and, if checkpoints are saved, ckpt_save_dir can be created and written."""
    trainer = run.trainer
    yield from reported(run, trainer, "ckpt_load_dir", opened.directories.error)
    for parameter, path in zip(("output_dir", "ckpt_save_dir"), opened.directories.value, strict=True):
        if parameter == "ckpt_save_dir" and not trainer.saves_checkpoints:
            continue
        existing = _existing_ancestor(path)
        try:
            with TemporaryFile(dir=existing):
                pass
        except OSError as error:
            text = f"{existing} cannot be written: {error.strerror or error}; give another directory"
            yield run.problem(trainer, parameter, text)


def disk_has_room_for_checkpoints(run: RunDraft, opened: Opened) -> Iterator[Problem]:
    """The disk of ckpt_save_dir has room for one checkpoint; a warning if it has none for all that are kept."""
    trainer, args = run.trainer, run.optimizer
    if not trainer.saves_checkpoints:
        return
    dynamic = sum(
        spec.rows
        * (spec.dim + sum(1 if is_rowwise(state) else spec.dim for state in TableTraining.of(spec, args).states))
        for spec in opened.specs.value
        if spec.dynamic is not None
    )
    one = FLOAT32 * (sum(size.numel() for size in opened.tensor_sizes.values()) + dynamic)
    free = shutil.disk_usage(_existing_ancestor(opened.directories.value[1])).free
    saved, kept = 1, trainer.ckpt_keep_last
    if trainer.ckpt_save_interval is not None and trainer.max_train_iters is not None:
        saved = -(-trainer.max_train_iters // trainer.ckpt_save_interval)
    kept = saved if kept is None else min(saved, kept + 1)  # the best one, or one that is being written
    if one > free:
        text = f"a checkpoint has about {size(one)}, and {size(free)} are free there; give another directory"
        yield run.problem(trainer, "ckpt_save_dir", text)
    elif kept * one > free:
        text = (
            f"{kept} checkpoints of about {size(one)} each are kept, and {size(free)} are free there; set "
            "TrainerArgs.ckpt_keep_last, or give another directory"
        )
        yield run.problem(trainer, "ckpt_save_dir", text, is_warning=True)


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _existing_ancestor(path: Path) -> Path:
    """The path itself, or the nearest directory above it that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


CHECKS = (
    data_can_be_opened, features_are_in_the_data, tables_fit_the_data, specs_can_be_made, samples_can_be_made,
    masks_hide_the_labels, head_fits_the_labels, part_optimizers_have_an_effect,
    kernels_run_here, kernels_of_tables_run_here,
    checkpoint_can_be_read, checkpoint_fits_the_model,
    memory_is_enough, directories_can_be_written, disk_has_room_for_checkpoints,
)  # fmt: skip

PREFLIGHT_RULES = (what_the_file_names_fits,)
