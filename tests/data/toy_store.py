"""A SequenceStore held in memory, for tests that make thousands of them or need a damaged one."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hstu.data.store.layout import FeatureMeta
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore


class ToyStore(SequenceStore):
    """Users' lists of item codes (and actions, times, contexts); user u has the raw id ``raw_users[u]``."""

    def __init__(
        self,
        items: Sequence[Sequence[int]],
        *,
        actions: Sequence[Sequence[int]] | None = None,
        times: Sequence[Sequence[int]] | None = None,
        context: Mapping[str, Sequence[int]] | None = None,
        raw_users: Sequence[Any] | None = None,
        num_items: int = 50,
        num_actions: int = 10,
        segments: Sequence[Sequence[int]] = (),
    ) -> None:
        self.path = "toy"  # type: ignore[assignment]
        self.split = None
        self.num_users = len(items)
        self.item_feature, self.action_feature = "item", None if actions is None else "action"
        self.timestamp_feature = None if times is None else "time"
        self.contextual_features = tuple(context or {})
        self.item_side_features = self.event_features = ()
        self.item_number_features = self.event_number_features = ()
        self.time_features = {}
        self.num_requests, self.shard_users = 0, np.zeros(1, np.int64)
        columns = {"item": items, "action": actions, "time": times}
        self.arrays = {
            name: np.array([value for row in rows for value in row], dtype=np.int64)
            for name, rows in columns.items()
            if rows is not None
        } | {name: np.asarray(values) for name, values in (context or {}).items()}
        self.bounds = np.cumsum([0, *(len(row) for row in items)])
        self.num_events = int(self.bounds[-1])
        sizes = {"item": num_items, "action": num_actions, "time": None} | {name: 10 for name in context or {}}
        roles = {"item": "item", "action": "action", "time": "timestamp"}
        self.features = {
            name: FeatureMeta(name, roles.get(name, "context"), "int64", sizes[name], False)  # type: ignore[arg-type]
            for name in self.arrays
        }
        self.num_of_segment = np.array([number for row in segments for number in row], dtype=np.uint16)
        self.raw_users = np.array(range(100, 100 + len(items)) if raw_users is None else raw_users)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restore, (self.__dict__,))

    def offsets(self) -> np.ndarray:
        return self.bounds

    def sequence(self, feature: str) -> np.ndarray:
        return self.arrays[feature]

    def segments(self) -> np.ndarray | None:
        return self.num_of_segment if len(self.num_of_segment) else None

    def context(self, feature: str) -> np.ndarray:
        return self.arrays[feature]

    def raw_ids(self, feature: str) -> np.ndarray:
        assert feature == USER_FEATURE
        return self.raw_users


def _restore(state: dict[str, Any]) -> ToyStore:
    store = ToyStore.__new__(ToyStore)
    store.__dict__.update(state)
    return store


def store_of(*lengths: int) -> ToyStore:
    """Users with so many events."""
    items = [[event % 50 for event in range(length)] for length in lengths]
    return ToyStore(items, actions=[[1] * length for length in lengths])
