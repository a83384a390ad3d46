"""Recommend items with the retrieval model of a run, a checkpoint or an export.

python scripts/recommend.py --run_dir runs/quickstart --users 1,2,3 --top 10
python scripts/recommend.py --run_dir runs/quickstart --users_file users.txt --format json --output best.json
python scripts/recommend.py --ckpt exports/quickstart --items 50,181 --actions 5,4

Users have their histories in the data of the run. A history given by hand (--items, --histories) needs no data.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from hstu import api
from hstu.base.errors import EXIT_DONE, DataError
from hstu.base.files import replace_text
from hstu.config.cli import parse_json, parse_time, read_ids, read_text, tool
from hstu.data.store.sequence_store import USER_FEATURE
from hstu.observe.logging import quiet_libraries
from hstu.serve.command import add_model_arguments, load_model, note, require_model, shown

_KINDS = {"user": object, "items": list, "actions": list, "timestamps": list, "context": dict, "features": dict}
"""Fields of a history in JSON."""


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    require_model(parser, options)
    if (options.actions or options.times) and not options.items:
        parser.error("--actions and --times belong to --items")
    if options.top < 1:
        parser.error("--top must be at least 1")
    quiet_libraries()
    _recommend(options)
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_model_arguments(parser)
    whom = parser.add_mutually_exclusive_group(required=True)
    whom.add_argument("--users", help="raw user ids, separated by commas")
    whom.add_argument("--users_file", help="file with one raw user id per line; - for stdin")
    whom.add_argument("--items", help="a history given by hand: raw item ids, oldest first, separated by commas")
    whom.add_argument(
        "--histories",
        help="JSON file with a list of histories, or with one per line: objects with items and, as far as the model "
        "reads them, actions, timestamps, context and features; user names the history; - for stdin",
    )
    add("--actions", help="the actions of --items, separated by commas")
    add("--times", help="the times of --items, seconds since 1970, separated by commas")
    add(
        "--at",
        type=parse_time,
        help="when the users ask, if the model reads it (DatasetArgs.query_time): now, seconds since 1970, or a date "
        "such as 2026-01-31T18:00 (UTC); default: at the newest event of each",
    )
    add("--top", type=int, default=10, help="items per user (default 10)")
    add("--format", choices=("text", "json"), default="text", help="form of the output (default text)")
    add("--output", type=Path, help="file to write; default: the terminal")
    return parser


def _recommend(options: argparse.Namespace) -> None:
    """Load the model, answer, and report on stderr what is unknown."""
    wanted = _users(options) if options.users or options.users_file else None
    given = _histories(options) if wanted is None else []
    trained = load_model(api.TrainedModel, options)
    unknown_users: list[Any] = []
    unknown_values: dict[str, list[Any]] = {}
    if wanted is None:
        answered, unknown_values = trained.recommend_for(given, options.top, options.at)
        if options.items:
            unknown_values.pop(USER_FEATURE, None)  # the history has no user, only a label
    else:
        known, unknown_users = trained.known_users(wanted)
        if not known:
            raise DataError(f"{trained.store} has none of these users: {shown(unknown_users)}")
        answered = trained.recommend(known, options.top, options.at)
    if not trained.mesh.is_main:
        return
    if trained.reads_request_time and options.at is None:
        note(trained, "each user asks at the time of the newest event; --at now asks now")
    if unknown_users:
        note(trained, f"{len(unknown_users)} unknown user(s) left out: {shown(unknown_users)}")
    for feature, values in unknown_values.items():
        note(trained, f"{len(values)} unknown value(s) of {feature}: {shown(values)}")
    if options.format == "json":
        facts = {"unknown_users": unknown_users, "unknown_values": unknown_values, "notes": trained.report}
        text = _as_json(trained, answered, facts)
    else:
        text = api.format_recommendations(answered) + "\n"
    if options.output:
        replace_text(options.output, text)
    else:
        sys.stdout.write(text)


def _users(options: argparse.Namespace) -> list[str]:
    if options.users:
        return [user for user in options.users.split(",") if user]
    return read_ids(options.users_file)


def _histories(options: argparse.Namespace) -> list[api.History]:
    if options.items:
        entry: dict[str, Any] = {"user": "given by hand", "items": options.items.split(",")}
        if options.actions:
            entry["actions"] = options.actions.split(",")
        if options.times:
            entry["timestamps"] = [_seconds(text) for text in options.times.split(",")]
        return [api.History(**entry)]
    text = read_text(options.histories)
    entries = (
        parse_json(text, options.histories)
        if text.lstrip().startswith("[")
        else [
            parse_json(line, f"{options.histories}:{number}") for number, line in enumerate(text.split("\n"), 1) if line
        ]
    )
    return [_history(entry, number, options.histories) for number, entry in enumerate(entries, 1)]


def _seconds(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DataError(f"--times: {text!r} is not a whole number of seconds since 1970") from None


def _history(entry: Any, number: int, file: str) -> api.History:
    where = f"{file}: history {number}"
    if not isinstance(entry, dict) or "items" not in entry:
        raise DataError(f'{where}: expected an object such as {{"user": "zoe", "items": [50, 181]}}')
    for name, value in entry.items():
        if name not in _KINDS:
            raise DataError(f"{where}: {name} is not known; allowed: {', '.join(_KINDS)}")
        if not isinstance(value, _KINDS[name]):
            raise DataError(f"{where}: {name} must be {'a list' if _KINDS[name] is list else 'an object'}")
    fields: dict[str, Any] = {"user": number} | entry
    return api.History(**fields)


def _as_json(trained: api.TrainedModel, answered: Sequence[api.Recommendation], facts: dict[str, Any]) -> str:
    recommendations = [
        {
            "user": entry.user,
            "items": [
                {"item": item, "title": title, "score": score}
                for item, title, score in zip(entry.items, entry.titles, entry.scores, strict=True)
            ],
        }
        for entry in answered
    ]
    document = {"checkpoint": str(trained.checkpoint), "recommendations": recommendations, **facts}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(main())
