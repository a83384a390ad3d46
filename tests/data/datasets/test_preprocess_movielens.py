import csv
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hstu.data.datasets.spec import UNKNOWN
from hstu.data.preprocess import preprocess
from hstu.data.preprocess.report import format_report
from hstu.data.store.sequence_store import SequenceStore
from scripts.preprocess_dataset import main

COLUMNS = ["user", "item", "rating", "time"]


def read_ml_1m(directory: Path) -> pd.DataFrame:
    return pd.read_csv(directory / "ratings.dat", sep="::", engine="python", names=COLUMNS)


def assert_equals_stable_sort(store: SequenceStore, raw: pd.DataFrame) -> None:
    """The whole store against ten lines of pandas."""
    oracle = raw.sort_values(["user", "time"], kind="stable")
    lengths = oracle.groupby("user").size()
    assert store.raw_ids("user_id").tolist() == lengths.index.tolist()
    assert np.diff(store.offsets()).tolist() == lengths.tolist()
    assert (store.raw_ids("movie_id")[store.sequence("movie_id")] == oracle.item).all()
    assert (store.sequence("rating") == oracle.rating).all()
    assert (store.sequence("timestamp") == oracle.time).all()
    assert store.raw_ids("movie_id").tolist() == sorted(raw.item.unique())


def raw_context(store: SequenceStore, feature: str) -> list[str]:
    return store.raw_ids(feature)[store.context(feature)].tolist()


def test_ml_100k_is_the_stable_sort_of_its_file(ml_100k_store: SequenceStore, raw_data_dir: Path) -> None:
    raw = pd.read_csv(raw_data_dir / "ml-100k" / "u.data", sep="\t", names=COLUMNS)
    unstable = raw.iloc[::-1].sort_values(["user", "time"], kind="stable")
    assert_equals_stable_sort(ml_100k_store, raw)
    codes = ml_100k_store.encode("movie_id", unstable.item.to_numpy())
    assert (codes != ml_100k_store.sequence("movie_id")).any(), "the data has ties, so the comparison can fail"
    assert (ml_100k_store.num_users, ml_100k_store.cardinality("movie_id")) == (943, 1682)
    assert (ml_100k_store.num_events, ml_100k_store.cardinality("rating")) == (100_000, 6)
    assert "as published: users, items, events" in format_report(ml_100k_store)


def test_ml_100k_context_and_titles_are_those_of_the_user_and_movie(
    ml_100k_store: SequenceStore, raw_data_dir: Path
) -> None:
    names = ["user", "age", "sex", "occupation", "zip_code"]
    users = pd.read_csv(raw_data_dir / "ml-100k" / "u.user", sep="|", names=names, dtype=str).sort_values(
        "user", key=lambda ids: ids.astype(int)
    )
    groups = np.array(["1", "18", "25", "35", "45", "50", "56"])
    expected = groups[np.digitize(users.age.astype(int), [18, 25, 35, 45, 50, 56])]
    assert ml_100k_store.contextual_features == ("user_id", "age_group", "sex", "occupation", "zip_code")
    assert raw_context(ml_100k_store, "age_group") == expected.tolist()
    for feature in ("sex", "occupation", "zip_code"):
        assert raw_context(ml_100k_store, feature) == users[feature].tolist()
    assert ml_100k_store.context("user_id").tolist() == list(range(943))
    titles = ml_100k_store.titles()
    assert titles is not None
    assert titles[ml_100k_store.encode("movie_id", [1, 543])].tolist() == ["Toy Story (1995)", "Misérables, Les (1995)"]


def test_ml_100k_movies_have_year_and_genres(ml_100k_store: SequenceStore) -> None:
    """Movie 267 is called unknown and has no year; 1373 has the genre "unknown"."""
    assert ml_100k_store.item_side_features == ("year", "genres")
    found = features_of_movies(ml_100k_store, [1, 127, 267, 1373])
    assert found[1] == ("1995", ["Animation", "Children's", "Comedy"])
    assert found[127] == ("1972", ["Action", "Crime", "Drama"])
    assert found[267] == (UNKNOWN, [UNKNOWN]) and found[1373][1] == [UNKNOWN]
    assert (ml_100k_store.cardinality("year"), ml_100k_store.cardinality("genres")) == (72, 19)


def features_of_movies(store: SequenceStore, movies: list[int]) -> dict[int, tuple[str, list[str]]]:
    years, _ = store.item_values("year")
    genres, offsets = store.item_values("genres")
    assert offsets is not None
    return {
        movie: (
            store.raw_ids("year")[years[code]],
            store.raw_ids("genres")[genres[offsets[code] : offsets[code + 1]]].tolist(),
        )
        for movie, code in zip(movies, store.encode("movie_id", np.array(movies)), strict=True)
    }


def test_without_the_file_of_movies_there_are_no_features_of_items(raw_data_dir: Path, tmp_path: Path) -> None:
    for name in ("ratings.dat", "users.dat"):
        lines = (raw_data_dir / "ml-1m" / name).read_bytes().splitlines(keepends=True)[:500]
        (tmp_path / name).write_bytes(b"".join(lines))
    store = SequenceStore.open(preprocess("ml-1m", raw_path=tmp_path, output=tmp_path / "store"))
    assert store.item_side_features == ()


def test_ml_1m_keeps_the_users_that_rated_and_reports_what_is_missing(raw_data_dir: Path, tmp_path: Path) -> None:
    raw = read_ml_1m(raw_data_dir / "ml-1m")
    store = SequenceStore.open(preprocess("MovieLens-1M", raw_path=raw_data_dir / "ml-1m", output=tmp_path / "s"))
    assert_equals_stable_sort(store, raw)
    assert (store.num_users, store.num_events) == (2_999, 487_650)
    assert store.contextual_features == ("user_id", "sex", "age_group", "occupation", "zip_code")
    assert raw_context(store, "zip_code")[:2] == ["48067", "70072"]
    assert raw_context(store, "age_group")[:3] == ["1", "56", "25"]
    titles = store.titles()
    assert (
        titles is not None and titles[store.encode("movie_id", [1193])[0]] == "One Flew Over the Cuckoo's Nest (1975)"
    )
    report = format_report(store)
    assert "NOT the published statistics: users 2,999 instead of 6,040; " in report and ". Not the complete" in report
    found = features_of_movies(store, [1193, 1196])
    assert found[1193] == ("1975", ["Drama"]) and found[1196][1] == ["Action", "Adventure", "Drama", "Sci-Fi", "War"]


def test_ml_20m_ratings_are_doubled(raw_data_dir: Path, tmp_path: Path) -> None:
    """Real ratings of ML-1M, some of them less a half, in ML-20M's files."""
    raw = read_ml_1m(raw_data_dir / "ml-1m").head(12_000)
    raw["rating"] = raw.rating - 0.5 * (raw.item % 2)
    raw.to_csv(tmp_path / "ratings.csv", index=False, header=["userId", "movieId", "rating", "timestamp"])
    with (tmp_path / "movies.csv").open("w", newline="") as file:
        genres = ("Drama", "War|Drama", "(no genres listed)")
        years = (" (1990)", " (2007-2011)", "")
        rows = ([movie, f'Movie, "the" {movie}{years[movie % 3]}', genres[movie % 3]] for movie in raw.item.unique())
        csv.writer(file).writerows([["movieId", "title", "genres"], *rows])
    store = SequenceStore.open(preprocess("ml-20m", raw_path=tmp_path, output=tmp_path / "store"))
    assert_equals_stable_sort(store, raw.assign(rating=(2 * raw.rating).astype(int)))
    assert store.cardinality("rating") == 11
    assert store.contextual_features == ("user_id",)
    titles = store.titles()
    assert store.raw_ids("movie_id")[:3].tolist() == [1, 2, 3]
    assert titles is not None and titles[1] == 'Movie, "the" 2'
    expected = {1: ("2007", ["War", "Drama"]), 2: (UNKNOWN, [UNKNOWN]), 3: ("1990", ["Drama"])}
    assert features_of_movies(store, [1, 2, 3]) == expected


def test_recbole_files_give_the_same_store(ml_100k_store: SequenceStore, raw_data_dir: Path, tmp_path: Path) -> None:
    """The real data rewritten in RecBole's atomic format; that the package's copy is the same: test_download.py."""
    raw = raw_data_dir / "ml-100k"
    (tmp_path / "ml-100k.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + (raw / "u.data").read_text()
    )
    (tmp_path / "ml-100k.user").write_text(
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        + (raw / "u.user").read_text().replace("|", "\t")
    )
    movies = [line.split("|") for line in (raw / "u.item").read_text(encoding="latin-1").splitlines()]
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    names = [line.partition("|")[0] for line in (raw / "u.genre").read_text().splitlines() if line]
    classes = [" ".join(name for name, flag in zip(names, movie[5:], strict=True) if flag == "1") for movie in movies]
    cut = [re.fullmatch(r"(.*?)(?: \((\d{4})\))?", movie[1].strip()) for movie in movies]
    (tmp_path / "ml-100k.item").write_text(
        header + "".join(
            f"{movie[0]}\t{m[1]}\t{m[2] or ''}\t{genres}\n"
            for movie, m, genres in zip(movies, cut, classes, strict=True) if m
        ), encoding="utf-8"
    )  # fmt: skip
    store = SequenceStore.open(preprocess("ml-100k", raw_path=tmp_path, output=tmp_path / "store"))
    for name, feature in store.features.items():
        get = {"context": SequenceStore.context, "item_feature": lambda store, name: store.item_values(name)[0]}.get(
            feature.role, SequenceStore.sequence
        )
        assert (get(store, name) == get(ml_100k_store, name)).all(), name
        assert (store.raw_ids(name) == ml_100k_store.raw_ids(name)).all() if feature.has_vocab else True
    titles, expected = store.titles(), ml_100k_store.titles()
    assert titles is not None and expected is not None and (titles == expected).all()


def test_sources_and_statistics_are_recorded(ml_100k_store: SequenceStore) -> None:
    assert set(ml_100k_store.sources) == {"u.data", "u.user", "u.item"}
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in ml_100k_store.sources.values())
    statistics = ml_100k_store.statistics
    assert (statistics["length_max"], statistics["length_min"], statistics["length_median"]) == (737, 20, 65)
    assert statistics["sparsity"] == pytest.approx(1 - 100_000 / (943 * 1682))


def test_commands_that_mean_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dataset_name", "ml-2m"]) == main(["--dataset_name", "ml-1m", "--user", "u"]) == 2
    unknown, useless = capsys.readouterr().err.splitlines()
    assert "is not built in" in unknown and "only with --interactions" in useless
