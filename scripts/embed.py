"""Write the vectors of users and items of a retrieval model, as Parquet files.

python scripts/embed.py --run_dir runs/quickstart --output vectors
torchrun --nproc_per_node 2 scripts/embed.py --ckpt exports/quickstart --only users --output users

Vectors have length 1: the product of those of a user and an item is the score by which items are recommended.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hstu.base.errors import EXIT_DONE
from hstu.base.files import written_aside
from hstu.config.cli import check_new, tool
from hstu.data.store.sequence_store import USER_FEATURE
from hstu.observe.logging import quiet_libraries
from hstu.parallel.collectives import on_all_ranks
from hstu.serve.command import (
    add_model_arguments,
    add_request_arguments,
    load_model,
    note,
    require_model,
    users_of_file,
)
from hstu.serve.loaded import LoadedModel
from hstu.serve.predict import item_vectors, user_vectors


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_request_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="directory to create")
    parser.add_argument("--only", choices=("users", "items"), help="default: both")
    options = parser.parse_args(arguments)
    require_model(parser, options)
    quiet_libraries()
    loaded = load_model(LoadedModel, options)
    loaded.require_retrieval()
    loaded.check_request_time(options.at)
    users = users_of_file(loaded, options.users_file)
    on_all_ranks(lambda: check_new(options.output), loaded.mesh.world_group)
    if options.only != "users":
        _write("item", loaded.store.raw_ids(loaded.source.roles.item), item_vectors(loaded), loaded, options.output)
    if options.only != "items":
        ids = loaded.store.raw_ids(USER_FEATURE)[users]
        _write("user", ids, user_vectors(loaded, users, options.at), loaded, options.output)
    return EXIT_DONE


def _write(name: str, ids: np.ndarray, parts: Iterator[np.ndarray], loaded: LoadedModel, output: Path) -> None:
    """Write the vectors of ``ids``, in the same order, on one rank: columns ``name`` and vector. Collective."""
    if not loaded.mesh.is_main:
        for _ in parts:
            pass
        return
    kind = pa.string() if ids.dtype == object else pa.int64()
    width, path, first, without = loaded.config.network.item_width, output / f"{name}s.parquet", 0, 0
    schema = pa.schema([(name, kind), ("vector", pa.list_(pa.float32(), width))])
    output.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside, pq.ParquetWriter(aside, schema) as writer:
        for vectors in parts:
            own = pa.array(ids[first : first + len(vectors)], kind)
            lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width)
            writer.write_table(pa.table([own, lists], schema=schema))
            first += len(vectors)
            without += int((~vectors.any(axis=1)).sum())
    print(f"{path}: {first:,} vectors of {width} numbers")
    if without:
        note(loaded, f"{without} of the {name}s are not in the model: their vectors are zeros")


if __name__ == "__main__":
    sys.exit(main())
