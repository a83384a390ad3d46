"""A request: a history, candidates, and what is wrong with them for a model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import pairwise
from reprlib import repr
from typing import Any, Self

_SECONDS = range(-(10**11), 10**11)
"""Times that can be seconds since 1970: 3,000 years. Since 1973, milliseconds are outside."""
TextOf = Callable[[str], str]  # Encoder.text_of


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

    def cut(self, events: slice) -> Self:
        """A history of a slice of the events."""
        return self.changed(lambda values: values[events])

    def without(self, place: int) -> Self:
        """A history without one event."""
        return self.changed(lambda values: [*values[:place], *values[place + 1 :]])

    def changed(self, change: Callable[[Sequence[Any]], Sequence[Any]]) -> Self:
        """A history with changed sequences of values per event."""
        return replace(
            self,
            items=change(self.items),
            actions=None if self.actions is None else change(self.actions),
            timestamps=None if self.timestamps is None else change(self.timestamps),
            features={name: change(values) for name, values in self.features.items()},
        )


@dataclass(frozen=True)
class Candidates:
    """Items to score for one user."""

    items: Sequence[Any]
    features: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """As History.features, for features that are known before an event."""


def name_of(history: History) -> str:
    """The name of a history in error messages."""
    return "a history" if history.user is None else f"the history of {history.user!r}"


def feature_names(facts: Mapping[str, Any], known_after: bool = True) -> list[str]:
    """Features in requests to a model with these ``facts`` (serving.json), with those known after an event or not."""
    names = [*facts["side"], *(facts["known_after"] if known_after else ())]
    numbers = [entry["name"] for entry in facts["numbers"] if known_after or not entry["known_after"]]
    return [name for name in names if facts["features"][name]["kind"] != "time"] + numbers


def history_problems(history: History, at: int | None, facts: Mapping[str, Any], text_of: TextOf) -> Iterator[str]:
    """Yield what is wrong with a history for a request at time ``at``."""
    count, who, times = len(history.items), name_of(history), history.timestamps
    if not count and facts["task"] == "retrieval":
        yield f"{who} has no items; give at least one"
    elif not count and at is None and facts["reads_times"]:
        yield f"{who} has no items; give the time of the request"
    if count and facts["action"] and history.actions is None:
        yield f"{who} has no actions, but the model reads {text_of(facts['action'])}: give one per item"
    if count and facts["reads_times"] and times is None:
        yield f"{who} has no timestamps, but the model reads times: give one per item"
    features = {f"features {name!r}": values for name, values in history.features.items()}
    for what, values in {"actions": history.actions, "timestamps": times, **features}.items():
        if values is not None and len(values) != count:
            yield f"{who} has {len(values)} {what} for {count} items; give one per item"
    yield from _shape_problems(history.features, facts)
    yield from _unknown_names("contextual feature", history.context, facts["contextual"], text_of)
    yield from _unknown_names("feature of items or events", history.features, feature_names(facts), text_of)
    if at is not None and not facts["reads_request_time"]:
        yield "the model does not read the time of a request; leave it out"
    seconds = [] if times is None else [int(time) for time in times]
    if seconds != sorted(seconds):
        before, after = next(pair for pair in pairwise(seconds) if pair[0] > pair[1])
        yield f"{who} has an event at {before} before one at {after}; give events from the oldest to the newest"
    if at is not None and seconds and seconds[-1] > at:
        yield f"{who} has an event at {seconds[-1]}, which is later than the request at {at}"
    if (farthest := max([*seconds[:1], *seconds[-1:], at or 0], key=abs)) not in _SECONDS:
        yield f"{who} has the time {farthest}; give whole seconds since 1970, not milliseconds"


def candidate_problems(candidates: Candidates, facts: Mapping[str, Any], text_of: TextOf) -> Iterator[str]:
    """Yield what is wrong with candidates."""
    known, count = feature_names(facts, known_after=False), len(candidates.items)
    yield from _shape_problems(candidates.features, facts)
    yield from _unknown_names("feature that is known before an event,", candidates.features, known, text_of)
    for name, values in candidates.features.items():
        if len(values) != count:
            yield f"{len(values)} features {name!r} for {count} candidates; give one per candidate"


def _shape_problems(features: Mapping[str, Sequence[Any]], facts: Mapping[str, Any]) -> Iterator[str]:
    for name in features.keys() & facts["features"].keys():
        is_list = facts["features"][name]["is_list"]
        for value in features[name]:
            if value is not None and isinstance(value, (list, tuple)) != is_list:
                yield f"a value of {name!r} is {repr(value)}; give {'a list' if is_list else 'one value'}, or None"


def _unknown_names(what: str, given: Mapping[str, Any], known: Sequence[str], text_of: TextOf) -> Iterator[str]:
    for name in given:
        if name not in known:
            yield f"the model has no {what} {name!r}; it has {', '.join(map(text_of, known)) or 'none'}"
