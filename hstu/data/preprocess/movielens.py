"""MovieLens 100K, 1M and 20M (and 100K as RecBole's atomic files) as raw tables.

Formats: the README of each GroupLens archive; RecBole's atomic files are tab separated with ``name:type`` headers.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hstu.config.errors import DataError
from hstu.data.preprocess.raw import Meaning, RawTables
from hstu.data.preprocess.tables import RawFile, table_with_header

_RATINGS = {"user": "BIGINT", "item": "BIGINT", "rating": "DOUBLE", "time": "BIGINT"}
_USERS_100K = {"user": "BIGINT", "age": "INTEGER", "sex": "VARCHAR", "occupation": "VARCHAR", "zip_code": "VARCHAR"}
_USERS_1M = {
    "user": "BIGINT",
    "sex": "VARCHAR",
    "age_group": "VARCHAR",
    "occupation": "VARCHAR",
    "zip_code": "VARCHAR",
}
_CONTEXT_1M = '"user", sex AS c0, age_group AS c1, occupation AS c2, zip_code AS c3'
_AGE_GROUP = """CASE WHEN age < 18 THEN '1' WHEN age < 25 THEN '18' WHEN age < 35 THEN '25' WHEN age < 45 THEN '35'
    WHEN age < 50 THEN '45' WHEN age < 56 THEN '50' WHEN age >= 56 THEN '56' END"""
"""MovieLens 1M's groups, each named by its lowest age, from an age in years."""
_CONTEXT_100K = f'"user", {_AGE_GROUP} AS c0, sex AS c1, occupation AS c2, zip_code AS c3'
_MEANINGS = {
    "user": Meaning("user", "an integer"),
    "item": Meaning("movie", "an integer"),
    "action": Meaning("rating", "1 to 5"),
    "time": Meaning("timestamp", "seconds since 1970"),
}


def movielens_100k(files: Sequence[Path]) -> RawTables:
    """u.data (tab), u.user and u.item (pipe, Latin-1)."""
    ratings, users, movies = files
    return RawTables(
        logs=(_plain(ratings, _RATINGS, "\t"),),
        events=_events(),
        context=(_plain(users, _USERS_100K, "|"), _CONTEXT_100K),
        meanings=_MEANINGS,
        **_titles(movies, lambda lines: (line.split("|")[:2] for line in lines)),
    )


def recbole_100k(files: Sequence[Path]) -> RawTables:
    """The same data as the package recbole ships it; its titles come without the year, which has its own column."""
    ratings, users, movies = files
    return RawTables(
        logs=(_plain(ratings, _RATINGS, "\t", header=True),),
        events=_events(),
        context=(_plain(users, _USERS_100K, "\t", header=True), _CONTEXT_100K),
        meanings=_MEANINGS,
        **_titles(movies, _recbole_titles, encoding="utf-8"),
    )


def movielens_1m(files: Sequence[Path]) -> RawTables:
    """ratings.dat, users.dat and movies.dat (``::``, Latin-1)."""
    ratings, users, movies = files
    return RawTables(
        logs=(_plain(ratings, _RATINGS, "::"),),
        events=_events(),
        context=(_plain(users, _USERS_1M, "::"), _CONTEXT_1M),
        meanings=_MEANINGS,
        **_titles(movies, lambda lines: (line.split("::")[:2] for line in lines)),
    )


def movielens_20m(files: Sequence[Path]) -> RawTables:
    """ratings.csv and movies.csv (comma, UTF-8). Ratings run from 0.5 to 5 in halves and are stored doubled."""
    ratings, movies = files
    columns = {"userId": "BIGINT", "movieId": "BIGINT", "rating": "DOUBLE", "timestamp": "BIGINT"}
    return RawTables(
        logs=(table_with_header(ratings, columns),),
        events='"userId" AS "user", "movieId" AS item, ' + _action_and_time(scale=2, time='"timestamp"'),
        meanings=_MEANINGS | {"action": Meaning("rating", "0.5 to 5 in halves")},
        **_titles(movies, lambda lines: (row[:2] for row in list(csv.reader(lines))[1:]), encoding="utf-8"),
    )


READERS: dict[str, Callable[[Sequence[Path]], RawTables]] = {
    reader.__name__: reader for reader in (movielens_100k, recbole_100k, movielens_1m, movielens_20m)
}


def _plain(file: Path, columns: Mapping[str, str], delimiter: str, header: bool = False) -> RawFile:
    return RawFile(path=file, columns=columns, delimiter=delimiter, header=header, quote="")


def _events() -> str:
    return '"user", item, ' + _action_and_time(scale=1, time='"time"')


def _action_and_time(scale: int, time: str) -> str:
    """A rating that is not whole after scaling, or 0, is no rating of this data: NULL, which the check refuses."""
    whole = f"rating * {scale} = floor(rating * {scale}) AND rating > 0 AND rating <= 1000"
    action = f"CASE WHEN {whole} THEN CAST(rating * {scale} AS INTEGER) END"
    return f'{action} AS action, {time} AS "time", {time} AS "timestamp"'


def _recbole_titles(lines: Iterator[str]) -> Iterator[list[str]]:
    next(lines, None)
    for line in lines:
        movie, title, year = line.rstrip("\n").split("\t")[:3]
        yield [movie, f"{title} ({year})" if year.isdigit() else title]


def _titles(
    file: Path, parse: Callable[[Iterator[str]], Iterator[list[str]]], encoding: str = "latin-1"
) -> dict[str, Any]:
    """Raw movie id -> title, and their file; nothing without the file, which only names things."""
    if not file.is_file():
        return {}
    try:
        with file.open(encoding=encoding, newline="\n") as lines:
            return {"titles": {int(movie): title.strip() for movie, title in parse(lines)}, "title_file": file}
    except (ValueError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is not a list of movies and titles: {error}") from error
