"""The built-in datasets, declared in one place: where they come from, their files, features and published figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from hstu.config.args import DynamicEmbeddingArgs, EmbeddingArgs, NetworkArgs
from hstu.config.dataset_names import resolve_dataset_name
from hstu.data.store import USER_FEATURE, SequenceStore

REPLICATED_TABLE_BYTES = 4 << 20
"""A predefined table above this size (float32) is sharded: replicas cost an all-reduce of the whole table a step."""


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The features of a store. ``context`` is in token order; ``action_cardinality`` None: largest action + 1."""

    item: str
    action: str | None = None
    timestamp: str | None = "timestamp"
    context: tuple[str, ...] = ()
    action_cardinality: int | None = None


@dataclass(frozen=True)
class Archive:
    """A published archive and its MD5, as its publisher states it."""

    url: str
    md5: str

    @property
    def file(self) -> str:
        """File name of the archive."""
        return PurePosixPath(self.url).name

    @property
    def folder(self) -> str:
        """Top folder inside the archive."""
        return self.file.removesuffix(".zip").removesuffix(".tar.gz")


@dataclass(frozen=True)
class WheelFiles:
    """Raw files that a package on PyPI ships: requirement, folder inside the wheel, SHA-256 of each file."""

    requirement: str
    folder: str
    sha256: Mapping[str, str]


@dataclass(frozen=True)
class RawFormat:
    """One form in which the raw data comes. ``reader`` names the function in hstu.data.preprocess that reads it."""

    reader: str
    files: tuple[str, ...]
    optional_files: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One built-in dataset. ``published``: statistics of the complete data, named as in SequenceStore.statistics."""

    name: str
    homepage: str
    archive: Archive
    raw_formats: tuple[RawFormat, ...]
    schema: Schema
    published: Mapping[str, float]
    wheel: WheelFiles | None = field(default=None)


def _movielens(
    name: str,
    md5: str,
    raw_formats: tuple[RawFormat, ...],
    *,
    users: int,
    items: int,
    events: int,
    context: tuple[str, ...],
    actions: int,
    wheel: WheelFiles | None = None,
) -> DatasetSpec:
    return DatasetSpec(
        name=name,
        homepage=f"https://grouplens.org/datasets/movielens/{name.removeprefix('ml-')}/",
        archive=Archive(f"https://files.grouplens.org/datasets/movielens/{name}.zip", md5),
        raw_formats=raw_formats,
        schema=Schema(item="movie_id", action="rating", context=context, action_cardinality=actions + 1),
        published={"users": users, "items": items, "events": events},
        wheel=wheel,
    )


def _kuairand(variant: str, md5: str, logs: tuple[str, ...], published: Mapping[str, float]) -> DatasetSpec:
    folder = "KuaiRand-" + {"pure": "Pure", "1k": "1K", "27k": "27K"}[variant]
    return DatasetSpec(
        name=f"kuairand-{variant}",
        homepage="https://kuairand.com/",
        archive=Archive(f"https://zenodo.org/records/10439422/files/{folder}.tar.gz", md5),
        raw_formats=(
            RawFormat("kuairand", (*(f"log_standard_{log}.csv" for log in logs), f"user_features_{variant}.csv")),
        ),
        schema=Schema(
            item="video_id",
            action="action",
            context=(
                USER_FEATURE,
                "user_active_degree",
                "follow_user_num_range",
                "fans_user_num_range",
                "friend_user_num_range",
                "register_days_range",
            ),
            action_cardinality=256,
        ),
        published=published,
    )


_RECBOLE_100K = WheelFiles(
    "recbole==1.2.1",
    "recbole/dataset_example/ml-100k",
    {
        "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
        "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
        "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    },
)

DATASETS: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        _movielens(
            "ml-100k",
            "0e33842e24a9c977be4e0107933c0723",
            (
                RawFormat("movielens_100k", ("u.data", "u.user"), ("u.item",)),
                RawFormat("recbole_100k", ("ml-100k.inter", "ml-100k.user"), ("ml-100k.item",)),
            ),
            users=943,
            items=1682,
            events=100_000,
            context=(USER_FEATURE, "age_group", "sex", "occupation", "zip_code"),
            actions=5,
            wheel=_RECBOLE_100K,
        ),
        _movielens(
            "ml-1m",
            "c4d9eecfca2ab87c1945afe126590906",
            (RawFormat("movielens_1m", ("ratings.dat", "users.dat"), ("movies.dat",)),),
            users=6040,
            items=3706,
            events=1_000_209,
            context=(USER_FEATURE, "sex", "age_group", "occupation", "zip_code"),
            actions=5,
        ),
        _movielens(
            "ml-20m",
            "cd245b17a1ae2cc31bb14903e1204af3",
            (RawFormat("movielens_20m", ("ratings.csv",), ("movies.csv",)),),
            users=138_493,
            items=26_744,
            events=20_000_263,
            context=(USER_FEATURE,),
            actions=10,
        ),
        _kuairand(
            "pure",
            "0820331067a3784d9691136f772b35a7",
            ("4_08_to_4_21_pure", "4_22_to_5_08_pure"),
            {"users": 27_285, "length_max": 910, "length_min": 1, "length_median": 39, "items": 7_551},
        ),
        _kuairand(
            "1k",
            "6b0b9c8222d67fcd4c676218edca3f1f",
            ("4_08_to_4_21_1k", "4_22_to_5_08_1k"),
            {
                "users": 1_000,
                "length_max": 49_332,
                "length_min": 10,
                "length_mean": 5_038,
                "length_median": 3_379,
                "items": 4_369_953,
            },
        ),
        _kuairand(
            "27k",
            "3e3c799a24e2d23a4d2c757fbf9adf59",
            (
                "4_08_to_4_21_27k_part1",
                "4_08_to_4_21_27k_part2",
                "4_22_to_5_08_27k_part1",
                "4_22_to_5_08_27k_part2",
            ),
            {
                "users": 27_285,
                "length_max": 228_000,
                "length_min": 100,
                "length_mean": 11_796,
                "length_median": 8_591,
                "items": 32_038_725,
            },
        ),
    )
}


def resolve_name(name: str) -> str | None:
    """Canonical name of a built-in dataset for any of its spellings; None for any other name."""
    return resolve_dataset_name(name)


def predefined_embeddings(
    store: SequenceStore, network: NetworkArgs, *, dynamic: bool = False
) -> tuple[EmbeddingArgs, ...]:
    """One table, named after its feature, for every feature of a built-in dataset that is looked up.

    Rule: the items', the users' and any table above REPLICATED_TABLE_BYTES are model_parallel; the other contextual
    features and the action, which are small, are data_parallel. Rows: the feature's cardinality. ``dynamic``: the
    items' and the users' are dynamic tables.
    """
    tables: list[EmbeddingArgs] = []
    for name, feature in store.features.items():
        if feature.cardinality is None:
            continue
        width = network.contextual_width if feature.role == "context" else network.item_width
        large = feature.cardinality * width * 4 > REPLICATED_TABLE_BYTES
        main = feature.role == "item" or name == USER_FEATURE
        if main and dynamic:
            tables.append(
                DynamicEmbeddingArgs(
                    feature_names=[name], table_name=name, item_vocab_size_or_capacity=feature.cardinality
                )
            )
            continue
        tables.append(
            EmbeddingArgs(
                feature_names=[name],
                table_name=name,
                item_vocab_size_or_capacity=feature.cardinality,
                sharding_type="model_parallel" if main or large else "data_parallel",
            )
        )
    return tuple(tables)
