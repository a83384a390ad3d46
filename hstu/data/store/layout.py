"""The layout of a sequence store: its features with their roles, its files, and the number of values per file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal
from urllib.parse import quote

from hstu.base.json_shape import check_shape
from hstu.data.datasets.spec import USER_FEATURE

Role = Literal["item", "action", "timestamp", "context", "item_feature", "event", "item_number", "event_number"]
HeldOut = Literal["valid", "test"]

META_FILE = "meta.json"
OFFSETS_FILE = "offsets.npy"
SEGMENT_FILE = "segment.npy"
"""Number of the append that brought each event, in stores to which files were appended."""
DTYPES = {
    "item": "<i4", "action": "<i4", "timestamp": "<i8", "context": "<i4", "item_feature": "<i4", "event": "<i4",
    "item_number": "<f4", "event_number": "<f4",
}  # fmt: skip
"""Role of a feature → dtype of its array."""
NUMBER_ROLES = ("item_number", "event_number")
"""Roles of quantities: numbers of events, numbers and vectors of items. NaN means missing."""
OF_CANDIDATES: tuple[Role, ...] = ("item", "action", "event", "event_number")
"""Roles of the features that candidates of requests have, as events do."""
IN_SHARDS = ("sequence.", "candidate.", SEGMENT_FILE)
"""How the names of files begin that lie in shards, if a store has any: those with a value per event or candidate."""
MOST_SHARDS = 10_000
REQUEST_FILES = {
    "users": "request.user.npy", "times": "request.time.npy", "history_ends": "request.history.npy",
    "offsets": "request.offsets.npy",
}  # fmt: skip
"""Field of Requests → its file."""
_FOLDERS = {"context": "context", "item_feature": "item", "item_number": "item"}
"""Role → first part of its file names, where that is not "sequence"."""


@dataclass(frozen=True)
class NumberStatistics:
    """Statistics of a numeric column that its transforms need, over the values that are not missing."""

    count: int
    """Items or events with a value."""
    missing: int
    mean: list[float]
    """One value, or one per component of a vector; ``std`` likewise."""
    std: list[float]
    """Population standard deviation: 0 where all values are equal."""
    log_mean: float | None = None
    """Mean of sign(x) log(1 + |x|). None for vectors, as are the fields below."""
    log_std: float | None = None
    quantiles: list[float] | None = None
    """Values at equally spaced ranks, from the smallest to the largest."""


@dataclass(frozen=True)
class FeatureMeta:
    """One feature. Its values lie in [0, cardinality); timestamps (seconds) and numbers have no cardinality."""

    name: str
    role: Role
    dtype: str
    cardinality: int | None
    has_vocab: bool
    raw: bool = False
    """Models get the raw int64 ids instead of the codes."""
    is_list: bool = False
    """Each item has a list of one or more values (role "item_feature")."""
    width: int = 1
    """Numbers per item (role "item_number"); more than 1 means a vector."""
    statistics: NumberStatistics | None = None

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> FeatureMeta:
        """Parses an entry of the store's description."""
        if found := described.get("statistics"):
            check_shape(found, {"mean": [float], "std": [float]}, "statistics")
            if not len(found["mean"]) == len(found["std"]) == described.get("width", 1):
                raise ValueError(f"mean and std of {described['name']} do not have its width")
        return cls(**{**described, "statistics": NumberStatistics(**found) if found else None})

    @property
    def file(self) -> str:
        """File of the values. Special characters of the name are quoted."""
        return f"{_FOLDERS.get(self.role, 'sequence')}.{_quoted(self.name, self.role)}.npy"

    @property
    def candidate_file(self) -> str:
        """File of the candidates' values of an item, action or event feature."""
        return f"candidate.{quote(self.name, safe='')}.npy"


TIME_FEATURES = {
    name: FeatureMeta(name, "event", "<i4", cardinality, has_vocab=False)
    for name, cardinality in (("hour_of_day", 24), ("day_of_week", 7), ("time_gap", 41))
}
"""Event features that are computed from times, in UTC; weeks begin on Monday. time_gap is 0 for a user's first event,
else 1 + floor(log2(1 + seconds since the previous event)), at most 40 (17,000 years)."""


def list_offsets_file(feature: str) -> str:
    """File of the offsets of an item feature that holds lists."""
    return f"item.{_quoted(feature, 'item_feature')}.offsets.npy"


@lru_cache  # readers ask for it several times per batch
def _quoted(feature: str, role: Role) -> str:
    name = quote(feature, safe="")
    # Without this, the values of "a.offsets" would go into the offsets file of "a".
    return name.replace(".", "%2E") if role in ("item_feature", "item_number") else name


def shard_file(shard: int, file: str) -> str:
    """The part of a file that lies in a shard."""
    return f"shard.{shard:05d}/{file}"


def split_file(split: HeldOut) -> str:
    """File of each user's first event in a split or a later split."""
    return f"split.{split}.npy"


def strings_files(stem: str) -> tuple[str, str]:
    """Files of a list of strings: int64 [n + 1] offsets, and uint8 bytes."""
    return f"{stem}.offsets.npy", f"{stem}.utf8.npy"


def vocabulary_stem(feature: str) -> str:
    """Common prefix of a vocabulary's file names."""
    return f"vocabulary.{quote(feature, safe='')}"


def lengths_of_files(meta: Mapping[str, Any]) -> dict[str, int | None]:
    """File → the number of values that it must have; None where only its offsets determine it."""
    users, files = meta["num_users"], meta["files"]
    features = [FeatureMeta.of(feature) for feature in meta["features"]]
    items = next(feature.cardinality or 0 for feature in features if feature.role == "item")
    lengths: dict[str, int | None] = {OFFSETS_FILE: users + 1}
    if meta.get("num_segments", 1) > 1:
        lengths[SEGMENT_FILE] = meta["num_events"]
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
