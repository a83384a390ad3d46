"""Builds a Trainer from a checked configuration. Functions are in the order of construction."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from hstu.base import remote
from hstu.base.errors import ConfigError, DataError
from hstu.base.files import unused
from hstu.checkpoint.directory import complete_checkpoints
from hstu.checkpoint.find import AUTO, Run, belongs, candidates
from hstu.checkpoint.matching import LoadOptions
from hstu.checkpoint.mirror import local_checkpoint
from hstu.checkpoint.raw_ids import RawIds
from hstu.checkpoint.state import TrainState
from hstu.checkpoint.store import CheckpointStore
from hstu.config.args import DatasetArgs, RetrievalArgs, TrainerArgs
from hstu.config.problems import in_reading_order
from hstu.config.rules.task import label_leak
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import NEGATIVES, of_negatives
from hstu.data.datasets import DATASETS
from hstu.data.features.roles import FeatureRoles
from hstu.data.features.values import PLAIN, LabelCodes, label_columns
from hstu.model.embedding import table_specs
from hstu.model.gr_model import GRModel
from hstu.model.inputs import SequenceFeatures
from hstu.model.ranking import MultiTaskDense, RankingDense, compile_parts, why_not
from hstu.model.retrieval import GatherPool, LogCounts, RetrievalDense
from hstu.model.stack import DTYPES, SequenceEncoder, kernel_shapes
from hstu.observe.logging import set_up_logging
from hstu.observe.run_directory import RunDirectory, default_path, run_name
from hstu.observe.throughput import ThroughputMeter, peak_tflops
from hstu.ops.kernels import Kernels
from hstu.ops.pytorch.operators import cpu_multiplies_bfloat16
from hstu.ops.select import select_kernels
from hstu.optim.optimizers import Optimizers, build_optimizers
from hstu.parallel.collectives import gather_objects, gather_rows, on_all_ranks, on_rank_0, require_equal
from hstu.parallel.data_parallel import replicate_dense, shard_dense
from hstu.parallel.layer_comm import split_encoder
from hstu.parallel.mesh import Mesh, seed_dropout
from hstu.parallel.tables import check_memory, shard
from hstu.pipeline.finite import LossScale
from hstu.pipeline.pipelines import NativePipeline, PrefetchPipeline, SequentialPipeline, TrainPipeline
from hstu.pipeline.step import TrainStep
from hstu.train.batch_source import BatchSource, label_codes
from hstu.train.evaluate import Evaluator, MultiTaskEvaluator, RankingEvaluator, RetrievalEvaluator
from hstu.train.inference import StoredSource, describe_features, zero_untrained_items
from hstu.train.sources import StoreSource, open_source
from hstu.train.trainer import Trainer

log = logging.getLogger(__name__)

CHECKPOINTS = Path("checkpoints")
"""Parent directory of the runs' checkpoint directories, unless TrainerArgs.ckpt_save_dir is set."""

PIPELINES: dict[str, type[TrainPipeline]] = {
    "none": SequentialPipeline,
    "native": NativePipeline,
    "prefetch": PrefetchPipeline,
}

TaskModel = RankingDense | MultiTaskDense | RetrievalDense
"""The dense part of a model, without replicated tables."""
BesideTables = Callable[[RunConfig, Mesh], int]
"""(config, mesh) → bytes of memory that a step needs on a rank in addition to the sharded tables."""


def build_trainer(config: RunConfig, mesh: Mesh, beside_tables: BesideTables | None = None) -> Trainer:
    """Build a trainer that is ready to ``train()``. Collective. ``beside_tables``: called only on GPUs; None: zero.

    Raises ConfigError or DataError, on all ranks alike, if the configuration does not fit the data or the machine, and
    NothingNew if it begins a phase without labels.
    """
    path, saved_in = choose_directories(config, mesh)
    args = config.trainer
    options = on_all_ranks(lambda: LoadOptions.from_args(args), mesh.world_group)
    timeout_s = args.collective_timeout_s if args.ckpt_async else None
    url = remote.url_of(args.ckpt_save_dir)
    load_dir = on_all_ranks(lambda: local_load_dir(config, saved_in), mesh.world_group)
    checkpoints = CheckpointStore(saved_in, load_dir, mesh, args.ckpt_keep_last, timeout_s, options, url)
    if args.saves_checkpoints:
        checkpoints.claim()
    with ExitStack() as undo:
        undo.callback(checkpoints.close)
        run_directory = open_run_directory(config, path, checkpoints, mesh)
        undo.callback(run_directory.discard)
        undo.callback(checkpoints.close)  # before the directory of the run is discarded, which it may leave empty
        earlier = checkpoints.find() if args.ckpt_load_optimizer else None
        mesh.heartbeat.mark("opening the data")
        source = on_all_ranks(lambda: open_source(config, mesh, earlier=earlier), mesh.world_group)
        require_equal(source.description, mesh.world_group, DataError)
        check_masks(config, source.roles)
        mesh.heartbeat.mark("building the model")
        model, optimizers = build_model(config, source, mesh, beside_tables)
        state = build_state(config, source, model, optimizers, run_directory.identity)
        if source.roles.tower:
            log.info("item tower: the vector of an item is made of its id and %s", ", ".join(source.roles.tower))
            if source.roles.numbers:
                log.warning("item tower: numbers and vectors are left out of it: %s", ", ".join(source.roles.numbers))
            zero_untrained_items(state, source)
        peak, origin = peak_tflops(mesh.device, DTYPES[config.network.dtype_str])
        log.info("peak for MFU: %.3g TFLOPS per rank (%s)", peak, origin)
        trainer = Trainer(
            config=config,
            mesh=mesh,
            source=source,
            pipeline=build_pipeline(config.trainer, model, optimizers, mesh, build_loss_scale(config)),
            evaluator=build_evaluator(config, source, model, mesh),
            checkpoints=checkpoints,
            state=state,
            run_directory=run_directory,
            meter=ThroughputMeter(peak),
        )
        undo.pop_all()
    return trainer


def choose_directories(config: RunConfig, mesh: Mesh) -> tuple[Path, Path]:
    """Directories of the run and of its checkpoints, equal on all ranks. Creates nothing. Collective."""

    def choose() -> tuple[Path, Path]:
        path = Path(config.trainer.output_dir or default_path(config.source_files))
        return path, directory_of_checkpoints(config, path)

    return on_rank_0(choose, mesh.world_group)


def directory_of_checkpoints(config: RunConfig, path: Path) -> Path:
    """Checkpoint directory of the run in ``path``: TrainerArgs.ckpt_save_dir, or its own directory.

    A continued run keeps its directory. With ckpt_load_dir = "auto" and no output_dir, the directory is named after the
    gin file, so that the next start finds it.
    """
    args = config.trainer
    if url := remote.url_of(args.ckpt_save_dir):
        return remote.Cache.of(config.dataset).place(url, work=True)
    if args.ckpt_save_dir is not None:
        return Path(args.ckpt_save_dir)
    if args.ckpt_load_dir == AUTO and args.output_dir is None:
        return CHECKPOINTS / run_name(config.source_files)
    earlier = Run.read(path)
    if earlier is not None and earlier.checkpoints is not None and args.ckpt_load_optimizer:
        found = candidates(args.ckpt_load_dir, earlier.checkpoints)
        if any(belongs(checkpoint, path) for checkpoint in found):  # this start continues that run
            return Path(earlier.checkpoints)
    saved_in = CHECKPOINTS / path.name
    if args.ckpt_load_dir == AUTO:
        return saved_in
    return unused(CHECKPOINTS, f"{path.name}-{{}}", first=2) if complete_checkpoints(saved_in) else saved_in


def local_load_dir(config: RunConfig, saved_in: Path) -> str:
    """TrainerArgs.ckpt_load_dir, or the local copy of what is there. ``saved_in``: that of ckpt_save_dir."""
    args = config.trainer
    url = remote.url_of(args.ckpt_load_dir)
    if url is not None and url == remote.url_of(args.ckpt_save_dir):
        return str(saved_in)
    return str(local_checkpoint(url, cache=remote.Cache.of(config.dataset))) if url else args.ckpt_load_dir


def describe_saving(args: TrainerArgs, directory: Path) -> str:
    """Describe what the run saves, and where."""
    if not args.saves_checkpoints:
        return f"none, because TrainerArgs.ckpt_save_interval = {args.ckpt_save_interval}"
    every = args.ckpt_save_interval
    saved = [] if every is None else [f"every {every}{'' if isinstance(every, str) else ' iterations'}"]
    saved += ["the last state"] if args.save_at_end else []
    saved += [f"the best {args.best_metric}"] if args.best_metric is not None else []
    return f"{', '.join(saved) or 'only when SIGTERM ends the run'}, in {directory}"


def open_run_directory(config: RunConfig, path: Path, checkpoints: CheckpointStore, mesh: Mesh) -> RunDirectory:
    """Open the run's directory and start the log in it."""

    def open_on_main_rank() -> RunDirectory:
        continues = mesh.is_main and checkpoints.continues(path)
        run = Run.of(path, checkpoints.save_dir if config.trainer.saves_checkpoints else None, continues=continues)
        return RunDirectory(
            path,
            config.operative_gin(),
            mesh.is_main,
            identity=run.text(),
            continues=continues,
            task_names=task_names(config.dataset.dataset_name) if isinstance(config.dataset, DatasetArgs) else (),
            tensorboard=config.trainer.tensorboard,
            wandb_project=config.trainer.wandb_project,
            config=dataclasses.asdict(config),
        )

    run_directory = on_all_ranks(open_on_main_rank, mesh.world_group)
    set_up_logging(mesh.rank, run_directory.log_file)
    log.info("%s run in %s, %d rank(s) on %s", config.task, path, mesh.world_size, mesh.device)
    if run_directory.earlier is not None:
        log.info("the files of the earlier run in %s are now in %s", path, run_directory.earlier)
    log.info("checkpoints: %s", describe_saving(config.trainer, checkpoints.save_dir))
    return run_directory


def check_masks(config: RunConfig, roles: FeatureRoles) -> None:
    """Raise ConfigError if the attention masks reveal labels to the model."""
    ConfigError.raise_if(in_reading_order(label_leak(config, has_context=bool(roles.contextual))))


def task_names(dataset_name: str) -> tuple[str, ...]:
    """Names of the signals that ranking tasks predict; empty unless the dataset declares them."""
    bits = DATASETS[dataset_name].action_bits if dataset_name in DATASETS else {}
    return tuple(sorted(bits, key=lambda name: bits[name]))


def build_model(
    config: RunConfig, source: BatchSource, mesh: Mesh, beside_tables: BesideTables | None = None
) -> tuple[GRModel, Optimizers]:
    """Build the model and its optimizers, with sharded tables and the dense part replicated or sharded. Collective."""
    if config.network.dtype_str == "float16" and mesh.device.type == "cpu":
        log.warning("float16 on a CPU: its products take hundreds of times as long as products of other types")
    if config.network.dtype_str == "bfloat16" and mesh.device.type == "cpu" and not cpu_multiplies_bfloat16():
        log.warning(
            "this CPU has no bfloat16 products: the layers compute them in float32 and round to bfloat16, which saves "
            'memory, but no time; NetworkArgs.dtype_str = "float32" is faster'
        )
    roles, ranks = source.roles, mesh.world_size
    specs = table_specs(source.tables, config.network, roles, config.looks_up_negatives, ranks)
    on_all_ranks(lambda: check_memory(specs, config, mesh.local_world_size, ranks), mesh.world_group)
    negatives = (NEGATIVES, *map(of_negatives, roles.tower)) if config.looks_up_negatives else ()
    task = build_task(config, source, mesh)
    if config.network.compile:
        compile_on_all_ranks(task, mesh)
    parameters = sum(parameter.numel() for parameter in task.parameters())
    split_encoder(task.encoder, mesh)
    model = GRModel(specs, task, (*roles.names, *negatives), roles, config.trainer.seed)
    model.dense.to(mesh.device)  # sharding creates the sharded tables on their devices
    update_rows = task.encoder.inputs.kernels.update_rows
    needed = int if beside_tables is None else partial(beside_tables, config, mesh)
    model, table_optimizer = shard(model, config, mesh, update_rows, needed)
    sent_as = DTYPES["float32" if config.precision.fp32_master_grads else config.network.dtype_str]
    if config.data_parallel.sharding == "weights":
        model = shard_dense(model, mesh, sent_as, DTYPES[config.network.dtype_str])
    else:
        model = replicate_dense(model, mesh, sent_as)
    optimizers = build_optimizers(model, config.optimizer, table_optimizer, mesh)
    seed_dropout(mesh)
    rows = sum(spec.rows for spec in specs)
    log.info("model: %s dense parameters, %s rows in %d tables", f"{parameters:,}", f"{rows:,}", len(specs))
    return model, optimizers


def build_task(config: RunConfig, source: BatchSource, mesh: Mesh) -> TaskModel:
    """Build the sequence encoder and the head or loss of the task, with kernels for this device."""
    network = config.network
    shapes = kernel_shapes(network, mesh.tp_size, mesh.cp_size)
    kernels = select_kernels(network.kernel_backend, network.strict_kernel_backend, mesh.device, shapes)
    for operator, served in kernels.served_by.items():
        log.log(logging.WARNING if served.is_refused else logging.INFO, "kernel %s: %s", operator, served)
    task = task_module(
        config,
        source.roles,
        kernels,
        label_codes(config, source),
        lambda rows, ids, largest: gather_rows(rows, ids, largest, mesh.dp_group),
        source.log_counts(),
    )
    if statistics := source.number_statistics:
        task.encoder.inputs.load_statistics(statistics)
    return task


def task_module(
    config: RunConfig,
    roles: FeatureRoles,
    kernels: Kernels,
    codes: Sequence[LabelCodes] = (),
    gather_pool: GatherPool = lambda rows, ids, _: (rows, ids),
    log_counts: LogCounts | None = None,
) -> TaskModel:
    """Build the task's module, independent of data, ranks and device. ``codes``: empty if classes begin at 0."""
    features = SequenceFeatures.of(config, roles, codes[0].first if codes else 0)
    encoder = SequenceEncoder(config.network, features, kernels)
    args = config.task_args
    if isinstance(args, RetrievalArgs):
        return RetrievalDense(encoder, args, gather_pool, log_counts)
    codes = codes or [PLAIN] * len(args.tasks or [args])
    if args.tasks is not None:
        return MultiTaskDense(encoder, args, label_columns(args.tasks), codes)
    return RankingDense(encoder, args, label_offset=codes[0].first)


def compile_on_all_ranks(task: TaskModel, mesh: Mesh) -> None:
    """Compile parts of ``task`` if every rank can, because ranks with the same weights must compute the same bits."""
    reasons = [reason for reason in gather_objects(why_not(mesh.device), mesh.world_group) if reason is not None]
    if reasons:
        log.warning("NetworkArgs.compile: nothing is compiled, %s", reasons[0])
    else:
        log.info("compiled at first use: %s", ", ".join(compile_parts(task)) or "nothing, all is in kernels")


def build_state(
    config: RunConfig, source: BatchSource, model: GRModel, optimizers: Optimizers, run: str = ""
) -> TrainState:
    """The state that checkpoints contain."""
    ids, features = raw_ids(source), describe_features(source)
    return TrainState(
        model,
        optimizers,
        config.operative_gin(),
        run,
        phase=source.phase,
        raw_ids=ids,
        features=features,
        trained_on=source.trained_on,
    )


def raw_ids(source: BatchSource) -> RawIds:
    """Raw ids of table rows; none for random data."""
    if isinstance(source, StoredSource):
        return source.raw_ids
    return RawIds.from_store(source.store, source.roles.names) if isinstance(source, StoreSource) else RawIds()


def build_loss_scale(config: RunConfig) -> LossScale | None:
    """Loss scale for float16 or a configured loss_scale; otherwise None."""
    needed = config.network.dtype_str == "float16" or config.precision.loss_scale is not None
    return LossScale(config.precision) if needed else None


def build_pipeline(
    args: TrainerArgs, model: GRModel, optimizers: Optimizers, mesh: Mesh, loss_scale: LossScale | None = None
) -> TrainPipeline:
    """Build the pipeline of TrainerArgs.pipeline_type."""
    step = TrainStep(model, optimizers, mesh, args.max_grad_norm, loss_scale)
    return PIPELINES[args.pipeline_type](step, args.gradient_accumulation_steps)


def build_evaluator(config: RunConfig, source: BatchSource, model: GRModel, mesh: Mesh) -> Evaluator:
    """The evaluator of the task."""
    if isinstance(config.task_args, RetrievalArgs):
        return RetrievalEvaluator(config, model, mesh, source)
    return (RankingEvaluator if config.task_args.tasks is None else MultiTaskEvaluator)(config, model, mesh)
