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
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hstu.base.errors import EXIT_DONE, ConfigError, DataError
from hstu.base.files import replace_text, sha256, written_aside
from hstu.config.cli import check_new, parse_json, read_text, tool
from hstu.observe.logging import quiet_libraries
from hstu.parallel.collectives import gather_objects, on_all_ranks
from hstu.serve.command import (
    Candidates,
    add_model_arguments,
    add_request_arguments,
    load_model,
    note,
    read_candidates,
    read_codes,
    require_model,
    users_of_file,
)
from hstu.serve.loaded import LoadedModel
from hstu.serve.predict import RankingPredictor, RetrievalPredictor

Predictor = RetrievalPredictor | RankingPredictor
_TOP = 10
_SETTINGS = "_settings.json"
"""Readers of Parquet directories leave out names that begin with an underscore."""


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
    _write(_predictor(loaded, candidates, options), users, options)
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_model_arguments(parser)
    add_request_arguments(parser)
    add("--output", type=Path, required=True, help="directory to create, or to go on in")
    add(
        "--candidates",
        help="ranking: .csv or .parquet file with columns user and item, and one for each feature of events that the "
        "model reads before it predicts",
    )
    add("--top", type=int, help=f"retrieval: items per user (default {_TOP})")
    seen = "retrieval: also recommend items that the user has events of, or not; default: as in the run's evaluation"
    add("--keep_seen", action=argparse.BooleanOptionalAction, help=seen)
    add("--allow", help="retrieval: file of the only items to recommend; column item, or one raw id per line")
    add("--deny", help="retrieval: file of items not to recommend")
    add("--part_users", type=int, default=10_000, help="users per file (default 10000); memory grows with it")
    return parser


def _wanted(loaded: LoadedModel, options: argparse.Namespace) -> tuple[Candidates | None, np.ndarray]:
    """The candidates, if there are any, and the rows of the users to predict for. Notes what is left out."""
    source = loaded.with_data()
    if options.candidates and loaded.config.task == "retrieval":
        raise ConfigError("--candidates is for ranking; a retrieval model ranks all items, or those of --allow")
    users = users_of_file(loaded, options.users_file)
    if not options.candidates:
        return None, users
    roles, store = source.roles, source.store
    numbers = [name for name in roles.numbers if name in store.event_number_features]
    read = [name for name in (*roles.categories, *numbers) if name in (*store.event_features, *numbers)]
    before = [name for name in read if name not in roles.known_after]
    candidates = read_candidates(loaded, options.candidates, before)
    if not options.users_file:
        return candidates, candidates.users
    wanted = candidates.of_users(users).users
    if not len(wanted):
        raise DataError(f"{options.candidates} has no candidates for any user of {options.users_file}")
    if len(wanted) < len(users):
        note(loaded, f"{len(users) - len(wanted)} user(s) of {options.users_file} have no candidates")
    return candidates, wanted


def _predictor(loaded: LoadedModel, candidates: Candidates | None, options: argparse.Namespace) -> Predictor:
    at = options.at
    if loaded.config.task == "ranking":
        for name in ("top", "keep_seen", "allow", "deny"):
            if getattr(options, name) is not None:
                raise ConfigError(f"--{name} is for retrieval; a ranking model predicts all that --candidates names")
        if candidates is None:
            raise ConfigError("a ranking model predicts given candidates: name a file of them with --candidates")
        return RankingPredictor(loaded, candidates, at)
    allowed, denied = (
        read_codes(loaded, file, "item", loaded.items) if file else None for file in (options.allow, options.deny)
    )
    if loaded.reads_request_time and at is None:
        note(loaded, "each user asks at the time of the newest event; --at now asks now")
    top = options.top or _TOP
    return RetrievalPredictor(loaded, top, allowed=allowed, denied=denied, keep_seen=options.keep_seen, at=at)


def _write(predictor: Predictor, users: np.ndarray, options: argparse.Namespace) -> None:
    """Predict and write the parts that are missing. Collective."""
    mesh, count = predictor.loaded.mesh, -(-len(users) // options.part_users)
    files = [options.output / f"part-{number:05d}.parquet" for number in range(count)]
    given = [file for file in (options.candidates, options.allow, options.deny) if file and file != "-"]
    settings: dict[str, Any] = {
        **{name: str(value) for name, value in vars(options).items() if value is not None and name != "output"},
        "files": [sha256(Path(file)) for file in given],
        "model": predictor.loaded.version,
        "data": dict(sorted(predictor.loaded.store.checksums.items())),
        "users_digest": hashlib.sha256(users.tobytes()).hexdigest(),
    }
    opened = on_all_ranks(lambda: _open(options.output, settings, files) if mesh.is_main else [], mesh.world_group)
    missing = gather_objects(opened, mesh.world_group)[0]
    if len(missing) < count:
        note(predictor.loaded, f"{count - len(missing)} of {count} parts are there; going on with the rest")
    began, done, answered = time.monotonic(), 0, 0
    for number in missing:
        own = users[number * options.part_users : (number + 1) * options.part_users]
        table = predictor.predict(own)
        on_all_ranks(lambda: _put(files[number], table) if mesh.is_main else None, mesh.world_group)  # noqa: B023
        done, answered = done + len(own), answered + len(table.column("user").unique())
        if mesh.is_main:
            speed = f"users_per_s={done / (time.monotonic() - began):,.0f}"
            print(f"predict part={number + 1}/{count} users={done:,} rows={table.num_rows:,} {speed}", file=sys.stderr)
    if answered < done:
        note(predictor.loaded, f"{done - answered} user(s) have no predictions: no item was left for them")
    if mesh.is_main:
        rows = sum(pq.read_metadata(file).num_rows for file in files)
        print(f"{options.output}: {rows:,} predictions for {len(users):,} users in {count} file(s)")


def _open(output: Path, settings: Mapping[str, Any], files: Sequence[Path]) -> list[int]:
    """Create the directory, or go on in it. Returns the numbers of the parts that are missing."""
    file = output / _SETTINGS
    if not file.is_file():
        check_new(output)
        output.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(settings, indent=1) + "\n")
    elif parse_json(read_text(str(file)), str(file)) != settings:
        raise DataError(f"{output} has parts of another call ({file}); give the same arguments, or another name")
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    if not missing:
        raise DataError(f"{output} exists and is complete; give another name, or remove it")
    return missing


def _put(path: Path, table: pa.Table) -> None:
    """Write a part: aside, synced, and then renamed, so that a kill or a crash leaves no half of one."""
    with written_aside(path) as aside:
        pq.write_table(table, aside)


if __name__ == "__main__":
    sys.exit(main())
