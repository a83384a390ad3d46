"""--running_statistics: what was known before each event, recomputed in a loop, and attacked with other futures."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hstu.base.errors import ConfigError
from hstu.data.features.running import DAY_S, WITH_VALUES, WITHOUT_VALUES
from hstu.data.preprocess.running import Log, answers, learn, learn_from
from hstu.data.store.sequence_store import SequenceStore
from tests.data.own_tables import own_store
from tests.data.preprocess.test_restart import contents

USERS, ITEMS, EVENTS, BEGIN = 90, 25, 3_500, 15_000 * DAY_S
ANY: dict[str, Any] = {"action": "a", "time": "t", "any_times": True, "running_statistics": True}


def ratings(seed: int = 0) -> pd.DataFrame:
    """Stars of users and items with two tastes, over a year; a user does nothing twice in a second."""
    draw = np.random.default_rng(seed)
    tastes, kinds = draw.normal(size=(USERS, 2)), draw.normal(size=(ITEMS, 2))
    users, items = draw.integers(0, USERS, EVENTS), draw.integers(0, ITEMS, EVENTS)
    stars = np.round(3 + (tastes[users] * kinds[items]).sum(1) + draw.normal(0, 0.5, EVENTS)).clip(1, 5).astype(int)
    times = BEGIN + draw.integers(0, 365 * DAY_S // 1800, EVENTS) * 1800  # half hours, so that sessions exist
    return pd.DataFrame({"u": users, "i": items, "a": stars, "t": times}).drop_duplicates(["u", "t"])


def stored(store: SequenceStore) -> pd.DataFrame:
    """All events with their statistics, by user and time."""
    events = {name: store.sequence(name) for name in ("a", "t", *store.running_statistics)}
    events["u"] = store.raw_ids("user_id")[np.repeat(np.arange(store.num_users), np.diff(store.offsets()))]
    events["i"] = store.raw_ids("i")[store.sequence("i")]
    return pd.DataFrame(events).set_index(["u", "t"]).sort_index()


def make(folder: Path, events: pd.DataFrame, name: str = "store", **options: Any) -> SequenceStore:
    events.to_csv(folder / f"{name}.csv", index=False)
    return own_store(folder, folder / f"{name}.csv", store=name, **(ANY | options))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SequenceStore:
    return make(tmp_path_factory.mktemp("running"), ratings())


def test_they_are_what_a_loop_over_the_events_finds(store: SequenceStore) -> None:
    found, raw = stored(store), ratings().sort_values(["u", "t"])
    drawn = found.sample(60, random_state=0)
    for user, time in drawn.index.tolist():
        row = drawn.loc[(user, time)]
        known = raw[raw.t < time // DAY_S * DAY_S]
        of_item, own = known[known.i == row.i], raw[(raw.u == user) & (raw.t < time)]
        centre = known.a.mean()
        expected = {
            "item_count": np.log1p(len(of_item)),
            "item_recent": np.log1p((of_item.t >= (time // DAY_S - 30) * DAY_S).sum()),
            "item_age": np.log1p(time // DAY_S - of_item.t.min() // DAY_S),
            "item_mean": (of_item.a.sum() + 5 * centre) / (len(of_item) + 5),
            "user_count": np.log1p(len(own)),
            "user_mean": (own.a.sum() + 3 * centre) / (len(own) + 3),
            "gap": np.log1p(time - own.t.max()),
            "days_since_first": np.log1p((time - own.t.min()) / DAY_S) if len(own) else 0,
            "in_session": np.log1p(_session(own.t.tolist(), time)),
            "in_second": 0,
        }
        above = [a - found.loc[(user, t)].item_mean for a, t in zip(own.a, own.t, strict=True)]
        expected |= {f"last_above_{back}": above[-back] if len(above) >= back else np.nan for back in (1, 2, 3)}
        expected["baseline"] = expected["item_mean"] + np.nansum(above) / (len(above) + 3)
        weights = 0.9 ** np.arange(len(above))[::-1]
        expected["recent_above_0.9"] = np.nansum(weights * above) / (weights.sum() + 1)
        np.testing.assert_allclose(row[[*expected]].astype(float), [*expected.values()], rtol=1e-5, atol=1e-5)


def _session(times: list[int], now: int) -> int:
    count = 0
    for before, after in zip(reversed(times), [now, *reversed(times)], strict=False):
        if after - before > 3600:
            break
        count += 1
    return count


def test_factors_find_the_tastes(store: SequenceStore) -> None:
    late = stored(store)
    late = late[late.index.get_level_values("t") > BEGIN + 200 * DAY_S]
    errors = {name: ((late.a - late[name]) ** 2).mean() for name in ("item_mean", "baseline", "prediction")}
    assert errors["prediction"] < 0.75 * min(errors["baseline"], errors["item_mean"]), errors
    assert np.corrcoef((late.a - late.prediction) ** 2, late.deviation**2)[0, 1] > 0


def test_no_bit_before_a_moment_depends_on_what_comes_after_it(store: SequenceStore, tmp_path: Path) -> None:
    """All users' later events are redrawn, with new users and items, whose ids come between the old ones."""
    moment, before, other = BEGIN + 250 * DAY_S + 7, ratings(), ratings(seed=1)
    other["i"] = other["i"] * 2 - 25
    later = other[other.t > moment].assign(u=lambda events: events.u * 3 - 50)
    altered = stored(make(tmp_path, pd.concat([before[before.t <= moment], later])))
    same = stored(store)
    same = same[same.index.get_level_values("t") <= moment]
    pd.testing.assert_frame_equal(altered.loc[same.index], same, check_exact=True)
    assert len(same) > 2_200 and not same.prediction.equals(same.baseline), "several fits are compared"


def test_an_appended_store_is_that_of_all_files(tmp_path: Path) -> None:
    events = ratings()
    parts = {"first": events[events.t < BEGIN + 200 * DAY_S], "second": events[events.t >= BEGIN + 200 * DAY_S]}
    for name, part in parts.items():
        part.to_csv(tmp_path / f"{name}.csv", index=False)
    files = [tmp_path / f"{name}.csv" for name in parts]
    own_store(tmp_path, files[0], **ANY)
    own_store(tmp_path, files[1], append=True, **ANY)
    assert contents(tmp_path / "store") == contents(own_store(tmp_path, files, store="at_once", **ANY).path)


def test_candidates_have_the_numbers_that_events_in_their_place_have(tmp_path: Path) -> None:
    events = ratings().sort_values("t")
    last = events.groupby("u").tail(1).index
    events.loc[last, "t"] = BEGIN + 400 * DAY_S  # one day, so that none is known of another
    expected = stored(make(tmp_path, events, name="as_events"))
    events.loc[last].assign(a=1).to_csv(tmp_path / "shown.csv", index=False)
    made = make(tmp_path, events.drop(last), requests=(tmp_path / "shown.csv",))
    users = made.raw_ids("user_id")[np.repeat(made.requests().users, made.requests().sizes)]
    rows = expected.loc[[(user, BEGIN + 400 * DAY_S) for user in users]]
    assert len(rows) == USERS
    for name in made.running_statistics:
        np.testing.assert_array_equal(made.candidates(name), rows[name].to_numpy(), err_msg=name)


def test_neither_the_size_of_chunks_nor_threads_change_them(
    store: SequenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log.of(store.offsets(), store.sequence("i"), store.sequence("t"), store.sequence("a"))
    expected = np.stack([store.sequence(name) for name in store.running_statistics], axis=1)
    monkeypatch.setattr("hstu.data.preprocess.running._PLACES_AT_ONCE", 300)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        for events, found in answers(learn_from(store), log, log.events):
            np.testing.assert_array_equal(found, expected[events])
    finally:
        torch.set_num_threads(threads)


def test_actions_that_are_no_numbers_give_counts_and_times(tmp_path: Path) -> None:
    events = ratings().head(200)
    for name, actions in (("texts", "view"), ("alike", 1)):
        found = make(tmp_path, events.assign(a=actions), name=name)
        assert found.running_statistics == WITHOUT_VALUES
    assert make(tmp_path, events, name="stars").running_statistics == (*WITHOUT_VALUES, *WITH_VALUES)


def test_few_events_have_no_factors_and_predict_the_baseline() -> None:
    times = torch.arange(6) * DAY_S
    log = Log(torch.tensor([0, 3, 6]), torch.tensor([0, 1, 0, 1, 0, 1]), times.sort().values, torch.ones(6).double())
    statistics = learn(log)
    found = torch.cat([torch.from_numpy(values) for _, values in answers(statistics, log, log.events)])
    baseline, prediction = (found[:, statistics.names.index(name)] for name in ("baseline", "prediction"))
    torch.testing.assert_close(prediction, baseline, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time": None}, "--running_statistics: .* the data has no times; give --time"),
        ({"event_columns": ("gap",)}, "--running_statistics makes gap, and the data has columns of these names"),
    ],
)
def test_data_that_cannot_have_them_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, ratings().head(50).assign(gap=1), **options)
