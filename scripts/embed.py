"""Write the vectors of users and items of a retrieval model.

python scripts/embed.py --run_dir runs/quickstart --output vectors
python scripts/embed.py --run_dir runs/quickstart --output vectors --format npy
torchrun --nproc_per_node 2 scripts/embed.py --checkpoint exports/quickstart --only users --output users

Vectors have length 1: the product of those of a user and an item is the score by which items are recommended.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

import numpy as np

from hstu.base.errors import EXIT_DONE, DataError
from hstu.config.tool import tool
from hstu.data.store.sequence_store import USER_FEATURE
from hstu.observe.logging import quiet_libraries
from hstu.parallel.collectives import on_all_ranks
from hstu.serve.command import add_model_arguments, load_model, note, parse_time, require_model
from hstu.serve.id_files import users_of_file
from hstu.serve.loaded import LoadedModel
from hstu.serve.vectors import VectorSink, item_vectors, open_npy, open_parquet, user_vectors


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    require_model(parser, options)
    quiet_libraries()
    loaded = load_model(LoadedModel, options)
    loaded.require_retrieval()
    at = None if options.at is None else parse_time(options.at)
    loaded.check_request_time(at)
    users = users_of_file(loaded, options.users_file)
    on_all_ranks(lambda: _create(options.output) if loaded.mesh.is_main else None, loaded.mesh.world_group)
    if options.only != "users":
        raw = loaded.store.raw_ids(loaded.source.roles.item)
        _write("items", raw, (part.float().cpu().numpy() for part in item_vectors(loaded)), loaded, options)
    if options.only != "items":
        raw = loaded.store.raw_ids(USER_FEATURE)[users]
        _write("users", raw, user_vectors(loaded, users, at), loaded, options)
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_model_arguments(parser)
    add("--output", type=Path, required=True, help="directory to create")
    add("--format", choices=("parquet", "npy"), default="parquet", help="form of the files (default parquet)")
    add("--only", choices=("users", "items"), help="default: both")
    add(
        "--users_file",
        help=".csv or .parquet file with a column user, or a file with one raw user id per line; default: all users",
    )
    add("--at", help="when the users ask, if the model reads it: now, seconds since 1970, or a date")
    return parser


def _create(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise DataError(f"{directory} exists; give another name, or remove it")
    directory.mkdir(parents=True, exist_ok=True)


def _write(
    name: str, ids: np.ndarray, parts: Iterator[np.ndarray], loaded: LoadedModel, options: argparse.Namespace
) -> None:
    """Write the vectors of ``ids``, in the same order, on one rank. Collective."""
    width, path = loaded.config.network.item_width, options.output / f"{name}.{options.format}"
    first = without = 0
    with _sink(path, name, ids, width) if loaded.mesh.is_main else nullcontext() as sink:
        for vectors in parts:
            if sink is not None:
                sink.append(ids[first : first + len(vectors)], vectors)
            first += len(vectors)
            without += int((~vectors.any(axis=1)).sum())
    if loaded.mesh.is_main:
        print(f"{path}: {first:,} vectors of {width} numbers")
    if without:
        note(loaded, f"{without} of the {name} are not in the model: their vectors are zeros")


def _sink(path: Path, name: str, ids: np.ndarray, width: int) -> AbstractContextManager[VectorSink]:
    if path.suffix == ".npy":
        return open_npy(path, ids, width)
    return open_parquet(path, name.removesuffix("s"), ids, width)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
