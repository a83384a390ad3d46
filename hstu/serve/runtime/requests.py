"""What a request consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any


class ServingError(ValueError):
    """The directory is damaged, or a request lacks something or does not fit the model."""


@dataclass(frozen=True)
class History:
    """The events of one user, oldest first. All values are those of the raw data, in lists or arrays."""

    user: Any = None
    """Id of the user, which models with the contextual feature user_id read, and errors name."""
    _: KW_ONLY
    items: Sequence[Any]
    """Ids of the items, one per event."""
    actions: Sequence[Any] | None = None
    """One per event, if the model reads actions."""
    timestamps: Sequence[int] | None = None
    """Whole seconds since 1970, one per event, if the model reads times."""
    context: Mapping[str, Any] = field(default_factory=dict)
    """Contextual feature → value of this user. One that is left out is unknown."""
    features: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Feature of items or events → its value at each event, None where it is missing; a list of values where an item
    has several, and for a vector. Features of items that are left out are those of the data."""

    def cut(self, events: slice) -> History:
        """Some of the events."""
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
    """As History.features, for features that are known before the event."""
    actions: Sequence[Any] | None = None
    """What the user did with each, where that is known: a model trained with NetworkArgs.target_group_size reads it for
    later candidates of a group. ``features`` may then also have what is known after the event."""

    def cut(self, items: slice) -> Candidates:
        """Some of the items."""
        actions = None if self.actions is None else self.actions[items]
        return Candidates(self.items[items], {name: each[items] for name, each in self.features.items()}, actions)
