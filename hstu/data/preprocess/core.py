"""k-core filters: users and items with few events are left out, again and again, until all that is left has enough."""

from __future__ import annotations

import logging

from hstu.base.errors import ConfigError, DataError
from hstu.data.datasets.raw import parquet_rows
from hstu.data.preprocess.engine import one, write_parquet
from hstu.data.preprocess.state import BuildOptions, BuildState

_log = logging.getLogger(__name__)
_STAGE = "core"


def check_filters(options: BuildOptions) -> None:
    """Raises ConfigError for numbers of events below 1."""
    for option in ("min_user_events", "min_item_events"):
        if (least := getattr(options, option)) < 1:
            raise ConfigError(f"--{option} {least}: at least 1, which leaves out nothing")


def keep_core(state: BuildState) -> None:
    """Leaves out the events of users and items that have too few of them. BuildState.events then lacks these.

    Raises DataError where nothing is left.
    """
    options, journal = state.options, state.writer.journal
    if max(options.min_user_events, options.min_item_events) == 1 or _STAGE in journal:
        return
    (before,) = one(state.engine, f"SELECT count(*) FROM {state.usable_events()}")
    kept = {"user": -1, "item": -1}
    rounds, changed = 0, True
    while changed:
        found = {"user": _keep(state, "user", rounds > 0, options.min_user_events)}
        found["item"] = _keep(state, "item", True, options.min_item_events)
        rounds, changed, kept = rounds + 1, found != kept, found
    journal.commit(_STAGE)  # from here on, state.events() is what is kept
    (after,) = one(state.engine, f"SELECT count(*) FROM {state.events()}")
    wanted = f"--min_user_events {options.min_user_events} --min_item_events {options.min_item_events}"
    if after == 0:
        raise DataError(f"{wanted} leave no event of {before:,}; ask for fewer events per user and item")
    _log.info("%s: %d of %d events are left, after %d rounds", wanted, after, before, rounds)


def _keep(state: BuildState, name: str, others_known: bool, least: int) -> int:
    """Writes the ids with ``least`` events among those whose other id was kept before; returns their number."""
    other = "item" if name == "user" else "user"
    known = f'WHERE "{other}" IN (SELECT id FROM {parquet_rows(state.core_file(other))})' if others_known else ""
    query = f'SELECT "{name}" AS id FROM {state.usable_events()} {known} GROUP BY 1 HAVING count(*) >= {least}'
    return write_parquet(state.engine, query, state.core_file(name))
