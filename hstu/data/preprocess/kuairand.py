"""KuaiRand Pure, 1K and 27K as raw tables. Format: https://kuairand.com/ (arXiv 2208.08696)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hstu.data.preprocess.raw import Meaning, RawTables
from hstu.data.preprocess.tables import identifier, table_with_header

ACTION_BITS = {
    "is_click": 1,
    "is_like": 2,
    "is_follow": 4,
    "is_comment": 8,
    "is_forward": 16,
    "is_hate": 32,
    "long_view": 64,
    "is_profile_enter": 128,
}
"""Column of the log -> its bit in the action; the ranking task t reads bit t."""

_CONTEXT = (
    "user_active_degree",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
)
_MEANINGS = {
    "user": Meaning("user_id", "an integer"),
    "item": Meaning("video_id", "an integer"),
    "action": Meaning(", ".join(ACTION_BITS), "an integer in each of them"),
    "time": Meaning("time_ms", "milliseconds since 1970"),
}


def kuairand(files: Sequence[Path]) -> RawTables:
    """The standard logs, earlier period first, and user_features. Ordered by time_ms, stored in seconds.

    Users in only one of the logs are kept; users without a row of features have the value "unknown".
    """
    *logs, users = files
    types = {"user_id": "BIGINT", "video_id": "BIGINT", "time_ms": "BIGINT", **dict.fromkeys(ACTION_BITS, "INTEGER")}
    action = " + ".join(f"CAST({column} <> 0 AS INTEGER) * {bit}" for column, bit in ACTION_BITS.items())
    features = ", ".join(f"{identifier(name)} AS c{place}" for place, name in enumerate(_CONTEXT))
    user_types = {"user_id": "BIGINT", **dict.fromkeys(_CONTEXT, "VARCHAR")}
    return RawTables(
        logs=tuple(table_with_header(log, types) for log in logs),
        events=f'user_id AS "user", video_id AS item, {action} AS action, time_ms AS "time", '
        'time_ms // 1000 AS "timestamp"',
        context=(table_with_header(users, user_types), f'user_id AS "user", {features}'),
        meanings=_MEANINGS,
    )


READERS: dict[str, Callable[[Sequence[Path]], RawTables]] = {"kuairand": kuairand}
