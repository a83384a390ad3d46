"""Fixtures that every room's tests share: real raw data, a real store, small stores made from lists."""

import functools
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from hstu.data.store.sequence_store import SequenceStore
from hstu.data.store.writer import StoreWriter
from hstu.observe.logging import tear_down_logging

# The same examples each time, and no verdict on speed: a run fails for what the code does, on any machine.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("repeatable")

# A shell starts background jobs with SIGINT ignored, and what a test then starts could not be interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Nothing that a test writes must outlive a power failure. tests/reliability/test_disks.py sees each call.
os.fsync = lambda _: None  # type: ignore[assignment]

REPOSITORY = Path(__file__).resolve().parents[1]
RAW_DATA = REPOSITORY.parent / "shared" / "data"
STARTS_RANKS = re.compile(r"tests\.(distributed|reliability)\b|torch\.distributed\.run\b")
KERNELS, EXPORTS = "tests/ops/", "tests/serve/"
MakeStore = Callable[..., SequenceStore]
"""The factory of the fixture ``make_store``."""


@pytest.fixture(autouse=True)
def clean_logging() -> Iterator[None]:
    """The log of a run in this process does not outlive its test."""
    yield
    tear_down_logging()


@functools.cache
def unit_of(path: str) -> str:
    """What goes to one worker of scripts/test.sh: all files that start ranks, so that no two launches run at a time; a
    folder whose files share what is compiled or exported; any other file, for its fixtures.

    ``path``: of a test file, in the repository.
    """
    if STARTS_RANKS.search((REPOSITORY / path).read_text(encoding="utf-8")):
        return "ranks"
    return path.rpartition("/")[0] if path.startswith((KERNELS, EXPORTS)) else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of one unit go to one worker. xdist's own groups are lost on pytest 9.2: they set a name it ignores."""
    from xdist.scheduler import LoadScopeScheduling

    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid.partition("::")[0])

    return Units(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest units come first, lest one worker is left with them."""
    ranks = {item: unit_of(item.nodeid.partition("::")[0]) == "ranks" for item in items}
    items.sort(key=lambda item: (not ranks[item], not item.nodeid.startswith(KERNELS)))


def write_item_feature(
    writer: StoreWriter, feature: str, codes: np.ndarray, cardinality: int, offsets: np.ndarray | None = None
) -> None:
    """Write one code per item, or lists of codes with ``offsets`` [items + 1]."""
    writer.create_sequence(feature, "item_feature", cardinality=cardinality, length=len(codes))[:] = codes
    if offsets is not None:
        writer.create_list_offsets(feature, items=len(offsets) - 1)[:] = offsets


def write_small_store(
    path: Path,
    items: Sequence[Sequence[int]],
    *,
    actions: Sequence[Sequence[int]] | None = None,
    timestamps: Sequence[Sequence[int]] | None = None,
    context: Mapping[str, Sequence[int]] | None = None,
    item_features: Mapping[str, Sequence[int] | Sequence[Sequence[int]]] | None = None,
    event_features: Mapping[str, Sequence[Sequence[int]]] | None = None,
    event_texts: Mapping[str, Sequence[str]] | None = None,
    item_numbers: Mapping[str, np.ndarray] | None = None,
    event_numbers: Mapping[str, Sequence[Sequence[float]]] | None = None,
    num_items: int | None = None,
    num_actions: int | None = None,
    item_ids: Sequence[int] | None = None,
    item_feature: str = "item_id",
    action_feature: str = "action",
    timestamp_feature: str = "timestamp",
    raw: Sequence[str] = (),
    requests: Sequence[tuple[int, int, Mapping[str, Sequence[int]]]] = (),
    ranges: Mapping[str, Mapping[str, float]] | None = None,
    segments: Sequence[Sequence[int]] | None = None,
    earlier: SequenceStore | None = None,
    name: str = "toy",
    shards: int = 1,
) -> SequenceStore:
    """A store of the given item codes, one list a user.

    ``timestamps`` in seconds (default: 60 s apart from 1,000,000), ``context`` feature -> one code a user; raw ids
    are 1000 + code for items (or ``item_ids``) and 100 + row for users, so that a mix-up of raw ids and codes shows.
    ``item_features``: feature -> one code or one list of codes an item; ``event_features``: feature -> lists like
    ``items``; the raw ids of both are "value 007", or those of ``event_texts``. ``item_numbers``: feature -> [items,
    width], ``event_numbers``: feature -> lists like ``items``. ``raw``: features whose raw ids models get.
    ``requests``: user, time, and feature -> codes of the candidates, by user and time. ``segments``: numbers of the
    appends, lists like ``items``, to the store ``earlier``, which may be at ``path``. ``shards``: as StoreWriter has.
    """
    lengths = [len(row) for row in items]
    if timestamps is None:
        timestamps = [[1_000_000 + 60 * position for position in range(length)] for length in lengths]
    for other in filter(None, (actions, timestamps)):
        assert [len(row) for row in other] == lengths, "a user's lists have equal lengths"

    def flat(rows: Sequence[Sequence[int]]) -> np.ndarray:
        return np.array([value for row in rows for value in row], dtype=np.int64)

    num_items = num_items or int(flat(items).max()) + 1
    with StoreWriter(path, name=name, command=None, overwrite=earlier is not None, shards=shards) as writer:
        writer.earlier_states = () if earlier is None else earlier.lineage
        if segments is not None:
            writer.create_segments(int(flat(segments).max()) + 1, sum(lengths))[:] = flat(segments)
        writer.ranges.update(ranges or {})
        writer.write_offsets(np.concatenate([[0], np.cumsum(lengths)]))
        for feature, values in (context or {}).items():
            codes, cardinality = np.asarray(values), int(max(values)) + 1
            writer.create_sequence(feature, "context", cardinality=cardinality, length=len(codes))[:] = codes
        total = sum(lengths)
        writer.create_sequence(item_feature, "item", cardinality=num_items, length=total)[:] = flat(items)
        writer.write_vocabulary(item_feature, np.array(item_ids or 1000 + np.arange(num_items)))
        writer.write_vocabulary("user_id", 100 + np.arange(len(items)))
        if actions is not None:
            cardinality = num_actions or int(flat(actions).max()) + 1
            writer.create_sequence(action_feature, "action", cardinality=cardinality, length=total)[:] = flat(actions)
        writer.create_sequence(timestamp_feature, "timestamp", cardinality=None, length=total)[:] = flat(timestamps)
        for feature, rows in (event_features or {}).items():
            default = [f"value {code:03}" for code in range(int(flat(rows).max()) + 1)]
            texts = (event_texts or {}).get(feature, default)
            writer.create_sequence(feature, "event", cardinality=len(texts), length=total)[:] = flat(rows)
            writer.write_vocabulary(feature, texts)
        for feature, of_items in (item_features or {}).items():
            lists = [value if isinstance(value, Sequence) else [value] for value in of_items]
            offsets = np.concatenate([[0], np.cumsum([len(row) for row in lists])])
            is_list = any(isinstance(value, Sequence) for value in of_items)
            codes, cardinality = flat(lists), int(flat(lists).max()) + 1
            write_item_feature(writer, feature, codes, cardinality, offsets if is_list else None)
            writer.write_vocabulary(feature, [f"value {code:03}" for code in range(cardinality)])
        for feature, numbers in (item_numbers or {}).items():
            length, width = numbers.size, numbers.shape[1]
            array = writer.create_sequence(feature, "item_number", cardinality=None, length=length, width=width)
            array[:] = numbers.reshape(-1)
            array.flush()
        for feature, of_events in (event_numbers or {}).items():
            array = writer.create_sequence(feature, "event_number", cardinality=None, length=total)
            array[:] = [value for row in of_events for value in row]
            array.flush()
        writer.raw_features.update(raw)
        if requests:
            sizes = [len(shown[item_feature]) for _, _, shown in requests]
            arrays = writer.create_requests(len(requests), sum(sizes))
            arrays["users"][:], arrays["times"][:] = np.array([request[:2] for request in requests]).T
            arrays["offsets"][:] = np.concatenate([[0], np.cumsum(sizes)])
            starts = np.concatenate([[0], np.cumsum(lengths)])
            arrays["history_ends"][:] = [
                starts[user] + sum(event < time for event in timestamps[user]) for user, time, _ in requests
            ]
            for feature in requests[0][2]:
                writer.create_candidates(feature)[:] = flat([shown[feature] for _, _, shown in requests])
    return SequenceStore.open(path)


@pytest.fixture(scope="session")
def raw_data_dir() -> Path:
    """Real data in its raw format: ml-100k/, ml-1m/, kuairand-pure/. It lies outside the repository."""
    if not RAW_DATA.is_dir():
        pytest.skip(f"NEEDS REAL DATA: {RAW_DATA} is absent (ml-100k/u.data, ml-1m/ratings.dat, …)")
    return RAW_DATA


@pytest.fixture(scope="session")
def ml_100k_store(raw_data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SequenceStore:
    """The real MovieLens 100K, preprocessed once a session: 943 users, 1,682 items, 100,000 events."""
    from hstu.data.preprocess import preprocess

    return SequenceStore.open(
        preprocess("ml-100k", raw_path=raw_data_dir / "ml-100k", output=tmp_path_factory.mktemp("stores") / "ml-100k")
    )


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """Factory of small stores: ``make_store([[3, 1], [0, 2, 2]], actions=..., context={"age": [0, 1]})``.

    The arguments are those of write_small_store; each call makes another directory.
    """
    made: list[SequenceStore] = []

    def make(items: Sequence[Sequence[int]], **options: object) -> SequenceStore:
        made.append(write_small_store(tmp_path / f"store_{len(made)}", items, **options))  # type: ignore[arg-type]
        return made[-1]

    return make


@pytest.fixture
def broker() -> Iterator[Any]:
    """A producer with librdkafka's own cluster, in this process; its topics have four partitions."""
    from confluent_kafka import Producer

    yield Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "mock", "log_level": 0})


def topic_url(broker: Any, topic: str) -> str:
    return "kafka://" + ",".join(f"{b.host}:{b.port}" for b in broker.list_topics(timeout=9).brokers.values()) + topic
