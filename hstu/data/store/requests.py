"""Requests of a store: which candidates a user was shown, and when; with checks of the stored values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hstu.data.store.layout import REQUEST_FILES


@dataclass(frozen=True)
class Requests:
    """R requests with C candidates in total, sorted by user and then by time; int64."""

    users: np.ndarray
    """[R] rows of the users in the store, ascending."""
    times: np.ndarray
    """[R] seconds since 1970."""
    history_ends: np.ndarray
    """[R] one past the user's last event before the request. Events in the second of the request come after it."""
    offsets: np.ndarray
    """[R + 1]: request r has the candidates [offsets[r], offsets[r + 1])."""

    def __len__(self) -> int:
        return len(self.users)

    @property
    def sizes(self) -> np.ndarray:
        """[R] number of candidates per request."""
        return np.diff(self.offsets)

    def rows_of(self, candidates: np.ndarray) -> np.ndarray:
        """int64 [n]: the request of each candidate."""
        return np.searchsorted(self.offsets, candidates, side="right") - 1


def request_problems(requests: Requests, offsets: np.ndarray, times: np.ndarray) -> Iterator[tuple[str, str]]:
    """Yields (file, problem). ``offsets``: int64 [U + 1], the events of each user. ``times``: int64 [E]."""
    users, ends, num_users = requests.users, requests.history_ends, len(offsets) - 1
    if (requests.sizes < 1).any():
        yield REQUEST_FILES["offsets"], "a request has no candidates, or offsets are not ascending"
    if (np.diff(users) < 0).any() or not 0 <= users[0] <= users[-1] < num_users:
        yield REQUEST_FILES["users"], f"users are not ascending, or outside [0, {num_users})"
        return
    if (np.diff(requests.times) < 0)[np.diff(users) == 0].any():
        yield REQUEST_FILES["times"], "a user's requests are not in time order"
    if ((ends <= offsets[users]) | (ends > offsets[users + 1])).any():
        yield REQUEST_FILES["history_ends"], "a history ends outside the events of its user, or is empty"
        return
    has_later = ends < offsets[users + 1]
    is_early = times[ends[has_later]] < requests.times[has_later]
    if (times[ends - 1] >= requests.times).any() or is_early.any():
        yield REQUEST_FILES["history_ends"], "a history does not end where its request is"
