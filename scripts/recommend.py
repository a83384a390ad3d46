"""Recommend items to users with a trained retrieval model: of a run, a checkpoint or an export.

python scripts/recommend.py --run_dir runs/quickstart --users 1,2,3 --top 10
python scripts/recommend.py --ckpt exports/quickstart --users 1,2,3
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from hstu.checkpoint.describe import locate
from hstu.config.errors import EXIT_DONE, DataError, UserError
from hstu.config.gin_io import load
from hstu.observe.logging import quiet_libraries
from hstu.parallel import mesh as meshes
from hstu.train.recommend import recommend_for, table


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, help="directory of a retrieval run, for its operative.gin")
    parser.add_argument("--ckpt", help="checkpoint, directory of them, or export; default: where the run saved its own")
    parser.add_argument("--users", required=True, help="raw user ids, separated by commas")
    parser.add_argument("--top", type=int, default=10, help="items a user (10)")
    options = parser.parse_args(arguments)
    if options.run_dir is None and options.ckpt is None:
        parser.error("give --run_dir, --ckpt or both")
    quiet_libraries()
    try:
        config = load([str(operative_gin(options.run_dir, options.ckpt))], [], "retrieval")
        mesh = meshes.start(seed=config.trainer.seed)
        ckpt = options.ckpt or config.trainer.ckpt_save_dir
        print(table(recommend_for(config, ckpt, options.users.split(","), options.top, mesh)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        meshes.finish()
    return EXIT_DONE


def operative_gin(run_dir: Path | None, ckpt: str | None) -> Path:
    """The configuration of the run, or else the one that lies in each checkpoint and export."""
    directory = run_dir or locate(ckpt or "")
    if not (directory / "operative.gin").is_file():
        raise DataError(f"{directory / 'operative.gin'} does not exist: give the directory of a run")
    gin = directory / "operative.gin"
    if "\nRankingArgs." in f"\n{gin.read_text(encoding='utf-8')}":
        raise DataError(f"{gin} is of a ranking run: recommendations need a retrieval run")
    return gin


if __name__ == "__main__":
    sys.exit(main())
