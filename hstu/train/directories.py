"""Chooses the directories of a run and of its checkpoints."""

from __future__ import annotations

from pathlib import Path

from hstu.checkpoint.directory import complete_checkpoints
from hstu.checkpoint.find import AUTO, Run, belongs, candidates
from hstu.config.args import TrainerArgs
from hstu.config.run_config import RunConfig
from hstu.observe.run_directory import default_path, run_name, unused
from hstu.parallel.collectives import on_rank_0
from hstu.parallel.mesh import Mesh

CHECKPOINTS = Path("checkpoints")
"""Parent directory of the runs' checkpoint directories, unless TrainerArgs.ckpt_save_dir is set."""


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
    if args.ckpt_save_dir is not None:
        return Path(args.ckpt_save_dir)
    if args.ckpt_load_dir == AUTO and args.output_dir is None:
        return CHECKPOINTS / run_name(config.source_files)
    if earlier := _saved_in_earlier(args, path):
        return earlier
    saved_in = CHECKPOINTS / path.name
    if args.ckpt_load_dir == AUTO:
        return saved_in
    return unused(CHECKPOINTS, f"{path.name}-{{}}", first=2) if complete_checkpoints(saved_in) else saved_in


def _saved_in_earlier(args: TrainerArgs, path: Path) -> Path | None:
    """The checkpoint directory of the earlier run in ``path``, if this start continues that run."""
    earlier = Run.read(path)
    if earlier is None or earlier.checkpoints is None or not args.ckpt_load_optimizer:
        return None
    found = candidates(args.ckpt_load_dir, earlier.checkpoints)
    return Path(earlier.checkpoints) if any(belongs(checkpoint, path) for checkpoint in found) else None


def describe_saving(args: TrainerArgs, directory: Path) -> str:
    """Describe what the run saves, and where."""
    if not args.saves_checkpoints:
        return f"none, because TrainerArgs.ckpt_save_interval = {args.ckpt_save_interval}"
    saved = [f"every {args.ckpt_save_interval} iterations"] if args.ckpt_save_interval is not None else []
    saved += ["the last state"] if args.save_at_end else []
    saved += [f"the best {args.best_metric}"] if args.best_metric is not None else []
    return f"{', '.join(saved) or 'only when SIGTERM ends the run'}, in {directory}"
