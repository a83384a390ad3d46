"""Runs a checked configuration and returns the exit code. Both entry scripts call this."""

from __future__ import annotations

import os
import signal
import sys

from hstu.config.errors import EXIT_DONE, UserError, wait_for_the_reporting_rank
from hstu.config.run_config import RunConfig
from hstu.data.processes import end_with_parent
from hstu.observe.environment import check_packages


def run(config: RunConfig) -> int:
    """Build the trainer, train, and return the exit code. A mistake of the user is printed without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training starts, Ctrl-C ends the program at once
    if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun, without which nobody would end or restart this rank
        end_with_parent()
    try:
        check_packages()
    except UserError as error:
        return _report(error)

    from hstu.checkpoint.directory import CheckpointFailure
    from hstu.observe.logging import quiet_libraries
    from hstu.observe.watchdog import Watchdog
    from hstu.parallel import mesh as meshes
    from hstu.pipeline.finite import NonFiniteStep
    from hstu.train.agreement import run_facts
    from hstu.train.builder import build_trainer

    quiet_libraries()
    trainer, watchdog = None, None
    try:
        mesh = meshes.start(
            tensor_parallel_size=config.tensor_parallel.tensor_model_parallel_size,
            timeout_s=config.trainer.collective_timeout_s,
            seed=config.trainer.seed,
            deterministic=config.trainer.deterministic,
            allow_tf32=config.precision.allow_tf32,
            must_agree=run_facts(config),
        )
        watchdog = Watchdog(mesh, config.trainer.collective_timeout_s)
        watchdog.start()
        trainer = build_trainer(config, mesh)
        trainer.train()
        for number in (signal.SIGINT, signal.SIGTERM):  # the run has ended well; nothing is left to stop
            signal.signal(number, signal.SIG_IGN)
    except UserError as error:
        # Before training all ranks raise the same error. During training it may be the error of one rank alone.
        in_training = trainer is not None
        if trainer is not None:
            trainer.checkpoints.close()
        if watchdog is not None:
            alike = not in_training or isinstance(error, (NonFiniteStep, CheckpointFailure))
            watchdog.leave(None if alike else error)
        meshes.finish(wait=False)
        return _report(error, every_rank=in_training)
    except Exception as error:
        if watchdog is not None:
            watchdog.fail(error)
        raise
    watchdog.leave()
    meshes.finish()
    return EXIT_DONE


def _report(error: UserError, every_rank: bool = False) -> int:
    """Print the error, once per host unless ``every_rank``. Returns its exit code."""
    if every_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        rank = os.environ.get("RANK", "0")
        prefix = "" if rank == "0" else f"[rank {rank}] "
        print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
    else:
        wait_for_the_reporting_rank()
    return error.exit_code
