"""MovieLens 100K, 1M and 20M (and 100K as RecBole's atomic files) as raw tables.

Formats: the README of each GroupLens archive; RecBole's atomic files are tab separated with ``name:type`` headers.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hstu.config.errors import DataError
from hstu.data.preprocess.build import RawTables
from hstu.data.preprocess.tables import read_text

_RATINGS = {"user": "BIGINT", "item": "BIGINT", "rating": "DOUBLE", "time": "BIGINT"}
_USERS_100K = {"user": "BIGINT", "age": "INTEGER", "sex": "VARCHAR", "occupation": "VARCHAR", "zip_code": "VARCHAR"}
_USERS_1M = {
    "user": "BIGINT",
    "sex": "VARCHAR",
    "age_group": "VARCHAR",
    "occupation": "VARCHAR",
    "zip_code": "VARCHAR",
}
_AGE_GROUP = """CASE WHEN age < 18 THEN '1' WHEN age < 25 THEN '18' WHEN age < 35 THEN '25' WHEN age < 45 THEN '35'
    WHEN age < 50 THEN '45' WHEN age < 56 THEN '50' WHEN age >= 56 THEN '56' END"""
"""MovieLens 1M's groups, each named by its lowest age, from an age in years."""


def movielens_100k(files: Sequence[Path]) -> RawTables:
    """u.data (tab), u.user and u.item (pipe, Latin-1)."""
    ratings, users, movies = files
    return RawTables(
        files=_present(files),
        events=_events(read_text([ratings], _RATINGS, delimiter="\t", header=False, quote="")),
        context=_context_100k(read_text([users], _USERS_100K, delimiter="|", header=False, quote="")),
        titles=_titles(movies, lambda lines: (line.split("|")[:2] for line in lines)),
    )


def recbole_100k(files: Sequence[Path]) -> RawTables:
    """The same data as the package recbole ships it; its titles come without the year, which has its own column."""
    ratings, users, movies = files
    return RawTables(
        files=_present(files),
        events=_events(read_text([ratings], _RATINGS, delimiter="\t", header=True, quote="")),
        context=_context_100k(read_text([users], _USERS_100K, delimiter="\t", header=True, quote="")),
        titles=_titles(movies, _recbole_titles, encoding="utf-8"),
    )


def movielens_1m(files: Sequence[Path]) -> RawTables:
    """ratings.dat, users.dat and movies.dat (``::``, Latin-1)."""
    ratings, users, movies = files
    context = read_text([users], _USERS_1M, delimiter="::", header=False, quote="")
    return RawTables(
        files=_present(files),
        events=_events(read_text([ratings], _RATINGS, delimiter="::", header=False, quote="")),
        context=f'SELECT "user", sex, age_group, occupation, zip_code FROM {context}',
        titles=_titles(movies, lambda lines: (line.split("::")[:2] for line in lines)),
    )


def movielens_20m(files: Sequence[Path]) -> RawTables:
    """ratings.csv and movies.csv (comma, UTF-8). Ratings run from 0.5 to 5 in halves and are stored doubled."""
    ratings, movies = files
    return RawTables(
        files=_present(files),
        events=_events(read_text([ratings], _RATINGS, delimiter=",", header=True, quote=""), scale=2),
        titles=_titles(movies, lambda lines: (row[:2] for row in list(csv.reader(lines))[1:]), encoding="utf-8"),
    )


READERS: dict[str, Callable[[Sequence[Path]], RawTables]] = {
    reader.__name__: reader for reader in (movielens_100k, recbole_100k, movielens_1m, movielens_20m)
}


def _events(ratings: str, scale: int = 1) -> str:
    """A rating that is not whole after scaling is no rating of this data: NULL, which build_store refuses."""
    whole = f"CASE WHEN rating * {scale} = floor(rating * {scale}) THEN CAST(rating * {scale} AS INTEGER) END"
    return f'SELECT "user", item, {whole} AS action, "time", "time" AS "timestamp" FROM {ratings}'


def _context_100k(users: str) -> str:
    return f'SELECT "user", {_AGE_GROUP} AS age_group, sex, occupation, zip_code FROM {users}'


def _recbole_titles(lines: Iterator[str]) -> Iterator[list[str]]:
    next(lines)
    for line in lines:
        movie, title, year = line.rstrip("\n").split("\t")[:3]
        yield [movie, f"{title} ({year})" if year.isdigit() else title]


def _titles(
    file: Path, parse: Callable[[Iterator[str]], Iterator[list[str]]], encoding: str = "latin-1"
) -> dict[int, str] | None:
    """Raw movie id -> title; None without the file, which only names things."""
    if not file.is_file():
        return None
    try:
        with file.open(encoding=encoding, newline="\n") as lines:
            return {int(movie): title.strip() for movie, title in parse(lines)}
    except (ValueError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is not a list of movies and titles: {error}") from error


def _present(files: Sequence[Path]) -> tuple[Path, ...]:
    return tuple(file for file in files if file.is_file())
