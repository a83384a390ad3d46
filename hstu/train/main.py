"""From a checked configuration to an exit code: what both entry scripts call."""

from __future__ import annotations

import sys

from hstu.config.errors import EXIT_DONE, ConfigError, UserError
from hstu.config.run_config import RunConfig
from hstu.observe.environment import check_packages
from hstu.observe.logging import quiet_libraries


def run(config: RunConfig) -> int:
    """Build the trainer, train, and return the process's exit code; a user's mistake is told without a traceback."""
    from hstu.parallel import mesh as meshes

    mesh = None
    try:
        check_packages()
        quiet_libraries()
        mesh = meshes.start(
            tensor_parallel_size=config.tensor_parallel.tensor_model_parallel_size,
            seed=config.trainer.seed,
            deterministic=config.trainer.deterministic,
        )
        from hstu.train.builder import build_trainer

        build_trainer(config, mesh).train()
    except UserError as error:
        # A bad configuration looks the same to every rank; damaged data may be one rank's alone.
        if mesh is None or mesh.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif not isinstance(error, ConfigError):
            print(f"[rank {mesh.rank}] error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    finally:
        if mesh is not None:
            meshes.finish()
    return EXIT_DONE
