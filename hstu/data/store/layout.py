"""What a sequence store consists of: its features with their roles, its files, and how many values each file has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

from hstu.data.datasets.spec import USER_FEATURE

Role = Literal["item", "action", "timestamp", "context", "item_feature", "event", "item_number", "event_number"]
HeldOut = Literal["valid", "test"]

META_FILE = "meta.json"
OFFSETS_FILE = "offsets.npy"
DTYPES = {
    "item": "<i4", "action": "<i4", "timestamp": "<i8", "context": "<i4", "item_feature": "<i4", "event": "<i4",
    "item_number": "<f4", "event_number": "<f4",
}  # fmt: skip
"""Role of a feature → dtype of its array."""
NUMBER_ROLES = ("item_number", "event_number")
"""Roles of quantities: numbers of events, numbers and vectors of items. NaN stands for a missing one."""
OF_CANDIDATES: tuple[Role, ...] = ("item", "action", "event", "event_number")
"""Roles of the features that the candidates of requests have, as events do."""
REQUEST_FILES = {
    "users": "request.user.npy", "times": "request.time.npy", "history_ends": "request.history.npy",
    "offsets": "request.offsets.npy",
}  # fmt: skip
"""Field of Requests → its file."""
_FOLDERS = {"context": "context", "item_feature": "item", "item_number": "item"}
"""Role → first part of the name of its files, where that is not "sequence"."""


@dataclass(frozen=True)
class NumberStatistics:
    """What the transforms of a number need: statistics of the values of its whole column that are not missing."""

    count: int
    """Items or events that have a value."""
    missing: int
    """Items or events that have none."""
    mean: list[float]
    """One number, or one per component of a vector, as for ``std``."""
    std: list[float]
    """Of the population, so 0 where all values are equal."""
    log_mean: float | None = None
    """Mean of sign(x) log(1 + |x|). Vectors have none of what follows."""
    log_std: float | None = None
    quantiles: list[float] | None = None
    """Ascending, at equal distances: the first is the least value, the last the largest."""


@dataclass(frozen=True)
class FeatureMeta:
    """One feature. Values lie in [0, cardinality); a timestamp, in seconds, and a number have no cardinality."""

    name: str
    role: Role
    dtype: str
    cardinality: int | None
    has_vocab: bool
    raw: bool = False
    """Whether models get the raw ids, int64, in place of the codes."""
    is_list: bool = False
    """Whether an item has a list of one or more values, of role "item_feature"."""
    width: int = 1
    """Numbers that an item has, of role "item_number": more than one are a vector."""
    statistics: NumberStatistics | None = None
    """Of a number."""

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> FeatureMeta:
        """From the description of a store."""
        found = described.get("statistics")
        return cls(**{**described, "statistics": NumberStatistics(**found) if found else None})

    @property
    def file(self) -> str:
        """File of the values; any character may occur in the name."""
        return feature_file(self.role, self.name)

    @property
    def candidate_file(self) -> str:
        """File of the values that candidates have of an item, action or event feature."""
        return f"candidate.{quote(self.name, safe='')}.npy"


TIME_FEATURES = {
    name: FeatureMeta(name, "event", "<i4", cardinality, has_vocab=False)
    for name, cardinality in (("hour_of_day", 24), ("day_of_week", 7), ("time_gap", 41))
}
"""What any data with times has beside its columns. Times are UTC, and a week begins on Monday. time_gap is 0 for a
user's first event, else 1 plus the base-2 logarithm, rounded down, of 1 plus the seconds since the event before; at
most 40 (17,000 years)."""


def feature_file(role: Role, feature: str) -> str:
    """File of a feature's values."""
    return f"{_FOLDERS.get(role, 'sequence')}.{_quoted(feature, role)}.npy"


def list_offsets_file(feature: str) -> str:
    """File of the offsets of an item feature whose values are lists."""
    return f"item.{_quoted(feature, 'item_feature')}.offsets.npy"


def _quoted(feature: str, role: Role) -> str:
    name = quote(feature, safe="")
    # Else the values of "a.offsets" would be in the file of the offsets of "a".
    return name.replace(".", "%2E") if role in ("item_feature", "item_number") else name


def split_file(split: HeldOut) -> str:
    """File of the first event of each user that belongs to a split or to a later one."""
    return f"split.{split}.npy"


def strings_files(stem: str) -> tuple[str, str]:
    """Files of a list of strings: offsets int64 [n + 1] into bytes uint8."""
    return f"{stem}.offsets.npy", f"{stem}.utf8.npy"


def vocabulary_stem(feature: str) -> str:
    """Common start of the names of a vocabulary's files."""
    return f"vocabulary.{quote(feature, safe='')}"


def lengths_of_files(meta: Mapping[str, Any]) -> dict[str, int | None]:
    """File → how many values it must have, by a store's description; None where only its offsets say it."""
    users, files = meta["num_users"], meta["files"]
    features = [FeatureMeta.of(feature) for feature in meta["features"]]
    items = next(feature.cardinality or 0 for feature in features if feature.role == "item")
    lengths: dict[str, int | None] = {OFFSETS_FILE: users + 1}
    if "split" in meta:
        lengths |= {split_file("valid"): users, split_file("test"): users}
    for feature in features:
        of_role = {"context": users, "item_feature": items, "item_number": items * feature.width}
        lengths[feature.file] = None if feature.is_list else of_role.get(feature.role, meta["num_events"])
        if feature.is_list:
            lengths[list_offsets_file(feature.name)] = items + 1
        if meta.get("num_requests") and feature.role in OF_CANDIDATES:
            lengths[feature.candidate_file] = meta["num_candidates"]
    if requests := meta.get("num_requests"):
        lengths |= dict.fromkeys(REQUEST_FILES.values(), requests) | {REQUEST_FILES["offsets"]: requests + 1}
    texts: dict[str, int | None] = {feature.name: feature.cardinality for feature in features if feature.has_vocab}
    stems = {vocabulary_stem(name): length for name, length in (texts | {USER_FEATURE: users}).items()}
    for stem, length in (stems | {"titles": items}).items():
        offsets, utf8 = strings_files(stem)
        if offsets in files:
            lengths |= {offsets: (length or 0) + 1, utf8: None}
        elif stem != "titles":
            lengths[f"{stem}.npy"] = length
    return lengths
