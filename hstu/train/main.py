"""Runs a checked configuration and returns the exit code. Both entry scripts call it."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import hstu
from hstu.base.errors import EXIT_DONE, UserError, report, report_once
from hstu.base.files import digest_of
from hstu.base.processes import end_with_parent
from hstu.config.gin_scan import scan
from hstu.config.problems import literal
from hstu.config.run_config import RunConfig
from hstu.observe.environment import check_packages

if TYPE_CHECKING:
    from hstu.parallel.mesh import Mesh

log = logging.getLogger(__name__)

_DATASET_PATHS = re.compile(r"DatasetArgs\.(eval_)?dataset_path")
_MEMORY = (
    "memory ran out: {}. Lower TrainerArgs.train_batch_size or eval_batch_size, or what the numbers of the message "
    "come from; scripts/estimate.py shows what needs memory"
)


def run(config: RunConfig, beside_tables: Callable[[RunConfig, Mesh], int] | None = None) -> int:
    """Build the trainer, train, and return the exit code. User errors are printed without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training starts, Ctrl-C ends the program at once
    if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun: without it, nothing would end or restart this rank
        end_with_parent()
    try:
        check_packages()
    except UserError as error:
        return _report(error)

    from hstu.checkpoint.directory import CheckpointFailure
    from hstu.checkpoint.phase import NothingNew
    from hstu.observe.logging import quiet_libraries
    from hstu.observe.watchdog import Watchdog
    from hstu.parallel import mesh as meshes
    from hstu.pipeline.finite import NonFiniteStep
    from hstu.train.builder import build_trainer

    quiet_libraries()
    trainer, watchdog = None, None
    try:
        mesh = start_mesh(config)
        watchdog = Watchdog(mesh, config.trainer.collective_timeout_s)
        watchdog.start()
        trainer = build_trainer(config, mesh, beside_tables)
        trainer.train()
        for number in (signal.SIGINT, signal.SIGTERM):  # the run is complete; there is nothing left to stop
            signal.signal(number, signal.SIG_IGN)
    except NothingNew as told:
        log.info("%s; the last checkpoint stays as it is", told)
    except UserError as error:
        # Before training all ranks raise the same error. During training a single rank may raise it.
        in_training = trainer is not None
        if trainer is not None:
            trainer.checkpoints.close()
        if watchdog is not None:
            alike = not in_training or isinstance(error, (NonFiniteStep, CheckpointFailure))
            watchdog.leave(None if alike else error)
        meshes.finish(wait=False)
        return _report(error, of_this_rank=in_training)
    except Exception as error:
        if watchdog is not None:
            watchdog.fail(error)
        of_torch = isinstance(error, RuntimeError) and re.search("out of memory|can't allocate memory", str(error))
        if isinstance(error, MemoryError) or of_torch:
            return _report(UserError(_MEMORY.format(str(error).strip().splitlines()[0])), of_this_rank=True)
        raise
    if watchdog is not None:
        watchdog.leave()
    meshes.finish()
    if trainer is not None:
        trainer.run_directory.draw_curves()  # last, because no other rank waits any more
    return EXIT_DONE


def train_here(config: RunConfig, mesh: Mesh, beside_tables: Callable[[RunConfig, Mesh], int]) -> Path:
    """Train in the main thread of this process, alone in ``mesh``, to the end or, if interrupted, to a last checkpoint.
    Returns the directory of the run. Raises UserError."""
    check_packages()
    from hstu.observe.logging import quiet_libraries, tear_down_logging
    from hstu.train.builder import build_trainer

    quiet_libraries()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        trainer = build_trainer(config, mesh, beside_tables)
        with closing(trainer.checkpoints):
            trainer.train()
        trainer.run_directory.draw_curves()
        return trainer.run_directory.path
    finally:
        tear_down_logging()
        signal.signal(signal.SIGTERM, handler)


def start_mesh(config: RunConfig) -> Mesh:
    """Join the world and set up the process as ``config`` says."""
    from hstu.parallel import mesh as meshes

    return meshes.start(
        tensor_parallel_size=config.tensor_parallel.tensor_model_parallel_size,
        context_parallel_size=config.context_parallel.context_parallel_size,
        timeout_s=config.trainer.collective_timeout_s,
        seed=config.trainer.seed,
        deterministic=config.trainer.deterministic,
        allow_tf32=config.precision.allow_tf32,
        must_agree=run_facts(config),
    )


def run_facts(config: RunConfig) -> dict[str, str]:
    """Facts that must be equal on all ranks: the configuration, without paths of data, and the versions of the code."""
    from hstu.checkpoint.state import versions

    bindings = scan([], [config.operative_gin()]).bindings
    facts = {each.name: literal(each.value) for each in bindings if not _DATASET_PATHS.fullmatch(each.name)}
    packages = {f"version of {name}": version for name, version in versions().items() if name != "python"}
    return {"task": config.task, **facts, **packages, "SHA-256 of the code in hstu": source_digest()}


def source_digest(root: Path = Path(hstu.__file__).parent) -> str:
    """SHA-256 of all source files of the package."""
    return digest_of(path for path in root.rglob("*") if path.suffix in (".py", ".cpp", ".h"))


def _report(error: UserError, of_this_rank: bool = False) -> int:
    """Print the error, once per host unless only this rank may have it. Returns its exit code."""
    (report if of_this_rank else report_once)(f"error: {error}")
    return error.exit_code
