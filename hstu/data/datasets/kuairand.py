"""KuaiRand Pure, 1K and 27K. Format: https://kuairand.com/ (arXiv 2208.08696)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hstu.data.datasets.raw import RawFile, identifier, table_with_header
from hstu.data.datasets.spec import USER_FEATURE, Archive, ColumnDescription, DatasetSpec, RawFormat, RawTables, Schema

ACTION_BITS = {
    "is_click": 1,
    "is_like": 2,
    "is_follow": 4,
    "is_comment": 8,
    "is_forward": 16,
    "is_hate": 32,
    "long_view": 64,
    "is_profile_enter": 128,
}
"""Column of the log → its bit in the action. Ranking task t predicts bit t."""

_CONTEXT = (
    "user_active_degree",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
)
_OF_VIDEOS = ("tag", "video_type", "upload_type", "music_type", "author_id", "music_id")
"""Categorical columns of video_features_basic. ``tag`` holds several values."""
_DURATION = "video_duration"


def read(files: Sequence[Path]) -> RawTables:
    """Read the standard logs, earlier period first, user_features, and the optional video_features_basic.

    Sorts events by time_ms and stores seconds. Users and videos without a row of features have the value "unknown".
    """
    *logs, users, videos = files
    types = {"user_id": "BIGINT", "video_id": "BIGINT", "time_ms": "BIGINT", **dict.fromkeys(ACTION_BITS, "INTEGER")}
    action = " + ".join(f"CAST({column} <> 0 AS INTEGER) * {bit}" for column, bit in ACTION_BITS.items())
    features = ", ".join(f"{identifier(name)} AS c{index}" for index, name in enumerate(_CONTEXT))
    user_types = {"user_id": "BIGINT", **dict.fromkeys(_CONTEXT, "VARCHAR")}
    return RawTables(
        logs=tuple(table_with_header(log, types) for log in logs),
        events=f'user_id AS "user", video_id AS item, {action} AS action, time_ms AS "time", '
        'time_ms // 1000 AS "timestamp"',
        tables={"context": (table_with_header(users, user_types), f'user_id AS "user", {features}')}
        | ({"item_table": _videos(videos)} if videos.is_file() else {}),
        descriptions={
            "user": ColumnDescription("user_id", "an integer"),
            "item": ColumnDescription("video_id", "an integer"),
            "action": ColumnDescription(", ".join(ACTION_BITS), "an integer in each of them"),
            "time": ColumnDescription("time_ms", "milliseconds since 1970"),
            f"i{len(_OF_VIDEOS)}": ColumnDescription(_DURATION, "a finite number, or nothing where it is missing"),
        },
    )


def _videos(file: Path) -> tuple[RawFile, str]:
    values = {name: identifier(name) for name in _OF_VIDEOS} | {"tag": "[x FOR x IN string_split(tag, ',') IF x <> '']"}
    values[_DURATION] = (
        f"CASE WHEN isfinite({_DURATION}) THEN TRY_CAST({_DURATION} AS FLOAT) "
        f"WHEN {_DURATION} IS NOT NULL THEN 'nan'::FLOAT END"
    )
    selected = ", ".join(f"{value} AS i{place}" for place, value in enumerate(values.values()))
    types = {"video_id": "BIGINT", **dict.fromkeys(_OF_VIDEOS, "VARCHAR"), _DURATION: "DOUBLE"}
    return table_with_header(file, types), f"video_id AS item, {selected}"


def _spec(
    variant: str, md5: str, parts: tuple[str, ...], published: Mapping[str, float], sha256: str | None = None
) -> DatasetSpec:
    """``parts``: file name suffixes of the parts of each period's log."""
    folder = "KuaiRand-" + {"pure": "Pure", "1k": "1K", "27k": "27K"}[variant]
    periods = ("4_08_to_4_21", "4_22_to_5_08")
    logs = [f"log_standard_{period}_{variant}{part}.csv" for period in periods for part in parts]
    return DatasetSpec(
        name=f"kuairand-{variant}",
        homepage="https://kuairand.com/",
        archive=Archive(f"https://zenodo.org/records/10439422/files/{folder}.tar.gz", md5, sha256),
        raw_formats=(
            RawFormat(read, (*logs, f"user_features_{variant}.csv"), (f"video_features_basic_{variant}.csv",)),
        ),
        schema=Schema(
            item="video_id",
            action="action",
            context=(USER_FEATURE, *_CONTEXT),
            item_features=(*_OF_VIDEOS, _DURATION),
            numbers=(_DURATION,),
            action_cardinality=256,
        ),
        published=published,
        action_bits=ACTION_BITS,
    )


def _published(users: int, longest: int, shortest: int, mean: int | None, median: int, items: int) -> dict[str, float]:
    lengths = {"length_max": longest, "length_min": shortest, "length_mean": mean, "length_median": median}
    return {"users": users, **{name: value for name, value in lengths.items() if value is not None}, "items": items}


DATASETS = (
    _spec("pure", "0820331067a3784d9691136f772b35a7", ("",), _published(27_285, 910, 1, None, 39, 7_551)),
    _spec("1k", "6b0b9c8222d67fcd4c676218edca3f1f", ("",), _published(1_000, 49_332, 10, 5_038, 3_379, 4_369_953)),
    _spec(
        "27k",
        "3e3c799a24e2d23a4d2c757fbf9adf59",
        ("_part1", "_part2"),
        _published(27_285, 228_000, 100, 11_796, 8_591, 32_038_725),
        sha256="b8a8a5b777e564202cff6b96676959ee0d6baccc7ad7376bcb4af6767362d41b",
    ),
)
