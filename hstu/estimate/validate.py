"""``--validate-only``: builds a run step by step and reports all mistakes instead of stopping at the first.

Each step builds one part of the run and stores it in ``Built``. It ends where it reads a missing value or part.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from types import SimpleNamespace
from typing import Any, cast

import psutil
import torch

from hstu.base.errors import ConfigError, UserError
from hstu.checkpoint.directory import file_problems, read_manifest
from hstu.checkpoint.find import AUTO, candidates
from hstu.checkpoint.load import match_checkpoint
from hstu.checkpoint.matching import LoadOptions
from hstu.checkpoint.phase import choose_phase
from hstu.checkpoint.raw_ids import RawIds
from hstu.config.args import Args, DatasetArgs, RankingArgs
from hstu.config.option import problem
from hstu.config.problems import Problem, Unknown, apply, did_you_mean
from hstu.config.rules import RULES
from hstu.config.rules.task import label_leak, tasks_of
from hstu.config.run_config import RunDraft
from hstu.data.datasets import store_path
from hstu.data.features.roles import FeatureRoles, benchmark_roles, resolve_roles
from hstu.data.rules import DATA_RULES
from hstu.data.store.sequence_store import SequenceStore
from hstu.estimate.estimate import beside_tables, memory, size
from hstu.estimate.sharding import dense_tensors, plan_tables, table_tensors
from hstu.estimate.workload import plan_workload
from hstu.model.embedding import table_specs
from hstu.model.stack import kernel_shapes
from hstu.observe.logging import quiet_libraries
from hstu.observe.run_directory import default_path
from hstu.ops.costs import FLOAT32
from hstu.ops.select import select_kernels
from hstu.parallel.table_optimizer import TableTraining
from hstu.parallel.tables import check_kernels, check_memory, room_of_rank
from hstu.train.batch_source import BatchSource, label_offset
from hstu.train.builder import directory_of_checkpoints
from hstu.train.sources import open_source
from hstu.train.tables import check_rows, choose_tables, predefined_tables


class Built(SimpleNamespace):
    """The parts of the run that could be built, and what is wrong. Reading a missing part raises Unknown."""

    def __init__(self, run: RunDraft) -> None:
        super().__init__(run=run, problems=[])

    def __getattr__(self, name: str) -> Any:
        raise Unknown(name)

    def add(self, part: Args, parameter: str, text: str, is_warning: bool = False) -> None:
        """Add a problem of an option."""
        self.problems.append(problem(part, parameter, text, is_warning))

    @contextmanager
    def at(self, part: Args, parameter: str) -> Iterator[None]:
        """Turn a UserError into problems. Those that name no file and line are located at ``part.parameter``."""
        try:
            yield
        except UserError as error:
            places = tuple(f"{name}:" for name in (*self.run.source_files, "--gin-bindings"))
            for text in error.problems if isinstance(error, ConfigError) else [str(error)]:
                own = Problem(text) if text.startswith(places) else problem(part, parameter, text)
                self.problems.append(own)


def what_the_file_names_fits(run: RunDraft) -> Iterator[Problem]:
    """Builds everything that the gin files name and yields the problems."""
    quiet_libraries()
    built = Built(run)
    place = "dataset_name" if isinstance(run.dataset, DatasetArgs) else "feature_args"
    if getattr(run.dataset, "dataset_path", None):
        place = "dataset_path"
    is_wrong = any(not found.is_warning for found in apply((*RULES, *DATA_RULES), run))
    for step in STEPS:  # if rules tell mistakes, what is built of them may fail anyhow
        with suppress(Exception if is_wrong else Unknown), built.at(run.dataset, place):
            step(run, built)
    yield from built.problems


def open_data(run: RunDraft, built: Built) -> None:
    """The preprocessed data is intact, and has the features that the model reads."""
    dataset = run.dataset
    if not isinstance(dataset, DatasetArgs):
        built.roles, built.tables = benchmark_roles(dataset), tuple(run.embeddings)
        return
    if path := dataset.eval_dataset_path:
        with built.at(dataset, "eval_dataset_path"):
            SequenceStore.open(store_path(replace(dataset, dataset_path=path)))
    built.store = SequenceStore.open(store_path(dataset))
    with built.at(dataset, "dataset_name"):
        built.roles = resolve_roles(built.store, dataset, tasks_of(run), run.has_item_tower)


def rows_suffice(run: RunDraft, built: Built) -> None:
    """Static tables have rows for all ids, and the data has the features of all tables."""
    store = built.store
    features = {name: store.feature(name) for name in (*store.features, *store.time_features)}
    ids = {name: store.cardinality(name) for name, each in features.items() if each.cardinality is not None}
    known = [table for table in run.embeddings if set(table.feature_names) <= ids.keys()]
    with built.at(run.dataset, "dataset_name"):
        check_rows(known, ids, tuple(name for name in ids if features[name].raw))
    for table in [] if hasattr(built, "roles") else run.embeddings:  # if roles exist, choose_tables reports it
        if unknown := [name for name in table.feature_names if name not in store.features]:
            text = f"the data has no feature {', '.join(map(repr, unknown))}; it has {', '.join(store.features)}"
            built.add(table, "feature_names", text + did_you_mean(unknown[0], store.features))


def fit_tables(run: RunDraft, built: Built) -> None:
    """Each feature has one table, with a valid name, width and size."""
    dataset, roles = run.dataset, built.roles
    with built.at(dataset, "dataset_name"):
        if isinstance(dataset, DatasetArgs):
            predefined = predefined_tables(dataset, built.store, run.network)
            built.tables = choose_tables(run.embeddings, predefined, roles.names, roles.numbers)
        built.specs = table_specs(built.tables, run.network, roles, run.looks_up_negatives, run.world_size)


def open_samples(run: RunDraft, built: Built) -> None:
    """The splits have samples, the ids of a second store are known, and each rank's batches fit."""
    config, _ = run.finish(), built.tables
    built.source = open_source(config, None, run.world_size)


def masks_hide_the_labels(run: RunDraft, built: Built) -> None:
    """Applies ``label_leak`` with the contextual features of the data."""
    built.problems += label_leak(run, has_context=bool(built.roles.contextual))


def head_fits_the_labels(run: RunDraft, built: Built) -> None:
    """The head of a ranking model has a class for every action of the data."""
    args, dataset = run.task_args, run.dataset
    if not isinstance(args, RankingArgs) or args.tasks is not None:
        return
    if isinstance(dataset, DatasetArgs):
        store = built.store
        action = dataset.action_feature_name or store.action_feature
        if action is not None and action not in store.features:
            return  # another step reports the missing feature
        roles = FeatureRoles(store.item_feature, action, ())
        ids, least = ({action: store.cardinality(action)}, store.least_value(action)) if action else ({}, 0)
    else:
        ids = {name: table.item_vocab_size_or_capacity for table in run.embeddings for name in table.feature_names}
        roles, least = built.roles, 0
    labels = cast(BatchSource, SimpleNamespace(roles=roles, cardinalities=ids, least_action=least))
    with built.at(args, "prediction_head_arch"):
        label_offset(args, labels)


def kernels_run_here(run: RunDraft, built: Built) -> None:
    """This machine has the kernels that strict_kernel_backend and EmbeddingArgs.compute_kernel require."""
    network, device = run.network, _device_type()
    tp, cp = run.tensor_parallel, run.context_parallel
    shapes = kernel_shapes(network, tp.tensor_model_parallel_size, cp.context_parallel_size)
    with built.at(network, "kernel_backend"):
        select_kernels(network.kernel_backend, network.strict_kernel_backend, torch.device(device), shapes)
    tables = {table.table_name: table for table in run.embeddings}
    for spec in built.specs:
        if spec.compute_kernel is not None:
            with built.at(tables[spec.name], "compute_kernel"):
                check_kernels([spec], run.optimizer, device)


def build_dense(run: RunDraft, built: Built) -> None:
    """The dense part and its optimizers can be built. Stores the sizes of all checkpoint tensors."""
    with built.at(run.optimizer, "part_optimizers"):
        built.tensors = dense_tensors(run, built.roles) | table_tensors(run, built.specs)


def choose_directories(run: RunDraft, built: Built) -> None:
    """output_dir and, if checkpoints are saved, ckpt_save_dir are writable. Creates neither."""
    trainer, path = run.trainer, Path(run.trainer.output_dir or default_path(run.source_files))
    with built.at(trainer, "ckpt_load_dir"):
        built.save_dir = directory_of_checkpoints(run, path)
    written = {"output_dir": path} | ({"ckpt_save_dir": built.save_dir} if trainer.saves_checkpoints else {})
    for parameter, directory in written.items():
        existing = _existing_ancestor(directory)
        try:
            TemporaryFile(dir=existing).close()
        except OSError as error:
            text = f"{existing} cannot be written: {error.strerror or error}; give another directory"
            built.add(trainer, parameter, text)


def open_checkpoint(run: RunDraft, built: Built) -> None:
    """ckpt_load_dir holds a complete, undamaged checkpoint, and ckpt_param_map is readable."""
    trainer = run.trainer
    with built.at(trainer, "ckpt_param_map"):
        built.load_options = LoadOptions.from_args(trainer)
    with built.at(trainer, "ckpt_load_dir"):
        for root in candidates(trainer.ckpt_load_dir, built.save_dir)[:1]:
            damage = file_problems(root, read_manifest(root))
            for text in damage:
                built.add(trainer, "ckpt_load_dir", text, is_warning=trainer.ckpt_load_dir == AUTO)
            if not damage:
                built.checkpoint = root


def match_the_checkpoint(run: RunDraft, built: Built) -> None:
    """The checkpoint holds the weights of this model and, if they are to be loaded, its optimizer states."""
    raw_ids, gin = RawIds(), ""
    if isinstance(run.dataset, DatasetArgs):
        raw_ids = RawIds.from_store(built.store, built.roles.names)
        if run.trainer.ckpt_load_optimizer:
            with built.at(run.trainer, "continue_on"):
                choose_phase(built.checkpoint, built.source.trained_on, built.store, run.trainer.continue_on)
    with suppress(Unknown):
        gin = run.finish().operative_gin()
    with built.at(run.trainer, "ckpt_load_dir"):
        match_checkpoint(built.checkpoint, built.load_options, built.tensors, built.specs, raw_ids, gin)


def memory_is_enough(run: RunDraft, built: Built) -> None:
    """The estimated memory of a rank fits into this machine."""
    device, ranks_here = _device_type(), int(os.environ.get("LOCAL_WORLD_SIZE", run.world_size))
    workload = plan_workload(run.finish(), run.world_size, ranks_here, device, built.source)
    check_memory(workload.specs, workload.config, ranks_here, run.world_size)
    room = room_of_rank(torch.device(device), ranks_here, lambda: beside_tables(workload))
    needed = sum(memory(workload, plan_tables(workload, room)).values())
    if device == "cuda":
        has, owner = torch.cuda.get_device_properties(0).total_memory, "the GPU"
    else:
        has, owner = psutil.virtual_memory().total // ranks_here, "this host" if ranks_here == 1 else "a rank's share"
    if needed > has:
        text = (
            f"a rank needs about {size(needed)}, and {owner} has {size(has)}; scripts/estimate.py shows what "
            "needs the memory, also on another --device. Lower the batch, shard the tables "
            "over more ranks (model_parallel), or recompute layers (NetworkArgs.recompute_layer)"
        )
        built.add(run.trainer, "train_batch_size", text)


def disk_has_room_for_checkpoints(run: RunDraft, built: Built) -> None:
    """The disk of ckpt_save_dir has room for one checkpoint. Too little room for all kept ones is a warning."""
    trainer, args = run.trainer, run.optimizer
    if not trainer.saves_checkpoints:
        return
    one = FLOAT32 * sum(shape.numel() for shape in built.tensors.values())
    for spec in (spec for spec in built.specs if spec.dynamic is not None):
        one += spec.rows * TableTraining.of(spec, args).bytes_per_row(spec.dim)
    free = shutil.disk_usage(_existing_ancestor(built.save_dir)).free
    saved, kept = 1, trainer.ckpt_keep_last
    if isinstance(trainer.ckpt_save_interval, int) and trainer.max_train_iters is not None:
        saved = -(-trainer.max_train_iters // trainer.ckpt_save_interval)
    kept = saved if kept is None else min(saved, kept + 1)  # plus the best one, or the one being written
    if one > free:
        text = f"a checkpoint has about {size(one)}, and {size(free)} are free there; give another directory"
        built.add(trainer, "ckpt_save_dir", text)
    elif kept * one > free:
        text = (
            f"{kept} checkpoints of about {size(one)} each are kept, and {size(free)} are free there; set "
            "TrainerArgs.ckpt_keep_last, or give another directory"
        )
        built.add(trainer, "ckpt_save_dir", text, is_warning=True)


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _existing_ancestor(path: Path) -> Path:
    """The path itself or its nearest existing ancestor."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


STEPS = (
    open_data, rows_suffice, fit_tables, open_samples,
    masks_hide_the_labels, head_fits_the_labels, kernels_run_here, build_dense,
    choose_directories, open_checkpoint, match_the_checkpoint,
    memory_is_enough, disk_has_room_for_checkpoints,
)  # fmt: skip
