"""Predict for all users of the data, or for a file of them, into a directory of Parquet files.

python scripts/predict.py --run_dir runs/quickstart --output predictions --top 20
torchrun --nproc_per_node 2 scripts/predict.py --run_dir runs/quickstart --users_file users.txt --output predictions
python scripts/predict.py --run_dir runs/rank --candidates candidates.parquet --output scores

A retrieval model gives the best items of each user, a ranking model its predictions for given candidates. Ids are those
of the raw data. Start a command again that was stopped, and it goes on with the next part.
"""

from __future__ import annotations

import argparse
import hashlib
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

import numpy as np
import pyarrow.parquet as pq

from hstu.base.errors import EXIT_DONE, ConfigError, DataError
from hstu.checkpoint.directory import MANIFEST
from hstu.config.tool import tool
from hstu.observe.logging import quiet_libraries
from hstu.parallel.collectives import gather_objects, on_all_ranks, require_equal
from hstu.serve.command import add_model_arguments, load_model, note, note_unknown, parse_time, require_model
from hstu.serve.id_files import Candidates, item_codes, read_candidates, read_codes, users_of_file
from hstu.serve.loaded import LoadedModel
from hstu.serve.predict import ItemChoice, Parts, Predictor, RankingPredictor, RetrievalPredictor

_TOP = 10


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    require_model(parser, options)
    for name in ("top", "part_users"):
        if (getattr(options, name) or 1) < 1:
            parser.error(f"--{name} must be at least 1")
    quiet_libraries()
    loaded = load_model(LoadedModel, options)
    candidates, users = _wanted(loaded, options)
    predictor = _predictor(loaded, candidates, options)
    _write(predictor, users, _parts(predictor, candidates, users, options), options.part_users)
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_model_arguments(parser)
    add("--output", type=Path, required=True, help="directory to create, or to go on in")
    add(
        "--users_file",
        help=".csv or .parquet file with a column user, or a file with one raw user id per line; default: all users",
    )
    add(
        "--candidates",
        help=".csv or .parquet file with columns user and item, and one for each feature of events that a ranking "
        "model reads before it predicts. Retrieval: only these items are recommended to these users",
    )
    add("--top", type=int, help=f"retrieval: items per user (default {_TOP}; with --candidates all)")
    add("--keep_seen", action="store_true", help="retrieval: also recommend items that the user has events of")
    add("--allow", help="retrieval: file of the only items to recommend; column item, or one raw id per line")
    add("--deny", help="retrieval: file of items not to recommend")
    add(
        "--at",
        help="when the users ask, if the model reads it: now, seconds since 1970, or a date; default: at the "
        "newest event of each",
    )
    add("--part_users", type=int, default=10_000, help="users per file (default 10000); memory grows with it")
    return parser


def _wanted(loaded: LoadedModel, options: argparse.Namespace) -> tuple[Candidates | None, np.ndarray]:
    """The candidates, if there are any, and the rows of the users to predict for. Notes what is left out."""
    source = loaded.with_data()
    users = users_of_file(loaded, options.users_file)
    if not options.candidates:
        return None, users
    roles, store = source.roles, source.store
    numbers = [name for name in roles.numbers if name in store.event_number_features]
    read = [name for name in (*roles.categories, *numbers) if name in (*store.event_features, *numbers)]
    before = [name for name in read if name not in roles.known_after] if loaded.config.task == "ranking" else []
    candidates, unknown = read_candidates(options.candidates, store, loaded.users, before)
    note_unknown(loaded, options.candidates, unknown)
    if not options.users_file:
        return candidates, candidates.users
    wanted = candidates.of_users(users).users
    if not len(wanted):
        raise DataError(f"{options.candidates} has no candidates for any user of {options.users_file}")
    if len(wanted) < len(users):
        note(loaded, f"{len(users) - len(wanted)} user(s) of {options.users_file} have no candidates")
    return candidates, wanted


def _predictor(loaded: LoadedModel, candidates: Candidates | None, options: argparse.Namespace) -> Predictor:
    at = None if options.at is None else parse_time(options.at)
    if loaded.config.task == "ranking":
        for name in ("top", "keep_seen", "allow", "deny"):
            if getattr(options, name):
                raise ConfigError(f"--{name} is for retrieval; a ranking model predicts all that --candidates names")
        if candidates is None:
            raise ConfigError("a ranking model predicts given candidates: name a file of them with --candidates")
        return RankingPredictor(loaded, candidates, at)
    lists: dict[str, np.ndarray | None] = {}
    for name in ("allow", "deny"):
        file = getattr(options, name)
        found = read_codes(file, "item", item_codes(loaded.store)) if file else None
        lists[name] = None if found is None else found.codes
        if found is not None:
            note_unknown(loaded, file, {"item": found.unknown})
    if loaded.reads_request_time and at is None:
        note(loaded, "each user asks at the time of the newest event; --at now asks now")
    choice = ItemChoice(lists["allow"], lists["deny"], options.keep_seen)
    top = options.top or (_TOP if candidates is None else None)
    return RetrievalPredictor(loaded, top, choice, candidates, at)


def _parts(
    predictor: Predictor, candidates: Candidates | None, users: np.ndarray, options: argparse.Namespace
) -> Parts:
    """The files to write, and what they depend on. Raises DataError where ranks have read other files."""
    loaded = predictor.loaded
    settings: dict[str, Any] = {
        "checkpoint": str(loaded.checkpoint),
        "checkpoint_digest": hashlib.sha256((loaded.checkpoint / MANIFEST).read_bytes()).hexdigest()[:16],
        "data": str(predictor.store.path),
        "data_digest": _digest(str(sorted(predictor.store.checksums.items())).encode()),
        "users": len(users),
        "users_digest": _digest(users.tobytes()),
        "part_users": options.part_users,
        "at": getattr(predictor, "at", None),
    }
    if candidates is not None:
        arrays = (candidates.users, candidates.counts, candidates.items, *candidates.values.values())
        settings["candidates_digest"] = _digest(b"".join(array.tobytes() for array in arrays))
    if isinstance(predictor, RetrievalPredictor):
        settings |= {"top": predictor.top, "keep_seen": predictor.choice.keep_seen}
        for name in ("allowed", "denied"):
            codes = getattr(predictor.choice, name)
            settings[f"{name}_digest"] = None if codes is None else _digest(np.unique(codes).tobytes())
    require_equal({name: str(value) for name, value in settings.items()}, loaded.mesh.world_group, DataError)
    return Parts(options.output, -(-len(users) // options.part_users), settings)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _write(predictor: Predictor, users: np.ndarray, parts: Parts, part_users: int) -> None:
    """Predict and write the parts that are missing. Collective."""
    mesh = predictor.loaded.mesh
    opened = on_all_ranks(lambda: parts.open() if mesh.is_main else [], mesh.world_group)
    missing = gather_objects(opened, mesh.world_group)[0]
    if len(missing) < parts.count:
        note(predictor.loaded, f"{parts.count - len(missing)} of {parts.count} parts are there; going on with the rest")
    began, done, answered = time.monotonic(), 0, 0
    for number in missing:
        own = users[number * part_users : (number + 1) * part_users]
        table = predictor.predict(own)
        on_all_ranks(partial(parts.write, number, table) if mesh.is_main else _nothing, mesh.world_group)
        done, answered = done + len(own), answered + len(table.column("user").unique())
        if mesh.is_main:
            speed = f"users_per_s={done / (time.monotonic() - began):,.0f}"
            counts = f"users={done:,} rows={table.num_rows:,}"
            print(f"predict part={number + 1}/{parts.count} {counts} {speed}", file=sys.stderr)
    if answered < done:
        note(predictor.loaded, f"{done - answered} user(s) have no predictions: no item was left for them")
    if mesh.is_main:
        rows = sum(pq.read_metadata(parts.path(number)).num_rows for number in range(parts.count))
        print(f"{parts.directory}: {rows:,} predictions for {len(users):,} users in {parts.count} file(s)")


def _nothing() -> None:
    """What the other ranks do while the main one writes."""


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
