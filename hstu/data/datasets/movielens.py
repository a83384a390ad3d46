"""MovieLens 100K, 1M and 20M (formats: GroupLens READMEs), and 100K as RecBole's tab-separated atomic files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hstu.data.datasets.raw import RawFile, literal, rating_and_time, table_with_header
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

_GENRES_100K = (
    UNKNOWN, "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
"""Meaning of the flags at the end of a line of u.item, as listed in the archive's u.genre."""
_FLAGS_100K = {f"genre_{place}": genre for place, genre in enumerate(_GENRES_100K)}
_YEAR = r"\((\d{4})(?:[-–]\d{0,4})?\)"
"""The year in a title, such as "Toy Story (1995)"; the first year of a series."""
_RATINGS = {"user": "BIGINT", "item": "BIGINT", "rating": "DOUBLE", "time": "BIGINT"}
_USERS_100K = {"user": "BIGINT", "age": "INTEGER", **dict.fromkeys(("sex", "occupation", "zip_code"), "VARCHAR")}
_USERS_1M = {"user": "BIGINT", **dict.fromkeys(("sex", "age_group", "occupation", "zip_code"), "VARCHAR")}
_MOVIES_1M = {"movie": "BIGINT", "title": "VARCHAR", "genres": "VARCHAR"}
_MOVIES_100K = {
    "movie": "BIGINT", **dict.fromkeys(("title", "release", "video_release", "url", *_FLAGS_100K), "VARCHAR")
}  # fmt: skip
_MOVIES_RECBOLE = {"movie": "BIGINT", **dict.fromkeys(("name", "year", "genres"), "VARCHAR")}
_AGE_GROUP = """CASE WHEN age < 18 THEN '1' WHEN age < 25 THEN '18' WHEN age < 35 THEN '25' WHEN age < 45 THEN '35'
    WHEN age < 50 THEN '45' WHEN age < 56 THEN '50' WHEN age >= 56 THEN '56' END"""
"""SQL: age in years → age group of MovieLens 1M, named by its lowest age."""
_DESCRIPTIONS = {
    "user": ColumnDescription("user", "an integer"),
    "item": ColumnDescription("movie", "an integer"),
    "action": ColumnDescription("rating", "1 to 5"),
    "time": ColumnDescription("timestamp", "seconds since 1970"),
}


def read_100k(files: Sequence[Path]) -> RawTables:
    """Read u.data (tab), u.user and u.item (pipe, Latin-1)."""
    movies = RawFile(path=files[2], columns=_MOVIES_100K, delimiter="|", header=False, quote="", encoding="latin-1")
    flags = ", ".join(f"CASE WHEN {flag} = '1' THEN {literal(genre)} END" for flag, genre in _FLAGS_100K.items())
    return _with_users(files, ("\t", "|"), _USERS_100K, movies, genres=f"[{flags}]")


def read_recbole_100k(files: Sequence[Path]) -> RawTables:
    """Read the files of the package recbole, which stores the year of a title in a separate column."""
    movies = RawFile(path=files[2], columns=_MOVIES_RECBOLE, delimiter="\t", quote="")
    title = r"concat(trim(name), CASE WHEN regexp_full_match(year, '\d+') THEN concat(' (', year, ')') END)"
    genres = "string_split(genres, ' ')"
    return _with_users(files, ("\t", "\t"), _USERS_100K, movies, genres, title, header=True)


def read_1m(files: Sequence[Path]) -> RawTables:
    """Read ratings.dat, users.dat and movies.dat (``::``, Latin-1)."""
    movies = RawFile(path=files[2], columns=_MOVIES_1M, delimiter="::", header=False, quote="", encoding="latin-1")
    return _with_users(files, ("::", "::"), _USERS_1M, movies)


def read_20m(files: Sequence[Path]) -> RawTables:
    """Read ratings.csv and movies.csv (comma, UTF-8). Ratings from 0.5 to 5 in steps of 0.5 are stored doubled."""
    ratings, movies = files
    columns = {"userId": "BIGINT", "movieId": "BIGINT", "rating": "DOUBLE", "timestamp": "BIGINT"}
    genres = "string_split(nullif(genres, '(no genres listed)'), '|')"
    return RawTables(
        logs=(table_with_header(ratings, columns),),
        events='"userId" AS "user", "movieId" AS item, ' + rating_and_time(scale=2, time='"timestamp"'),
        descriptions=_DESCRIPTIONS | {"action": ColumnDescription("rating", "0.5 to 5 in halves")},
        tables=_movies(RawFile(path=movies, columns=_MOVIES_1M), genres=genres),
    )


def _with_users(
    files: Sequence[Path],
    delimiters: tuple[str, str],
    user_columns: Mapping[str, str],
    movies: RawFile,
    genres: str = "string_split(genres, '|')",
    title: str = "title",
    header: bool = False,
) -> RawTables:
    values = [_AGE_GROUP if name == "age" else name for name in user_columns if name != "user"]
    context = ", ".join(['"user"', *(f"{value} AS c{place}" for place, value in enumerate(values))])
    log, table = (
        RawFile(path=file, columns=columns, delimiter=delimiter, header=header, quote="")
        for file, columns, delimiter in zip(files, (_RATINGS, user_columns), delimiters, strict=False)
    )
    return RawTables(
        logs=(log,),
        events='"user", item, ' + rating_and_time(scale=1, time='"time"'),
        tables={"context": (table, context)} | _movies(movies, genres, title),
        descriptions=_DESCRIPTIONS,
    )


def _movies(file: RawFile, genres: str, title: str = "title") -> dict[str, tuple[RawFile, str]]:
    """Build titles and item_table, if the file exists. ``genres``, ``title``: SQL of a list and of a text."""
    if not file.path.is_file():
        return {}
    year = f"regexp_extract_all({title}, {literal(_YEAR)}, 1)[-1]"
    named = f"[trim(genre) FOR genre IN {genres} IF trim(genre) <> '']"
    return {
        "titles": (file, f"movie AS item, trim({title}) AS title"),
        "item_table": (file, f"movie AS item, {year} AS i0, {named} AS i1"),
    }


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
