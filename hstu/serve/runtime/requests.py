"""The parts of a request: a history, and candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any


class ServingError(ValueError):
    """An exported directory is damaged, or a request does not fit the model."""


@dataclass(frozen=True)
class History:
    """The events of one user, oldest first. All values are raw values of the data, in lists or arrays."""

    user: Any = None
    """User id, for models with the contextual feature user_id and for error messages."""
    _: KW_ONLY
    items: Sequence[Any]
    """Item ids, one per event."""
    actions: Sequence[Any] | None = None
    """One per event, if the model reads actions."""
    timestamps: Sequence[int] | None = None
    """Whole seconds since 1970, one per event, if the model reads times."""
    context: Mapping[str, Any] = field(default_factory=dict)
    """Contextual feature → value of this user. Features that are left out are unknown."""
    features: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Item or event feature → value per event: None if missing, a list for several values or a vector. Item features
    that are left out come from the data."""

    def cut(self, events: slice) -> History:
        """A history of a slice of the events."""
        return replace(
            self,
            items=self.items[events],
            actions=None if self.actions is None else self.actions[events],
            timestamps=None if self.timestamps is None else self.timestamps[events],
            features={name: values[events] for name, values in self.features.items()},
        )


@dataclass(frozen=True)
class Candidates:
    """Items to score for one user."""

    items: Sequence[Any]
    features: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """As History.features, for features that are known before an event."""
    actions: Sequence[Any] | None = None
    """Known actions on the candidates: with NetworkArgs.target_group_size > 1, later candidates of a group read them.
    ``features`` may then contain features that are known after an event."""

    def cut(self, items: slice) -> Candidates:
        """A slice of the candidates."""
        actions = None if self.actions is None else self.actions[items]
        return Candidates(self.items[items], {name: each[items] for name, each in self.features.items()}, actions)
