"""From a checked configuration to a Trainer: every part is made here, in the order in which it is needed."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from hstu.checkpoint.background import Background
from hstu.checkpoint.match import LoadOptions
from hstu.checkpoint.row_ids import RowIds
from hstu.checkpoint.state import TrainState
from hstu.checkpoint.store import CheckpointStore
from hstu.config.args import RankingArgs, RetrievalArgs, TrainerArgs
from hstu.config.errors import ConfigError, UserError
from hstu.config.rule_engine import Run
from hstu.config.run_config import RunConfig
from hstu.data.batch import NEGATIVES
from hstu.model.compiled import compile_parts, why_not
from hstu.model.embedding import table_specs
from hstu.model.gr_model import GRModel
from hstu.model.inputs import SequenceFeatures
from hstu.model.precision import DTYPES
from hstu.model.ranking import RankingDense
from hstu.model.retrieval import RetrievalDense
from hstu.model.stack import SequenceEncoder
from hstu.observe.logging import set_up_logging
from hstu.observe.peak import peak_tflops
from hstu.observe.run_directory import RunDirectory, default_path
from hstu.observe.throughput import ThroughputMeter
from hstu.ops.backends import describe_kernels, select_backend
from hstu.optim.loss_scale import LossScale
from hstu.optim.optimizers import Optimizers, build_optimizers
from hstu.optim.parts import Cite
from hstu.optim.schedule import Schedule
from hstu.parallel.collectives import gather_objects, gather_rows
from hstu.parallel.dense import replicate_dense
from hstu.parallel.embedding import shard
from hstu.parallel.group import embeddings_gatherer
from hstu.parallel.mesh import Mesh, seed_dropout
from hstu.parallel.tensor import split_encoder
from hstu.pipeline.base import TrainPipeline
from hstu.pipeline.native import NativePipeline
from hstu.pipeline.none import SequentialPipeline
from hstu.pipeline.prefetch import PrefetchPipeline
from hstu.train.evaluator import Evaluator, RankingEvaluator, RetrievalEvaluator
from hstu.train.leaks import leak
from hstu.train.sources import BatchSource, StoreSource, open_source
from hstu.train.trainer import Trainer
from hstu.train.work import StepWork

log = logging.getLogger(__name__)

T = TypeVar("T")
PIPELINES: dict[str, type[TrainPipeline]] = {
    "none": SequentialPipeline,
    "native": NativePipeline,
    "prefetch": PrefetchPipeline,
}


def build_trainer(config: RunConfig, mesh: Mesh) -> Trainer:
    """A trainer that is ready to ``train()``. Raises ConfigError or DataError where the configuration cannot be."""
    run_directory = open_run_directory(config, mesh)
    mesh.progress.mark("opening the data")
    source = on_all_ranks(lambda: open_source(config, mesh), mesh)
    mesh.progress.mark("building the model")
    model, optimizers = build_model(config, source, mesh)
    state = TrainState(model, optimizers, config.operative_gin(), ids=row_ids(source))
    peak = peak_tflops(mesh.device, DTYPES[config.network.dtype_str])
    log.info("peak for MFU: %.3g TFLOPS a rank (%s)", peak.value, peak.source)
    return Trainer(
        args=config.trainer,
        mesh=mesh,
        source=source,
        pipeline=build_pipeline(config.trainer, model, optimizers, mesh, build_loss_scale(config)),
        schedule=Schedule(config.schedule),
        evaluator=build_evaluator(config, source, model, mesh),
        checkpoints=build_checkpoints(config.trainer, mesh),
        state=state,
        run_directory=run_directory,
        meter=ThroughputMeter(peak.value),
        work=StepWork(config.network, source.roles),
        total_iters=total_iters(config.trainer, source.batches_per_epoch),
    )


def on_all_ranks(part: Callable[[], T], mesh: Mesh) -> T:
    """What ``part``, which is no collective, makes on this rank; a user's error on any rank is raised on all.

    A disk that one host lacks must not leave the other ranks waiting for it.
    """
    made, mistake = None, None
    try:
        made = part()
    except UserError as error:
        mistake = error
    for problem in gather_objects(mistake, mesh.world_group):
        if problem is not None:
            raise problem
    return cast(T, made)


def open_run_directory(config: RunConfig, mesh: Mesh) -> RunDirectory:
    """The run's directory, the same on all ranks, and the log that goes into it."""
    path = config.trainer.output_dir or gather_objects(str(default_path(config.source_files)), mesh.world_group)[0]
    trackers: dict[str, Any] = {
        "tensorboard": config.trainer.tensorboard,
        "wandb_project": config.trainer.wandb_project,
        "config": {name: dataclasses.asdict(part) for name, part in config.parts().items()},
    }
    text = config.operative_gin()
    run_directory = on_all_ranks(lambda: RunDirectory(Path(path), text, mesh.is_main, **trackers), mesh)
    set_up_logging(mesh.rank, run_directory.log_file)
    log.info("%s run in %s, %d rank(s) on %s", config.task, path, mesh.world_size, mesh.device)
    return run_directory


def build_model(config: RunConfig, source: BatchSource, mesh: Mesh) -> tuple[GRModel, Optimizers]:
    """The model, its tables sharded and its dense part replicated over ``mesh``, and its optimizers. Collective."""
    if config.network.dtype_str == "float16" and mesh.device.type == "cpu":
        log.warning("float16 on a CPU: its products take hundreds of times as long as those of other types")
    retrieval = config.task_args if isinstance(config.task_args, RetrievalArgs) else None
    has_negatives = retrieval is not None and retrieval.negatives != "in_batch"
    specs = table_specs(
        source.tables, config.network, source.roles.contextual, source.roles.item, has_negatives, mesh.world_size
    )
    keys = (*source.roles.names, *([NEGATIVES] if has_negatives else []))
    task = build_task(config, source, mesh)
    if config.network.compile:
        compile_on_all_ranks(task, mesh)
    parameters = sum(parameter.numel() for parameter in task.parameters())
    split_encoder(cast(SequenceEncoder, task.encoder), mesh)
    gather = embeddings_gatherer(mesh) if mesh.tp_size > 1 else None
    model = GRModel(specs, task, keys, source.roles.item, config.trainer.seed, gather)
    model.dense.to(mesh.device)  # the sharded tables are made where they belong
    model, table_optimizer = shard(model, config, mesh)
    precision = "float32" if config.precision.fp32_master_grads else config.network.dtype_str
    model = replicate_dense(model, mesh, DTYPES[precision])
    optimizers = build_optimizers(model, config.optimizer, table_optimizer, mesh, _citing(config, mesh))
    seed_dropout(mesh)
    rows = sum(spec.rows for spec in specs)
    log.info("model: %s dense parameters, %s rows in %d tables", f"{parameters:,}", f"{rows:,}", len(specs))
    return model, optimizers


def compile_on_all_ranks(task: RankingDense | RetrievalDense, mesh: Mesh) -> None:
    """Compile parts of ``task``, or on no rank: those that share weights must compute the same bits. Collective."""
    reasons = [reason for reason in gather_objects(why_not(mesh.device), mesh.world_group) if reason is not None]
    if reasons:
        log.warning("NetworkArgs.compile: nothing is compiled, %s", reasons[0])
    else:
        log.info("compiled at first use: %s", ", ".join(compile_parts(task)) or "nothing, all is in kernels")


def _citing(config: RunConfig, mesh: Mesh) -> Cite:
    """What tells a mistake that only the model shows as those of the file are told: with its place there."""
    run = Run(config.task, mesh.world_size, config.parts(), config.origins)
    return lambda part, parameter, text: str(run.problem(part, parameter, text))


def row_ids(source: BatchSource) -> RowIds:
    """The raw ids of the tables' rows; random data has none."""
    return RowIds.of(source.store, source.roles.names) if isinstance(source, StoreSource) else RowIds()


def build_task(config: RunConfig, source: BatchSource, mesh: Mesh) -> RankingDense | RetrievalDense:
    """The dense part: sequence encoder and the head or loss of the task."""
    network, roles = config.network, source.roles
    features = SequenceFeatures(roles.item, roles.action, roles.contextual, source.max_items)
    backend = select_backend(network.kernel_backend, network.strict_kernel_backend, mesh.device)
    kernels = describe_kernels(
        backend,
        head_dim=network.kv_channels,
        item_dim=network.item_width,
        dtype=DTYPES[network.dtype_str],
        has_bias=network.position_encoding == "relative_bias",
    )
    log.info("kernels: %s", kernels)
    encoder = SequenceEncoder(network, features, backend)
    seen = leak(config.task, network, roles, config.dataset.max_num_candidates)
    if seen:
        log.warning("losses and metrics will look better than they are: %s", seen)
    if isinstance(config.task_args, RankingArgs):
        return RankingDense(encoder, config.task_args, label_offset=label_offset(config.task_args, source))
    return RetrievalDense(
        encoder,
        item_feature=roles.item,
        hidden_size=network.hidden_size,
        item_dim=network.item_width,
        args=config.task_args,
        gather_pool=lambda rows, ids: gather_rows(rows, ids, mesh.dp_group),
        backend=backend,
    )


def label_offset(args: RankingArgs, source: BatchSource) -> int:
    """The action of class 0: 0 where the head has a class for every action from 0 on, 1 where it lacks one (ratings).

    Raises ConfigError where the head has no class for some action of the data.
    """
    last, action = args.prediction_head_arch[-1], source.roles.action
    if action is None:
        raise ConfigError("ranking needs an action feature, and the data has none; name one or train retrieval")
    if last == args.num_tasks:
        return 0
    actions = source.cardinalities[action]
    if last < actions - 1:
        raise ConfigError(
            f"RankingArgs.prediction_head_arch ends in {last} classes, but {action!r} goes up to {actions - 1}: "
            f"end it in {actions - 1} (values from 1 on) or {actions} (from 0 on), or in num_tasks for bit tasks"
        )
    if last >= actions:
        return 0
    if source.least_action == 0:
        raise ConfigError(
            f"RankingArgs.prediction_head_arch ends in {last} classes, which serve the actions 1 to {last}, but "
            f"{action!r} also takes the value 0: end it in {actions}"
        )
    return 1


def build_loss_scale(config: RunConfig) -> LossScale | None:
    """That of a float16 run."""
    needed = config.network.dtype_str == "float16" or config.precision.loss_scale is not None
    return LossScale(config.precision) if needed else None


def build_pipeline(
    args: TrainerArgs, model: GRModel, optimizers: Optimizers, mesh: Mesh, loss_scale: LossScale | None = None
) -> TrainPipeline:
    """The pipeline that ``args`` asks for."""
    return PIPELINES[args.pipeline_type](model, optimizers, mesh, args.max_grad_norm, loss_scale)


def build_evaluator(config: RunConfig, source: BatchSource, model: GRModel, mesh: Mesh) -> Evaluator:
    """What turns evaluation batches into the task's metrics."""
    if isinstance(config.task_args, RankingArgs):
        offset = label_offset(config.task_args, source)
        return RankingEvaluator(model, config.task_args, offset, mesh, config.trainer.max_eval_iters)
    return RetrievalEvaluator(model, config.task_args, source, mesh, config.trainer.max_eval_iters)


def build_checkpoints(args: TrainerArgs, mesh: Mesh) -> CheckpointStore:
    """Where the run saves and what it starts from. Collective."""
    options = on_all_ranks(lambda: LoadOptions.of(args), mesh)
    background = Background(mesh, args.collective_timeout_s) if args.ckpt_async else None
    return CheckpointStore(args.ckpt_save_dir, args.ckpt_load_dir, mesh, args.ckpt_keep_last, background, options)


def total_iters(args: TrainerArgs, batches_per_epoch: int) -> int:
    """Iterations of the whole run: max_train_iters, or num_train_epochs passes, or one."""
    if args.max_train_iters is not None:
        return args.max_train_iters
    # 0.7 epochs of 10 batches are 7 iterations, though 0.7 * 10 is 7.000000000000001.
    return max(1, math.ceil(round((args.num_train_epochs or 1.0) * batches_per_epoch, 6)))
