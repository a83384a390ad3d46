"""Recommend items to users with the retrieval model of a run, a checkpoint or an export.

python scripts/recommend.py --run_dir runs/quickstart --users 1,2,3 --top 10
python scripts/recommend.py --ckpt exports/quickstart --users 1,2,3
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from hstu import api
from hstu.config.errors import EXIT_DONE, UserError
from hstu.observe.logging import quiet_libraries


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, help="directory of a retrieval run, for its operative.gin")
    parser.add_argument("--ckpt", help="checkpoint, directory of checkpoints, or export; default: those of the run")
    parser.add_argument("--users", required=True, help="raw user ids, separated by commas")
    parser.add_argument("--top", type=int, default=10, help="items per user (default 10)")
    options = parser.parse_args(arguments)
    if options.run_dir is None and options.ckpt is None:
        parser.error("give --run_dir, --ckpt or both")
    quiet_libraries()
    try:
        trained = api.load(options.run_dir or options.ckpt, options.ckpt)
        print(api.format_recommendations(trained.recommend(options.users.split(","), options.top)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
