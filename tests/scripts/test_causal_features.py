"""Causal features of ratings: nothing of a rating, of later ones or of held-out users is in them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hstu.data.preprocess import InteractionColumns, import_interactions
from hstu.data.store.sequence_store import SequenceStore
from scripts.quality import factor_model
from scripts.quality.causal_features import Columns, causal_features, main
from scripts.quality.ratings import Ratings

SEED = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SequenceStore:
    """Ratings of 40 users with genres and years of the films, made from a table."""
    folder = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(1)
    rows = ["user,film,stars,at"]
    for user in range(40):
        taste = rng.normal(size=2)
        for place, film in enumerate(rng.permutation(30)[: rng.integers(5, 20)]):
            stars = np.clip(np.rint(3.3 + taste[film % 2] + rng.normal(0, 0.7)), 1, 5)
            rows.append(f"{100 + user},{film},{int(stars)},{1000 * user + 1800 * (place // 2)}")
    (folder / "events.csv").write_text("\n".join(rows) + "\n")
    films = [f"{film},{1950 + film},{'odd|all' if film % 2 else 'all'}" for film in range(30)]
    (folder / "films.csv").write_text("film,year,genres\n" + "\n".join(films) + "\n")
    columns = InteractionColumns(
        interactions=folder / "events.csv", user="user", item="film", action="stars", time="at",
        items=folder / "films.csv", item_columns=("year", "genres"), lists={"genres": "|"},
    )  # fmt: skip
    return SequenceStore.open(import_interactions("films", columns, output=folder / "films"))


def of_run(store: SequenceStore) -> Ratings:
    """The ratings, with the split of a run."""
    return Ratings.of(store, SEED, train_fraction=0.7, num_folds=3)


@pytest.fixture(scope="module")
def features(store: SequenceStore) -> Columns:
    """The features of the ratings as they are."""
    return causal_features(store, of_run(store))


def changed(ratings: Ratings, event: int) -> Ratings:
    """The same ratings, but for one."""
    rating = ratings.rating.copy()
    rating[event] = 6 - rating[event] if rating[event] != 3 else 5
    return replace(ratings, rating=rating)


@pytest.mark.parametrize("of_held_out_user", [False, True])
def test_a_rating_changes_later_features_alone_and_held_out_ones_no_other_user(
    store: SequenceStore, features: Columns, of_held_out_user: bool
) -> None:
    ratings = of_run(store)
    user = np.flatnonzero((ratings.fold == ratings.held_out) == of_held_out_user)[1]
    event = ratings.offsets[user] + 3
    after = causal_features(store, changed(ratings, event))
    own, others_change = ratings.user == user, False
    for name, values in features.items():
        same = (values == after[name]) | (np.isnan(values) & np.isnan(after[name]))
        assert same[ratings.offsets[user] : event + 1].all(), name
        others_change |= not same[~own].all()
    assert others_change != of_held_out_user
    for name in ("user_mean", "recent_offset_0.7", "last_rating_1", "knn", "factor_prediction", "genres_offset"):
        assert features[name][event + 1] != after[name][event + 1], name


def test_a_prediction_is_that_of_the_posterior_given_the_earlier_ratings(store: SequenceStore) -> None:
    ratings = of_run(store)
    training = np.flatnonzero(ratings.fold != ratings.held_out)
    fitted = factor_model.fit(ratings, training, num_factors=3, rounds=10)
    known = replace(fitted, covariance=np.zeros_like(fitted.covariance))  # then the filter is exact
    users = np.array([4, 0, 7])
    found = factor_model.predict_online(known, ratings, users)
    events = ratings.events_of(users)
    for place, event in enumerate(events):
        before = np.arange(ratings.offsets[ratings.user[event]], event)
        loadings = known.mean[ratings.item[before], 1:]
        spread = np.linalg.inv(np.eye(3) + loadings.T @ loadings / known.noise)
        factors = spread @ loadings.T @ (ratings.rating[before] - known.mean[ratings.item[before], 0]) / known.noise
        own = known.mean[ratings.item[event]]
        np.testing.assert_allclose(found.prediction[place], own[0] + own[1:] @ factors)
        np.testing.assert_allclose(found.deviation[place] ** 2, own[1:] @ spread @ own[1:] + known.noise)


def test_factors_predict_better_than_the_means_of_items(store: SequenceStore, features: Columns) -> None:
    ratings = of_run(store)
    late = (ratings.fold[ratings.user] == ratings.held_out) & (ratings.place > 4)

    def error(name: str) -> float:
        return float(np.mean((features[name] - ratings.rating)[late] ** 2))

    assert error("factor_prediction") < 0.8 * error("baseline")
    assert error("knn") < error("baseline")


@pytest.mark.slow
def test_the_command_makes_a_store_with_the_features_as_numbers(
    store: SequenceStore, features: Columns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "numbers"
    assert main(["--store", str(store.path), "--output", str(made), "--seed", str(SEED), "--folds", "3"]) == 0
    assert "488 ratings with 54 numbers each" in capsys.readouterr().out
    numbers = SequenceStore.open(made)
    assert numbers.event_number_features == tuple(features)
    for name in (store.item_feature, "stars", "at"):
        assert (numbers.sequence(name) == store.sequence(name)).all()
    for name, values in features.items():
        np.testing.assert_array_equal(numbers.sequence(name), values.astype(np.float32))
    assert numbers.item_side_features == store.item_side_features
