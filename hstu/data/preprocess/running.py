"""Makes the tables of running statistics from all events, and the statistics of events and candidates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from hstu.base.errors import ConfigError
from hstu.data.batches.jagged import ranges
from hstu.data.datasets import DATASETS, resolve_name
from hstu.data.features.running import DAY_S, NUM_FACTORS, WITH_VALUES, Questions, RunningStatistics, keys_of, names_of
from hstu.data.preprocess.base import labels
from hstu.data.preprocess.state import Build
from hstu.data.store.parts import Values
from hstu.data.store.sequence_store import Requests, SequenceStore

_FIRST_FIT, _GROWTH, _NEWEST = 2000, 1.5, 1 << 22
"""Factors are estimated at the first midnight with _FIRST_FIT events before it, and again whenever there are _GROWTH
times as many, from about _NEWEST of them at most."""
_ROUNDS, _LATER_ROUNDS = 35, 10
_NEVER = -(1 << 40)
"""A day before all others."""
_USERS_AT_ONCE, _PLACES_AT_ONCE = 1 << 15, 1 << 17


@dataclass(frozen=True)
class Log:
    """Events of U users, one user after another, each oldest first.

    Args:
        offsets: user u has the events [offsets[u], offsets[u + 1]), int64 [U + 1].
        items: int64 [E].
        times: seconds, int64 [E].
        values: of actions that are numbers, float64 [E]; None: they are none.
    """

    offsets: Tensor
    items: Tensor
    times: Tensor
    values: Tensor | None

    @classmethod
    def of(cls, offsets: np.ndarray, items: Values, times: Values, actions: Values | None) -> Self:
        """The arrays of a store."""
        first, item, time = (torch.from_numpy(np.array(array, dtype=np.int64)) for array in (offsets, items, times))
        values = None if actions is None else torch.from_numpy(np.array(actions, dtype=np.float64))
        return cls(first, item, time, values)

    @property
    def events(self) -> Questions:
        """All events as questions."""
        users = torch.arange(len(self.offsets) - 1).repeat_interleave(self.offsets.diff())
        return Questions(users, torch.arange(len(users)) - self.offsets[users], self.items, self.times)

    @property
    def days(self) -> Tensor:
        """int64 [E], since 1970."""
        return torch.div(self.times, DAY_S, rounding_mode="floor")


def learn_from(store: SequenceStore, places: np.ndarray | None = None) -> RunningStatistics:
    """The running statistics of a store that was made with them, from all its events.

    ``places``: what stands for each item code, ascending; None: the code.
    """
    has_values = WITH_VALUES[0] in store.running_statistics
    actions = store.sequence(str(store.action_feature)) if has_values else None
    times = store.sequence(str(store.timestamp_feature))
    items = store.sequence(store.item_feature)
    return learn(Log.of(store.offsets(), items if places is None else places[np.asarray(items)], times, actions))


def write_running(build: Build, offsets: np.ndarray, requests: Requests | None) -> None:
    """Write the running statistics of all events and candidates as features."""
    schema, writer = build.schema, build.writer
    if schema.timestamp is None:
        raise ConfigError(
            "--running_statistics: they are of what was known at a time, and the data has no times; give --time"
        )
    log = Log.of(offsets, writer.written(schema.item), writer.written(schema.timestamp), _numbers(build))
    names = names_of(log.values is not None)
    if clash := [name for name in names if name in (*schema.of_events().values(), *schema.item_features)]:
        raise ConfigError(f"--running_statistics makes {', '.join(clash)}, and the data has columns of these names")
    writer.running_statistics = names
    length, asked = len(log.items), None
    if requests is not None:
        items = torch.from_numpy(writer.written(schema.item, of_candidates=True).astype(np.int64))
        each = (requests.users, requests.history_ends - offsets[requests.users], requests.times)
        users, places, times = (torch.from_numpy(np.repeat(values, requests.sizes)) for values in each)
        asked = Questions(users, places, items, times)
    arrays = [writer.create_sequence(name, "event_number", cardinality=None, length=length) for name in names]
    shown = [writer.create_candidates(name) for name in names] if asked else []

    def fill() -> None:
        statistics = learn(log)
        for targets, questions in ((arrays, log.events), (shown, asked)):
            for places, found in answers(statistics, log, questions) if questions else ():
                for target, values in zip(targets, found.T, strict=True):
                    target[places] = values
        for array in (*arrays, *shown):
            array.flush()

    build.once("running statistics", fill)


def _numbers(build: Build) -> np.ndarray | None:
    """The actions, if they are numbers of which some differ, such as stars: neither texts nor bits."""
    action, name = build.schema.action, resolve_name(build.options.name)
    if not action or labels(build):
        return None
    actions = build.writer.written(action)
    return actions if np.ptp(actions) and not (name and DATASETS[name].action_bits) else None


def learn(log: Log) -> RunningStatistics:
    """The statistics of all events of a log. What they say of a day depends on earlier days only, to the bit."""
    values = torch.ones(len(log.items), dtype=torch.float64) if log.values is None else log.values
    tables = _cells(log.items, log.days, values)
    every = _cells(torch.zeros_like(log.items), log.days, values)
    tables |= {"days": every["cells"], "day_sums": every["sums"]}  # of one item, 0, whose keys are the days
    if log.values is not None:
        tables |= _fits(log, tables["days"], tables["day_sums"][:, 0])
    return RunningStatistics(tables)


def answers(statistics: RunningStatistics, log: Log, asked: Questions) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (places [n], float32 [n, len(statistics.names)]) until each question, user after user, has its answer."""
    lengths = log.offsets.diff()
    bounds = torch.searchsorted(asked.rows, torch.arange(len(lengths) + 1))
    order = lengths.argsort(stable=True)
    while len(order):
        most = torch.arange(1, len(order) + 1) * lengths[order]
        users, order = order.tensor_split([max(int((most <= _PLACES_AT_ONCE).sum()), 1)])
        place = torch.arange(int(lengths[users[-1]]))
        events = (log.offsets[users, None] + place).clamp(max=len(log.items) - 1)
        values = torch.ones_like(events) if log.values is None else log.values[events]
        history = log.items[events], values, log.times[events]
        counts = (bounds[users + 1] - bounds[users]).numpy()
        here = torch.from_numpy(ranges(bounds[users].numpy(), counts))
        rows = torch.arange(len(users)).repeat_interleave(torch.from_numpy(counts))
        mine = Questions(rows, *(each[here] for each in (asked.places, asked.items, asked.times)))
        yield here.numpy(), statistics.numbers(*history, mine).numpy()


def _cells(items: Tensor, days: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Count, sum and sum of squares of each item's values up to each of its days. Later days change no bit."""
    each = pd.DataFrame({"item": items, "day": days, "count": 1.0, "sum": values, "squares": values**2})
    sums = each.groupby(["item", "day"]).sum().groupby("item").cumsum()
    item, day = (torch.tensor(sums.index.get_level_values(level).to_numpy()) for level in (0, 1))
    return {"cells": keys_of(item, day), "sums": torch.tensor(sums.to_numpy())}


def _fits(log: Log, days: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Factor models. ``days``: days since 1970, ascending; ``counts``: events up to the end of each."""
    of_event, model, last = log.days, _Factors(int(log.items.max()) + 1), 0
    nothing = torch.zeros(1, 2 * (1 + NUM_FACTORS), dtype=torch.float64)
    fits, fitted, factors, priors, noise = [_NEVER], [torch.tensor([-1])], [nothing], [nothing], [torch.inf]
    for day, count in zip(days.tolist(), counts.tolist(), strict=True):
        if count < max(_FIRST_FIT, _GROWTH * last):
            continue
        oldest = days[int((counts <= count - _NEWEST).sum())]
        recent = ((oldest <= of_event) & (of_event <= day)).nonzero().squeeze(1)
        items, found = model.learn(log, recent, _LATER_ROUNDS if last else _ROUNDS)
        fitted.append(keys_of(items, torch.tensor(len(fits))))
        factors.append(found)
        priors.append(torch.cat([model.prior, model.prior_covariance.diagonal()])[None])
        noise.append(model.noise)
        fits.append(day + 1)
        last = count
    keys = torch.cat(fitted)
    order = keys.argsort()
    return {
        "fits": torch.tensor(fits, dtype=torch.int64),
        "fitted": keys[order],
        "factors": torch.cat(factors)[order],
        "priors": torch.cat(priors),
        "noise": torch.tensor(noise, dtype=torch.float64),
    }


class _Factors:
    """A probabilistic factor model (variational Bayes): a value is c_i + w_i · z_u + noise, with z_u from N(0, 1).

    (c_i, w_i) of an item are normal with an estimated mean and covariance, so that rare items are like the average one.
    """

    def __init__(self, num_items: int) -> None:
        width = 1 + NUM_FACTORS
        self.mean = torch.full((num_items, width), torch.nan, dtype=torch.float64)
        """Of (c_i, w_i), by item code; NaN before the item's first fit."""
        self.prior = torch.zeros(width, dtype=torch.float64)
        self.prior_covariance = 0.1 * torch.eye(width, dtype=torch.float64)
        self.noise = 0.0

    def learn(self, log: Log, events: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
        """Estimate from these events, ascending, [n], beginning with the last estimate.

        Returns their items, ascending, int64 [J], and means and variances of these, float64 [J, 2 + 2 k].
        """
        assert log.values is not None
        user = torch.unique_consecutive(torch.searchsorted(log.offsets, events, right=True), return_inverse=True)[1]
        items, item = torch.unique(log.items[events], return_inverse=True)
        value = log.values[events]
        centre = value.mean()
        value = value - centre
        mean, number, width = self.mean[items], len(items), 1 + NUM_FACTORS
        mean[:, 0] -= centre
        if self.noise == 0:
            mean = 0.1 * torch.randn(number, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            mean[:, 1] += 0.4  # the first factor is how high the user rates everything
            self.noise = float(value.var())
        else:
            self.prior[0] -= centre
            mean = torch.where(mean.isnan(), self.prior, mean)
        covariance = torch.zeros(number, width, width, dtype=torch.float64)
        chunks = list(_chunks(user, item, value, number))
        for _ in range(rounds):
            moments = mean[:, :, None] * mean[:, None, :] + covariance
            grams, sides = torch.zeros_like(moments), torch.zeros_like(mean)
            for chunk in chunks:
                known, squares = chunk.users(mean, moments, self.noise)
                grams += chunk.to_items(squares.flatten(1)).view(-1, width, width)
                sides += chunk.to_items(known, chunk.value)
            precision = torch.linalg.inv(self.prior_covariance)
            covariance = torch.linalg.inv(grams / self.noise + precision)
            mean = torch.einsum("ikl,il->ik", covariance, sides / self.noise + precision @ self.prior)
            above = mean - self.prior
            self.prior_covariance = above.T @ above / number + covariance.mean(0)
            self.prior = mean.mean(0)
            moments = mean[:, :, None] * mean[:, None, :] + covariance
            explained = (moments * grams).sum() - 2 * (mean * sides).sum()
            self.noise = float((value.square().sum() + explained) / len(events))
        mean[:, 0] += centre
        self.prior[0] += centre
        self.mean[items] = mean
        return items, torch.cat([mean, covariance.diagonal(dim1=1, dim2=2)], dim=1)


@dataclass(frozen=True)
class _Chunk:
    """The events of some users, n in all, one user after another: user and item by their places in the fit."""

    user: Tensor
    item: Tensor
    value: Tensor
    num_items: int

    def users(self, mean: Tensor, moments: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        """Expected (1, z_u), [U, 1 + k], and its square, [U, 1 + k, 1 + k], from those of the items."""
        first = torch.searchsorted(self.user, torch.arange(int(self.user[-1]) + 1))
        width = mean.shape[1]
        grams = embedding_bag(self.item, moments.flatten(1), first, mode="sum").view(-1, width, width)
        sides = embedding_bag(self.item, mean, first, mode="sum", per_sample_weights=self.value) - grams[:, :, 0]
        spread = torch.linalg.inv(grams[:, 1:, 1:] / noise + torch.eye(width - 1, dtype=torch.float64))
        found = torch.einsum("ukl,ul->uk", spread, sides[:, 1:] / noise)
        known = torch.cat([torch.ones(len(found), 1, dtype=torch.float64), found], dim=1)
        squares = known[:, :, None] * known[:, None, :]
        squares[:, 1:, 1:] += spread
        return known, squares

    def to_items(self, of_users: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sum of a matrix [U, …] over the users of each item, times their values if given; [num_items, …]."""
        order = self.item.argsort(stable=True)
        first = torch.searchsorted(self.item[order], torch.arange(self.num_items))
        weighted = None if weights is None else weights[order]
        return embedding_bag(self.user[order], of_users, first, mode="sum", per_sample_weights=weighted)


def _chunks(user: Tensor, item: Tensor, value: Tensor, num_items: int) -> Iterator[_Chunk]:
    for start in range(0, int(user[-1]) + 1, _USERS_AT_ONCE):
        here = slice(*torch.searchsorted(user, torch.tensor([start, start + _USERS_AT_ONCE])).tolist())
        yield _Chunk(user[here] - start, item[here], value[here], num_items)
