"""Amazon: ratings of books (http://jmcauley.ucsd.edu/data/amazon/); Beauty and Toys as sequences, as in S3-Rec."""

from collections.abc import Sequence
from pathlib import Path

from hstu.data.datasets.raw import ListsFile, RawFile, SequenceFile, as_integer, rating_and_time
from hstu.data.datasets.spec import USER_FEATURE, ColumnDescription, DatasetSpec, RawFormat, RawTables, Schema


def read(files: Sequence[Path]) -> RawTables:
    """Read ``user,item,rating,time`` without a header. Ids are text; ratings of one day keep the order of the file."""
    (ratings,) = files
    columns = {"user": "VARCHAR", "item": "VARCHAR", "rating": "DOUBLE", "time": "BIGINT"}
    return RawTables(
        logs=(RawFile(path=ratings, columns=columns, header=False),),
        events='"user", item, ' + rating_and_time(scale=1, time='"time"'),
        descriptions={
            "user": ColumnDescription("user", "a text that is not empty"),
            "item": ColumnDescription("item", "a text that is not empty"),
            "action": ColumnDescription("rating", "1 to 5"),
            "time": ColumnDescription("time", "seconds since 1970"),
        },
    )


def read_sequences(files: Sequence[Path]) -> RawTables:
    """Read ``user item item …``, one line per user, and JSON from item to numbers of attributes."""
    lists = ListsFile(path=files[1], names=("item", "i0"))
    user, item = as_integer('"user"'), as_integer("item")
    return RawTables(
        logs=(SequenceFile(path=files[0], columns={"user": "VARCHAR", "item": "VARCHAR"}, header=False),),
        events=f'CASE WHEN is_usable THEN {user} END AS "user", {item} AS item',
        tables={"item_table": (lists, f"{item} AS item, i0")} if lists.path.is_file() else {},
        descriptions={name: ColumnDescription(name, "an integer; a user has one line") for name in ("user", "item")},
    )


def _sequences(name: str, files: str, users: int, items: int, events: int) -> DatasetSpec:
    return DatasetSpec(
        name=name,
        homepage="https://github.com/RUCAIBox/CIKM2020-S3Rec",
        archive=None,
        raw_formats=(RawFormat(read_sequences, (f"{files}.txt",), (f"{files}_item2attributes.json",)),),
        schema=Schema(item="item", timestamp=None, context=(USER_FEATURE,), item_features=("attributes",)),
        published={"users": users, "items": items, "events": events},
    )


DATASETS = (
    DatasetSpec(
        name="amazon-books",
        homepage="http://jmcauley.ucsd.edu/data/amazon/",
        archive=None,
        raw_formats=(RawFormat(read, ("ratings_Books.csv",)),),
        schema=Schema(item="item", action="rating", context=(USER_FEATURE,), action_cardinality=6),
        published={"users": 8_026_324, "items": 2_330_066, "events": 22_507_155},
    ),
    _sequences("amazon-beauty", "Beauty", 22_363, 12_101, 198_502),
    _sequences("amazon-toys", "Toys_and_Games", 19_412, 11_924, 167_597),
)
