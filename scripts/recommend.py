"""Recommend items to users with a trained retrieval model.

python scripts/recommend.py --run_dir runs/quickstart --users 1,2,3 --top 10
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from hstu.config.errors import EXIT_DONE, DataError, UserError
from hstu.config.gin_io import load
from hstu.observe.logging import quiet_libraries
from hstu.parallel import mesh as meshes
from hstu.train.recommend import recommend_for, table


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, required=True, help="directory of a retrieval run (has operative.gin)")
    parser.add_argument("--ckpt", help="checkpoint or directory of them; default: where the run saved its own")
    parser.add_argument("--users", required=True, help="raw user ids, separated by commas")
    parser.add_argument("--top", type=int, default=10, help="items a user (10)")
    options = parser.parse_args()
    quiet_libraries()
    try:
        operative = options.run_dir / "operative.gin"
        if not operative.is_file():
            raise DataError(f"{operative} does not exist: give the directory of a run")
        config = load([str(operative)], [], "retrieval")
        mesh = meshes.start(seed=config.trainer.seed)
        ckpt = options.ckpt or config.trainer.ckpt_save_dir
        print(table(recommend_for(config, ckpt, options.users.split(","), options.top, mesh)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        meshes.finish()
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
