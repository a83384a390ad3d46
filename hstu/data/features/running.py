"""Statistics of an event, from what was known before it: of its item over all users, and of its user.

What is known of items is as of the midnight (UTC) before the event, so that a service can compute the same numbers from
tables that it gets once a day. What is known of the user are all earlier events. Exports contain this file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DAY_S = 86_400
WITHOUT_VALUES = (
    "item_count", "item_recent", "item_age", "user_count", "gap", "days_since_first", "in_session", "in_second",
)  # fmt: skip
DECAYS = (0.7, 0.9, 0.97)
"""What each further event leaves of the weight of the earlier ones, in recent_above and surprise."""
WITH_VALUES = (
    "item_mean", "item_std", "user_mean", "user_above", "user_std", "user_choice", "last_above_1", "last_above_2",
    "last_above_3", "baseline", *(f"recent_above_{decay}" for decay in DECAYS), "prediction", "deviation",
    *(f"surprise_{decay}" for decay in DECAYS), "last_surprise", "user_error",
)  # fmt: skip
"""Further statistics, where actions are numbers such as stars."""
NUM_FACTORS, OF_FACTORS = 12, ("weights", "unsure", "noise")
_RECENT_DAYS, _SESSION_GAP_S, _SPAN = 30, 3600, 1 << 20
_ITEM_PRIOR, _USER_PRIOR = 5.0, 3.0
"""Means are shrunk as if there were so many more events, at the mean of all."""
_MEMORY = 0.998
"""Share of a user's factors that each event keeps."""


def names_of(has_values: bool) -> tuple[str, ...]:
    """The statistics in the order of their columns."""
    return (*WITHOUT_VALUES, *(WITH_VALUES if has_values else ()))


@dataclass(frozen=True)
class Questions:
    """Events or candidates, n in all, whose statistics are asked for."""

    rows: Tensor
    """Their users: rows of the histories, int64 [n]."""
    places: Tensor
    """Number of the user's earlier events, int64 [n]."""
    items: Tensor
    """Item codes, int64 [n]; -1 for an unknown item."""
    times: Tensor
    """Seconds, int64 [n]."""


class RunningStatistics:
    """Computes statistics from the tables that hstu/data/preprocess/running.py makes of all events.

    Args:
        tables: "cells", int64 [C]: keys of (item, day) with events, ascending; "sums", float64 [C, 3]: count, sum and
            sum of squares of the item's values up to this day; "days" [D] and "day_sums" [D, 3]: the same of all items.
            With values also "fits", int64 [F]: days of factor models; "fitted", int64 [R]: keys of (item, fit);
            "factors", float64 [R, 2 + 2 NUM_FACTORS]: means of the item's constant and weights, then variances;
            "priors" [F, …]: the same of items that a fit does not know; "noise", float64 [F]. Fit 0 stands for the days
            before the first: it knows nothing, and its noise is infinite.
    """

    def __init__(self, tables: Mapping[str, Tensor]) -> None:
        self.tables = tables
        self.has_values = "fits" in tables
        self.names = names_of(self.has_values)

    def numbers(self, items: Tensor, values: Tensor, times: Tensor, asked: Questions) -> Tensor:
        """The statistics of ``asked``, float32 [n, len(names)], NaN where there is none.

        ``items``, ``values``, ``times``: U histories, oldest first, [U, L] each, with any padding at their ends.
        """
        users, length = items.shape
        facts = {
            name: x.view(users, length, *x.shape[1:])
            for name, x in self._of_items(items.flatten(), times.flatten()).items()
        }
        here = self._of_items(asked.items, asked.times)
        at = (asked.rows, asked.places)
        found = {name: here[name] for name in ("item_count", "item_recent", "item_age")}
        found |= _of_times(times, *at, asked.times)
        if self.has_values:
            found |= self._of_values(values.double(), facts, here, at)
        return torch.stack([found[name] for name in self.names], dim=1).float()

    def _of_items(self, items: Tensor, times: Tensor) -> dict[str, Tensor]:
        """What was known of items at the midnight before these times; the values are [n], or [n, 1 + NUM_FACTORS]."""
        tables, days = self.tables, torch.div(times, DAY_S, rounding_mode="floor")
        sums, first = _before(tables["cells"], tables["sums"], items, days)
        older, _ = _before(tables["cells"], tables["sums"], items, days - _RECENT_DAYS)
        overall, _ = _before(tables["days"], tables["day_sums"], torch.zeros_like(days), days)
        found = {
            "item_count": sums[:, 0].log1p(),
            "item_recent": (sums[:, 0] - older[:, 0]).log1p(),
            "item_age": torch.where(first < 0, torch.nan, (days - first).double()).log1p(),
        }
        if not self.has_values:
            return found
        centre = overall[:, 1] / overall[:, 0]
        spread = overall[:, 2] / overall[:, 0] - centre**2
        mean = (sums[:, 1] + _ITEM_PRIOR * centre) / (sums[:, 0] + _ITEM_PRIOR)
        around = sums[:, 2] - 2 * mean * sums[:, 1] + mean**2 * sums[:, 0]
        deviation = ((around + _ITEM_PRIOR * spread) / (sums[:, 0] + _ITEM_PRIOR)).clamp(min=0).sqrt()
        found |= {"item_mean": mean, "item_std": deviation, "centre": centre, "spread": spread}
        fit = torch.searchsorted(tables["fits"], days, right=True) - 1
        wanted = keys_of(items, fit)
        row = torch.searchsorted(tables["fitted"], wanted).clamp(max=len(tables["fitted"]) - 1)
        is_fitted = tables["fitted"][row] == wanted
        factors = torch.where(is_fitted[:, None], tables["factors"][row], tables["priors"][fit])
        weights, unsure = factors.chunk(2, dim=1)
        return found | {"weights": weights, "unsure": unsure, "noise": tables["noise"][fit]}

    def _of_values(
        self, values: Tensor, facts: Mapping[str, Tensor], here: Mapping[str, Tensor], at: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """Running statistics of the values of the users, at rows and places ``at``."""
        above = (values - facts["item_mean"]).nan_to_num(0)
        count = torch.arange(values.shape[1] + 1, dtype=torch.float64)
        offset = _sums_before(above) / (count + _USER_PRIOR)

        def mean_with(sums: Tensor, prior: Tensor) -> Tensor:
            return (sums[at] + _USER_PRIOR * prior) / (count[at[1]] + _USER_PRIOR)

        own_mean = (_sums_before(values)[:, :-1] + _USER_PRIOR * facts["centre"]) / (count[:-1] + _USER_PRIOR)
        squares = _sums_before((values - own_mean).nan_to_num(0) ** 2)
        found = {
            "item_mean": here["item_mean"],
            "item_std": here["item_std"],
            "user_mean": mean_with(_sums_before(values), here["centre"]),
            "user_above": offset[at],
            "user_std": mean_with(squares, here["spread"]).sqrt(),
            "user_choice": mean_with(
                _sums_before((facts["item_mean"] - facts["centre"]).nan_to_num(0)), torch.zeros(())
            ),
            "baseline": here["item_mean"] + offset[at],
        }
        padded = torch.nn.functional.pad(above, (3, 1), value=torch.nan)
        found |= {f"last_above_{back}": padded[at[0], at[1] + 3 - back] for back in (1, 2, 3)}
        state, spread, error = _filtered(values, facts, facts["item_mean"] + offset[:, :-1])
        prediction, variance, _ = _predicted(state[at], spread[at], [here[name] for name in OF_FACTORS])
        is_fitted = here["noise"].isfinite()
        found["prediction"] = torch.where(is_fitted, prediction, found["baseline"])
        found["deviation"] = torch.where(is_fitted, variance.sqrt(), here["item_std"])
        decays = torch.tensor(DECAYS * 2, dtype=torch.float64)
        recent = _recent_means(torch.stack([above] * len(DECAYS) + [error] * len(DECAYS), dim=2), decays)[at]
        names = [f"{name}_{decay}" for name in ("recent_above", "surprise") for decay in DECAYS]
        found |= dict(zip(names, recent.T, strict=True))
        found["last_surprise"] = torch.nn.functional.pad(error, (1, 0), value=torch.nan)[at]
        found["user_error"] = mean_with(_sums_before(error**2), here["spread"]).sqrt()
        return found


def _before(keys: Tensor, sums: Tensor, items: Tensor, days: Tensor) -> tuple[Tensor, Tensor]:
    """(count, sum, sum of squares [n, 3] of ``items`` before ``days``; the item's first day [n], -1 if none)."""
    wanted = keys_of(items, days)
    last = torch.searchsorted(keys, wanted) - 1
    first = torch.searchsorted(keys, items * _SPAN)
    has_any = (items >= 0) & (last >= first)
    last, first = last.clamp(min=0), first.clamp(max=len(keys) - 1)
    return sums[last] * has_any[:, None], torch.where(has_any, keys[first] % _SPAN, -1)


def keys_of(groups: Tensor, members: Tensor) -> Tensor:
    """One key for each pair, int64 [n]: of an item and a day, or of an item and a fit."""
    return groups * _SPAN + members.clamp(0, _SPAN - 1)


def _sums_before(values: Tensor) -> Tensor:
    """Sums of the earlier values of each row, [U, L] → [U, L + 1]."""
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))


def _recent_means(values: Tensor, decays: Tensor) -> Tensor:
    """Means of the earlier values of each row, weighted by decay^(events since), shrunk to 0.

    ``values``: [U, L, S], with one of the ``decays`` [S] per series. Returns [U, L + 1, S].
    """
    total, weight = torch.zeros_like(values[:, :0].sum(1)), torch.zeros_like(decays)
    found = [total]
    for value in values.unbind(1):
        total, weight = decays * total + value, decays * weight + 1
        found.append(total / (weight + 1))
    return torch.stack(found, dim=1)


def _of_times(times: Tensor, rows: Tensor, places: Tensor, now: Tensor) -> dict[str, Tensor]:
    """Statistics of the questions from the times of their users alone; ``now``: times of the questions, [n]."""
    if not times.shape[1]:
        times = times.new_zeros(len(times), 1)
    is_first, last = places == 0, times[rows, (places - 1).clamp(min=0)]
    gap = now - last
    index = torch.arange(times.shape[1])

    def run(longest_gap_s: int) -> Tensor:
        """Events of the user before the question without a longer gap between them, or before it."""
        starts = torch.nn.functional.pad(times.diff(dim=1) > longest_gap_s, (1, 0), value=True)
        count = index + 1 - torch.where(starts, index, 0).cummax(1).values
        return torch.where(is_first | (gap > longest_gap_s), 0, count[rows, (places - 1).clamp(min=0)]).double().log1p()

    return {
        "user_count": places.double().log1p(),
        "gap": torch.where(is_first, torch.nan, gap.clamp(min=0).double().log1p()),
        "days_since_first": torch.where(is_first, 0.0, ((now - times[rows, 0]).clamp(min=0) / DAY_S).double()).log1p(),
        "in_session": run(_SESSION_GAP_S),
        "in_second": run(0),
    }


def _predicted(state: Tensor, spread: Tensor, of_item: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(expected value [n], its variance [n], its covariance with the factors [n, k]) for users whose factors have this
    mean [n, k] and covariance [n, k, k], and items with these means and variances [n, 1 + k] and noise [n]."""
    weights, unsure, noise = of_item
    covered = (spread * weights[:, None, 1:]).sum(2)
    squares = state * state + spread.diagonal(dim1=1, dim2=2)
    variance = (weights[:, 1:] * covered + unsure[:, 1:] * squares).sum(1) + noise + unsure[:, 0]
    return weights[:, 0] + (weights[:, 1:] * state).sum(1), variance, covered


def _filtered(values: Tensor, facts: Mapping[str, Tensor], expected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Kalman filter of each user's factors.

    Returns their means [U, L + 1, k] and covariances [U, L + 1, k, k] before each event, and how far each event's value
    was above its prediction, [U, L]. Before the first fit, factors stay, and ``expected`` [U, L] is the prediction.
    """
    eye = torch.eye(NUM_FACTORS, dtype=torch.float64)
    states, spreads = [torch.zeros(len(values), NUM_FACTORS, dtype=torch.float64)], [eye.repeat(len(values), 1, 1)]
    errors = [values[:, :0].sum(1)]
    each = zip(values.unbind(1), expected.unbind(1), *(facts[name].unbind(1) for name in OF_FACTORS), strict=True)
    for value, otherwise, *item in each:
        z, p = states[-1], spreads[-1]
        prediction, variance, covered = _predicted(z, p, item)
        errors.append((value - torch.where(item[-1].isfinite(), prediction, otherwise)).nan_to_num(0))
        gain = covered / variance[:, None]  # 0 before the first fit, whose noise is infinite
        states.append(_MEMORY * (z + gain * errors[-1][:, None]))
        spreads.append(_MEMORY**2 * (p - gain[:, :, None] * covered[:, None, :]) + (1 - _MEMORY**2) * eye)
    return torch.stack(states, dim=1), torch.stack(spreads, dim=1), torch.stack(errors, dim=1)[:, 1:]
