"""MovieLens 100K, 1M and 20M, and 100K as RecBole's atomic files.

Formats: the README of each GroupLens archive. RecBole's atomic files are tab separated with ``name:type`` headers.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hstu.base.errors import DataError
from hstu.data.datasets.raw import RawFile, rating_and_time, table_with_header
from hstu.data.datasets.spec import (
    UNKNOWN,
    USER_FEATURE,
    Archive,
    ColumnDescription,
    DatasetSpec,
    RawFormat,
    RawTables,
    Schema,
    WheelFiles,
)

ALIASES = {"movielens": "ml"}
"""Other spellings of the family's name → the one in the datasets' names."""

_ParseMovies = Callable[[Iterator[str]], Iterator[list[str]]]
"""Lines of a file of movies → its rows: movie, title, and then its genres."""
_GENRES_100K = (
    UNKNOWN, "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
"""What the flags at the end of a line of u.item mean; u.genre of the archive lists them."""
_NO_GENRES = "(no genres listed)"
_YEAR = re.compile(r"\((\d{4})(?:[-–]\d{0,4})?\)")
"""The year in a title, such as "Toy Story (1995)"; of a series, the first."""
_RATINGS = {"user": "BIGINT", "item": "BIGINT", "rating": "DOUBLE", "time": "BIGINT"}
_USERS_100K = {"user": "BIGINT", "age": "INTEGER", **dict.fromkeys(("sex", "occupation", "zip_code"), "VARCHAR")}
_USERS_1M = {"user": "BIGINT", **dict.fromkeys(("sex", "age_group", "occupation", "zip_code"), "VARCHAR")}
_CONTEXT_1M = '"user", sex AS c0, age_group AS c1, occupation AS c2, zip_code AS c3'
_AGE_GROUP = """CASE WHEN age < 18 THEN '1' WHEN age < 25 THEN '18' WHEN age < 35 THEN '25' WHEN age < 45 THEN '35'
    WHEN age < 50 THEN '45' WHEN age < 56 THEN '50' WHEN age >= 56 THEN '56' END"""
"""The age groups of MovieLens 1M, each named by its lowest age, from an age in years."""
_CONTEXT_100K = f'"user", {_AGE_GROUP} AS c0, sex AS c1, occupation AS c2, zip_code AS c3'
_DESCRIPTIONS = {
    "user": ColumnDescription("user", "an integer"),
    "item": ColumnDescription("movie", "an integer"),
    "action": ColumnDescription("rating", "1 to 5"),
    "time": ColumnDescription("timestamp", "seconds since 1970"),
}


def read_100k(files: Sequence[Path]) -> RawTables:
    """u.data (tab), u.user and u.item (pipe, Latin-1)."""
    return _with_users(files, ("\t", "|"), _USERS_100K, _CONTEXT_100K, _movies_100k)


def read_recbole_100k(files: Sequence[Path]) -> RawTables:
    """The same data as the package recbole ships it; there the year of a title is in a separate column."""
    return _with_users(files, ("\t", "\t"), _USERS_100K, _CONTEXT_100K, _recbole_movies, header=True, encoding="utf-8")


def read_1m(files: Sequence[Path]) -> RawTables:
    """ratings.dat, users.dat and movies.dat (``::``, Latin-1)."""
    return _with_users(files, ("::", "::"), _USERS_1M, _CONTEXT_1M, lambda lines: map(_movie_1m, lines))


def read_20m(files: Sequence[Path]) -> RawTables:
    """ratings.csv and movies.csv (comma, UTF-8). Ratings run from 0.5 to 5 in halves and are stored doubled."""
    ratings, movies = files
    columns = {"userId": "BIGINT", "movieId": "BIGINT", "rating": "DOUBLE", "timestamp": "BIGINT"}
    return RawTables(
        logs=(table_with_header(ratings, columns),),
        events='"userId" AS "user", "movieId" AS item, ' + rating_and_time(scale=2, time='"timestamp"'),
        descriptions=_DESCRIPTIONS | {"action": ColumnDescription("rating", "0.5 to 5 in halves")},
        **_movies(movies, _movies_20m, encoding="utf-8"),
    )


def _with_users(
    files: Sequence[Path],
    delimiters: tuple[str, str],
    user_columns: Mapping[str, str],
    context: str,
    parse_movies: _ParseMovies,
    header: bool = False,
    encoding: str = "latin-1",
) -> RawTables:
    ratings, users, movies = files
    log = RawFile(path=ratings, columns=_RATINGS, delimiter=delimiters[0], header=header, quote="")
    table = RawFile(path=users, columns=user_columns, delimiter=delimiters[1], header=header, quote="")
    return RawTables(
        logs=(log,),
        events='"user", item, ' + rating_and_time(scale=1, time='"time"'),
        context=(table, context),
        descriptions=_DESCRIPTIONS,
        **_movies(movies, parse_movies, encoding),
    )


def _movies_100k(lines: Iterator[str]) -> Iterator[list[str]]:
    for line in lines:
        movie, title, *_ = fields = line.rstrip("\r\n").split("|")
        flags = fields[-len(_GENRES_100K) :] if len(fields) > len(_GENRES_100K) else []
        yield [movie, title, *(genre for genre, flag in zip(_GENRES_100K, flags, strict=False) if flag == "1")]


def _recbole_movies(lines: Iterator[str]) -> Iterator[list[str]]:
    next(lines, None)
    for line in lines:
        movie, title, year, *genres = line.rstrip("\r\n").split("\t")
        yield [movie, f"{title} ({year})" if year.isdigit() else title, *" ".join(genres).split()]


def _movie_1m(line: str) -> list[str]:
    movie, title, *genres = line.rstrip("\r\n").split("::")
    return [movie, title, *"|".join(genres).split("|")]


def _movies_20m(lines: Iterator[str]) -> Iterator[list[str]]:
    for movie, title, *genres in list(csv.reader(lines))[1:]:
        yield [movie, title, *(genre for genre in "|".join(genres).split("|") if genre != _NO_GENRES)]


def _movies(file: Path, parse: _ParseMovies, encoding: str) -> dict[str, Any]:
    """Titles, years and genres of the movies, and their file; nothing where the optional file is missing.

    As in a dict, the last of several rows of a movie counts.
    """
    if not file.is_file():
        return {}
    titles: dict[int, str] = {}
    genres: dict[int, list[str]] = {}
    try:
        with file.open(encoding=encoding, newline="\n") as lines:
            for movie, title, *of_movie in parse(lines):
                titles[int(movie)] = title.strip()
                genres[int(movie)] = [genre for genre in map(str.strip, of_movie) if genre]
    except (ValueError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is not a list of movies and titles: {error}") from error
    years = [(_YEAR.findall(title) or [""])[-1] for title in titles.values()]
    rows = {"item": list(titles), "i0": years, "i1": list(genres.values())}
    return {"titles": titles, "title_file": file, "item_rows": rows if titles else None}


def _spec(
    name: str,
    md5: str,
    *raw_formats: RawFormat,
    published: tuple[int, int, int],
    context: tuple[str, ...] = (),
    max_action: int = 5,
    wheel: WheelFiles | None = None,
    sha256: str | None = None,
) -> DatasetSpec:
    return DatasetSpec(
        name=name,
        homepage=f"https://grouplens.org/datasets/movielens/{name.removeprefix('ml-')}/",
        archive=Archive(f"https://files.grouplens.org/datasets/movielens/{name}.zip", md5, sha256),
        raw_formats=raw_formats,
        schema=Schema(
            item="movie_id",
            action="rating",
            context=(USER_FEATURE, *context),
            item_features=("year", "genres"),
            action_cardinality=max_action + 1,
        ),
        published=dict(zip(("users", "items", "events"), published, strict=True)),
        wheel=wheel,
    )


_RECBOLE_WHEEL = WheelFiles(
    "recbole==1.2.1",
    "recbole/dataset_example/ml-100k",
    {
        "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
        "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
        "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    },
)

DATASETS = (
    _spec(
        "ml-100k",
        "0e33842e24a9c977be4e0107933c0723",
        RawFormat(read_100k, ("u.data", "u.user"), ("u.item",)),
        RawFormat(read_recbole_100k, ("ml-100k.inter", "ml-100k.user"), ("ml-100k.item",)),
        published=(943, 1682, 100_000),
        context=("age_group", "sex", "occupation", "zip_code"),
        wheel=_RECBOLE_WHEEL,
        sha256="50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
    ),
    _spec(
        "ml-1m",
        "c4d9eecfca2ab87c1945afe126590906",
        RawFormat(read_1m, ("ratings.dat", "users.dat"), ("movies.dat",)),
        published=(6040, 3706, 1_000_209),
        context=("sex", "age_group", "occupation", "zip_code"),
        sha256="a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
    ),
    _spec(
        "ml-20m",
        "cd245b17a1ae2cc31bb14903e1204af3",
        RawFormat(read_20m, ("ratings.csv",), ("movies.csv",)),
        published=(138_493, 26_744, 20_000_263),
        max_action=10,
        sha256="96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3",
    ),
)
