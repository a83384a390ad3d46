"""Amazon Books: ratings from 1996 to 2014 without reviews. Format: http://jmcauley.ucsd.edu/data/amazon/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hstu.data.datasets.raw import RawFile, rating_and_time
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


DATASETS = (
    DatasetSpec(
        name="amazon-books",
        homepage="http://jmcauley.ucsd.edu/data/amazon/",
        archive=None,
        raw_formats=(RawFormat(read, ("ratings_Books.csv",)),),
        schema=Schema(item="item", action="rating", context=(USER_FEATURE,), action_cardinality=6),
        published={"users": 8_026_324, "items": 2_330_066, "events": 22_507_155},
    ),
)
