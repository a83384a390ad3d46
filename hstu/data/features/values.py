"""Values of features as numbers: labels of ranking tasks, and statistics of numeric columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf

import numpy as np

from hstu.base.errors import ConfigError, DataError
from hstu.config.args import RankingTaskArgs
from hstu.config.option import located
from hstu.data.datasets.spec import UNKNOWN
from hstu.data.sampling.samples import SampleTable
from hstu.data.store.layout import NumberStatistics
from hstu.data.store.sequence_store import SequenceStore

_EXACT = 2**24
"""Integers up to here are exact in float32."""
_CHUNK = 1 << 20
NUM_QUANTILES = 65
"""Quantiles of a column, from the smallest to the largest value."""
_MOST_RANKED = 1 << 24
"""Largest number of values that are sorted for quantiles."""


def label_columns(tasks: Sequence[RankingTaskArgs] | None) -> tuple[str, ...]:
    """The labels of the tasks, each once."""
    return tuple(dict.fromkeys(task.label for task in tasks or ()))


@dataclass(frozen=True)
class LabelColumn:
    """A feature of the events, or the action, as float32 numbers; NaN where a value is missing. Texts that are numbers
    are parsed. Other texts are numbered from 0 in alphabetical order."""

    store: SequenceStore
    name: str
    texts: tuple[str, ...] | None = None
    """The texts that stand for 0, 1, …. None: the store's texts, if they are not numbers."""

    def of(self, store: SequenceStore) -> LabelColumn:
        """The same feature of another store, with the same numbers for the same texts."""
        return self if store is self.store else LabelColumn(store, self.name, self.known_texts)

    @cached_property
    def known_texts(self) -> tuple[str, ...]:
        """``texts``, or the store's texts; empty if the values are numbers."""
        if self.texts is not None:
            return self.texts
        raw = self._raw_ids()
        if raw is None or raw.dtype != object:
            return ()
        texts = tuple(str(text) for text in raw if text != UNKNOWN)
        return () if all(_as_number(text) is not None for text in texts) else texts

    def _raw_ids(self) -> np.ndarray | None:
        return self.store.raw_ids(self.name) if self.store.feature(self.name).has_vocab else None

    @cached_property
    def values(self) -> np.ndarray:
        """Code → number, float32 [cardinality]. Raises DataError for a text that the training data lacks."""
        raw = self._raw_ids()
        if raw is None:
            return np.arange(self.store.cardinality(self.name), dtype=np.float32)
        if raw.dtype != object:
            return raw.astype(np.float32)
        places = {text: float(place) for place, text in enumerate(self.known_texts)}
        numbers = [places.get(text) if self.known_texts else _as_number(text) for text in raw]
        for text, number in zip(raw, numbers, strict=True):
            if number is None and text != UNKNOWN:
                raise DataError(
                    f"{self.store}: the label {self.name!r} has the value {text!r}, which the training data lacks"
                )
        return np.array([np.nan if number is None else number for number in numbers], dtype=np.float32)

    def read(self, codes: np.ndarray) -> np.ndarray:
        """Stored values → numbers, float32 [n]. Raises DataError for a code out of range."""
        if self.store.feature(self.name).role == "event_number":
            return codes
        if len(codes) and (codes.min() < 0 or codes.max() >= len(self.values)):
            raise DataError(
                f"{self.store}: {self.name!r} has values outside [0, {len(self.values)}): the data is damaged, "
                "preprocess it again"
            )
        return self.values[codes]

    def facts(self) -> LabelFacts:
        """Summary of the values. Reads the whole column, unless its values are in a vocabulary."""
        facts = LabelFacts(texts=self.known_texts)
        columns = [self.values] if self.store.feature(self.name).has_vocab else self.store.columns(self.name)
        for stored in columns:
            for start in range(0, len(stored), _CHUNK):
                chunk = stored[start : start + _CHUNK]
                present = chunk[~np.isnan(chunk)]
                if len(present):
                    are_whole = bool((present == np.round(present)).all())
                    facts = facts.joined(LabelFacts(float(present.min()), float(present.max()), are_whole))
        return facts


def _as_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if np.isfinite(np.float32(number)) else None


@dataclass(frozen=True)
class LabelFacts:
    """Summary of the values of a label that are not missing. Without any, ``least`` > ``greatest``."""

    least: float = inf
    greatest: float = -inf
    are_whole: bool = True
    """Whether all values are integers."""
    texts: tuple[str, ...] = ()
    """The texts that stand for 0, 1, …; empty where values are numbers."""

    def joined(self, other: LabelFacts) -> LabelFacts:
        """The summary of both together."""
        least, greatest = min(self.least, other.least), max(self.greatest, other.greatest)
        return LabelFacts(least, greatest, self.are_whole and other.are_whole, self.texts or other.texts)

    def __str__(self) -> str:
        return " or ".join(map(repr, self.texts)) if self.texts else f"from {self.least:g} to {self.greatest:g}"


def check_labels(tasks: Sequence[RankingTaskArgs], facts: Mapping[str, LabelFacts]) -> None:
    """Raises ConfigError for labels that do not fit the tasks."""
    found = [(task, _problem_of(task, facts[task.label])) for task in tasks]
    problems = [located(task, *problem) for task, problem in found if problem]
    ConfigError.raise_if(problems)


@dataclass(frozen=True)
class LabelCodes:
    """How a task reads the numbers of a label."""

    first: int = 0
    """The label of class 0: 0 or 1, see RankingTaskArgs.num_classes."""
    positive: tuple[int, ...] = ()
    """The numbers of RankingTaskArgs.positive_values."""

    @classmethod
    def of(cls, task: RankingTaskArgs, facts: LabelFacts) -> LabelCodes:
        """Derives them from a summary of the labels."""
        first = task.num_classes is not None and facts.greatest == task.num_classes and facts.least >= 1
        known = [text for text in task.positive_texts or () if text in facts.texts]
        return cls(int(first), tuple(facts.texts.index(text) for text in known))


PLAIN = LabelCodes()
"""For labels that are 0, 1, … or mean themselves."""


def _problem_of(task: RankingTaskArgs, label: LabelFacts) -> tuple[str, str] | None:
    """(parameter, problem) of one task."""
    are_codes = label.are_whole and label.least >= 0
    largest_class = (task.num_classes or 0) - 1 + LabelCodes.of(task, label).first
    threshold, positive = task.positive_from, task.positive_texts
    is_plain = task.kind == "binary" and task.positive_values is None
    rules: tuple[tuple[str, bool, str], ...] = (
        ("label", label.least > label.greatest, "all values of this feature are missing in the data"),
        (
            "positive_values",
            positive is not None and not set(positive) < set(label.texts),
            f"must be some but not all of the labels, which are {label}",
        ),
        (
            "label",
            bool(label.texts) and positive is None and task.kind != "class",
            f"has texts, {label}, where numbers are needed; a binary task may set positive_values",
        ),
        (
            "num_classes",
            task.num_classes is not None and not (are_codes and label.greatest <= largest_class),
            f"must fit the labels, which are {label}: integers from 0 to num_classes - 1, or from 1 to num_classes",
        ),
        (
            "positive_values",
            task.bit_mask is not None and not (are_codes and label.greatest < _EXACT),
            f"the labels {task.label!r} are not all integers from 0 to {_EXACT - 1}: they are {label}",
        ),
        (
            "positive_values",
            threshold is not None and not label.least < threshold <= label.greatest,
            f"the labels {task.label!r} are {label}, so either all or none are positive",
        ),
        (
            "label",
            is_plain and not (are_codes and label.greatest <= 1),
            f'has values {label}, and a binary label is 0 or 1; set positive_values, such as [">= 4"]',
        ),
    )
    return next(((parameter, text) for parameter, is_wrong, text in rules if is_wrong), None)


def statistics_of_numbers(values: np.ndarray) -> NumberStatistics:
    """Statistics of ``values``: float32 [n, width], NaN where missing and finite elsewhere."""
    count, mean, std = _moments(values, lambda known: known)
    missing = len(values) - count
    if values.shape[1] > 1:
        return NumberStatistics(count, missing, mean, std)
    _, (log_mean,), (log_std,) = _moments(values, signed_log)
    return NumberStatistics(count, missing, mean, std, log_mean, log_std, _quantiles(values[:, 0], count))


def signed_log(values: np.ndarray) -> np.ndarray:
    """sign(x) log(1 + |x|)."""
    return np.sign(values) * np.log1p(np.abs(values))


def _moments(values: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> tuple[int, list[float], list[float]]:
    """(rows with values, mean, standard deviation) of a function of each component; 0 without such rows."""
    count, total, squares = 0, np.zeros(values.shape[1]), np.zeros(values.shape[1])
    for known in _known(values):
        count += len(known)
        total += function(known).sum(axis=0)
    mean = total / max(count, 1)
    for known in _known(values):
        squares += ((function(known) - mean) ** 2).sum(axis=0)
    return count, mean.tolist(), np.sqrt(squares / max(count, 1)).tolist()


def _known(values: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(_CHUNK // values.shape[1], 1)
    for start in range(0, len(values), rows):
        chunk = values[start : start + rows]
        yield chunk[~np.isnan(chunk[:, 0])].astype(np.float64)


def _quantiles(values: np.ndarray, count: int) -> list[float]:
    """Values at equally spaced ranks of float32 [n] ``values``, of which ``count`` are not NaN. In a column longer than
    _MOST_RANKED, only the smallest and largest are exact; the others use every k-th value."""
    if not count:
        return [0.0] * NUM_QUANTILES
    chosen = np.asarray(values[:: -(-len(values) // _MOST_RANKED)])
    known = np.sort(chosen[~np.isnan(chosen)])
    if not len(known):
        known = np.fmin.reduce(values, keepdims=True)
    quantiles = known[np.rint(np.linspace(0, len(known) - 1, NUM_QUANTILES)).astype(np.int64)].astype(np.float64)
    quantiles[0], quantiles[-1] = np.fmin.reduce(values), np.fmax.reduce(values)
    return quantiles.tolist()


def training_statistics(
    store: SequenceStore, names: Sequence[str], samples: SampleTable
) -> dict[str, NumberStatistics]:
    """Statistics of numbers: of items over all items, of events over the histories of the training ``samples``.
    Histories include events that truncation removes from the samples. Held-out events have no influence."""
    found = {name: store.features[name].statistics for name in names}
    if of_events := [name for name in names if name in store.event_number_features]:
        changes = np.zeros(store.num_events + 1, dtype=np.int64)
        np.add.at(changes, samples.history_begin, 1)
        np.add.at(changes, samples.stop, -1)
        is_trained = changes.cumsum()[:-1] > 0
        found |= {name: statistics_of_numbers(store.sequence(name)[is_trained][:, None]) for name in of_events}
    return {name: statistics for name, statistics in found.items() if statistics is not None}
