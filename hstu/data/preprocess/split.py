"""The split that a column of the raw data gives: where the valid and the test events of each user begin."""

from __future__ import annotations

import numpy as np

from hstu.base.errors import DataError
from hstu.data.datasets.spec import SPLIT_NAMES
from hstu.data.preprocess.state import BuildState


def write_split(state: BuildState, offsets: np.ndarray) -> None:
    """Writes the bounds, if the data has a split. ``offsets``: int64 [U + 1], the events of each user.

    Raises DataError where a split begins before an earlier one of the same user has ended, and where nothing would be
    trained on or nothing evaluated.
    """
    if state.schema.split is None:
        return
    columns = state.engine.execute(_per_user(state)).fetchnumpy().values()
    users, train, valid, is_mixed = map(np.asarray, columns)
    _check_order(state, users[is_mixed])
    first_valid = offsets[:-1] + train
    first_test = first_valid + valid
    counts = dict(zip(SPLIT_NAMES, (train.sum(), valid.sum(), (offsets[1:] - first_test).sum()), strict=True))
    if not counts["train"] or counts["train"] == offsets[-1]:
        missing = "'valid' or 'test', so there is nothing to evaluate" if counts["train"] else "'train'"
        raise DataError(
            f"--split {state.schema.split}: no event is marked {missing}; correct the column or leave it out"
        )
    state.writer.write_split(state.schema.split, first_valid, first_test)


def _check_order(state: BuildState, mixed: np.ndarray) -> None:
    if not len(mixed):
        return
    order = "in time order" if state.schema.timestamp else "in the order of the rows"
    raise DataError(
        f"--split {state.schema.split}: {len(mixed):,} user(s), the first of them {mixed[0]!s}, have an event of an "
        f"earlier split after one of a later split. Each user's events must be, {order}, first train, then valid, then "
        "test; correct the column or leave it out"
    )


def _per_user(state: BuildState) -> str:
    """SQL of user, number of train events, number of valid events, whether splits overlap; in the order of codes."""
    place = '"time"' if state.schema.timestamp else 'row(part, "row")'
    overlaps = " OR ".join(
        f'coalesce(max({place}) FILTER ("split" < {later}) > min({place}) FILTER ("split" >= {later}), false)'
        for later in (1, 2)
    )
    counts = ", ".join(f'count(*) FILTER ("split" = {number})' for number in (0, 1))
    return f'SELECT "user", {counts}, {overlaps} FROM {state.events()} GROUP BY 1 ORDER BY 1'
