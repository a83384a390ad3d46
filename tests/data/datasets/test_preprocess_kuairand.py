import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hstu.data.datasets.kuairand import ACTION_BITS
from hstu.data.preprocess import preprocess
from hstu.data.store.sequence_store import SequenceStore

LOG_COLUMNS = [
    *("user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like", "is_follow", "is_comment"),
    *("is_forward", "is_hate", "long_view", "play_time_ms", "duration_ms", "profile_stay_time"),
    *("comment_stay_time", "is_profile_enter", "is_rand", "tab"),
]
CONTEXT = [
    "user_active_degree",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
]
VIDEO_FEATURES = ("tag", "video_type", "upload_type", "music_type", "author_id", "music_id")
Raw = tuple[Path, pd.DataFrame, pd.DataFrame]
STRANGERS = [10**9, 10**9 + 1]
"""Users in the logs but not in user_features."""


def generate_log(users: np.ndarray, videos: np.ndarray, rows: int, first_ms: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    log = pd.DataFrame(rng.integers(0, 100, (rows, len(LOG_COLUMNS))), columns=LOG_COLUMNS)
    log["user_id"] = rng.choice(users, rows)
    log["video_id"] = rng.choice(videos, rows)
    log["time_ms"] = first_ms + rng.integers(0, 50, rows) * 700  # many ties, and moments within one second
    for column in ACTION_BITS:
        log[column] = rng.integers(0, 2, rows)
    return log


@pytest.fixture(scope="module")
def raw(raw_data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Raw:
    """(directory laid out as the archive, all log rows in file order, user features): real users and videos."""
    real = raw_data_dir / "kuairand-pure" / "data"
    features = pd.read_csv(real / "user_features_pure.csv", dtype=str)
    users = features.user_id.astype(int).to_numpy()[:400]
    videos = pd.read_csv(real / "video_features_basic_pure.csv").video_id.to_numpy()
    directory = tmp_path_factory.mktemp("raw")
    data = directory / "KuaiRand-Pure" / "data"
    data.mkdir(parents=True)
    (data / "user_features_pure.csv").write_bytes((real / "user_features_pure.csv").read_bytes())
    only_first, only_second = [*users[:300], STRANGERS[0]], [*users[100:], STRANGERS[1]]
    first = generate_log(np.array(only_first), videos, 6_000, 1_649_400_000_000, seed=1)
    second = generate_log(np.array(only_second), videos, 5_000, 1_650_600_000_000, seed=2)
    first.to_csv(data / "log_standard_4_08_to_4_21_pure.csv", index=False)
    second.to_csv(data / "log_standard_4_22_to_5_08_pure.csv", index=False)
    first.head(50).to_csv(data / "log_random_4_22_to_5_08_pure.csv", index=False)  # to be ignored
    return directory, pd.concat([first, second], ignore_index=True), features


@pytest.fixture(scope="module")
def store(raw: Raw, tmp_path_factory: pytest.TempPathFactory) -> SequenceStore:
    output = tmp_path_factory.mktemp("stores") / "kuairand-pure"
    return SequenceStore.open(preprocess("KuaiRand-Pure", raw_path=raw[0], output=output))


def test_events_of_both_logs_are_in_stable_time_order(store: SequenceStore, raw: Raw) -> None:
    log = raw[1].sort_values(["user_id", "time_ms"], kind="stable")
    assert log.duplicated(["user_id", "time_ms"]).any(), "ties are what this test is about"
    assert store.raw_ids("user_id").tolist() == sorted(log.user_id.unique())
    assert np.diff(store.offsets()).tolist() == log.groupby("user_id").size().tolist()
    assert (store.raw_ids("video_id")[store.sequence("video_id")] == log.video_id).all()
    assert (store.sequence("timestamp") == log.time_ms // 1000).all()


def test_users_of_only_one_log_are_kept(store: SequenceStore, raw: Raw) -> None:
    first, second = set(raw[1].user_id[:6_000]), set(raw[1].user_id[6_000:])
    assert first - second and second - first
    assert store.num_users == len(first | second)
    assert (store.statistics["published"]["users"], store.statistics["events"]) == (27_285, 11_000)


def test_the_action_holds_the_eight_signals_as_bits(store: SequenceStore, raw: Raw) -> None:
    log = raw[1].sort_values(["user_id", "time_ms"], kind="stable")
    signals = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view")
    for bit, column in enumerate((*signals, "is_profile_enter")):
        assert ((store.sequence("action") >> bit) & 1 == log[column]).all(), column
    assert store.cardinality("action") == 256


def test_context_is_the_users_own_row_and_unknown_without_one(store: SequenceStore, raw: Raw) -> None:
    features = raw[2].set_index(raw[2].user_id.astype(int))
    assert store.contextual_features == ("user_id", *CONTEXT)
    users = store.raw_ids("user_id").tolist()
    for feature in CONTEXT:
        found = store.raw_ids(feature)[store.context(feature)].tolist()
        assert found == ["unknown" if user in STRANGERS else features.at[user, feature] for user in users]


def test_videos_have_their_own_row_and_unknown_without_one(
    raw: Raw, store: SequenceStore, raw_data_dir: Path, tmp_path: Path
) -> None:
    real = raw_data_dir / "kuairand-pure" / "data" / "video_features_basic_pure.csv"
    videos = pd.read_csv(real, dtype=str, keep_default_na=False)
    videos = videos[videos.index % 10 > 0].sample(frac=1, random_state=1)
    data = tmp_path / "data"
    shutil.copytree(raw[0] / "KuaiRand-Pure" / "data", data)
    videos.to_csv(data / real.name, index=False)
    with_videos = SequenceStore.open(preprocess("kuairand-pure", raw_path=tmp_path, output=tmp_path / "store"))
    with_videos.verify_contents()
    assert with_videos.item_side_features == VIDEO_FEATURES
    assert with_videos.item_number_features == ("video_duration",)
    items = with_videos.raw_ids("video_id")
    rows = videos.set_index(videos.video_id.astype(int)).reindex(items).fillna("")
    assert 0 < (rows.video_id == "").sum() < len(rows)
    for feature in VIDEO_FEATURES:
        codes, offsets = with_videos.item_values(feature)
        values = with_videos.raw_ids(feature)[codes].tolist()
        if feature == "tag":
            assert offsets is not None
            lists = [values[start:stop] for start, stop in pairwise(offsets.tolist())]
            assert lists == [tag.split(",") if tag else ["unknown"] for tag in rows.tag]
            assert max(map(len, lists)) > 1
        else:
            assert offsets is None and values == [value or "unknown" for value in rows[feature]], feature
    durations = pd.to_numeric(rows.video_duration).to_numpy(dtype=np.float32)[:, None]
    assert np.isnan(durations).any()
    np.testing.assert_array_equal(with_videos.item_numbers("video_duration"), durations)
    same = store.checksums.items()
    assert same <= with_videos.checksums.items(), "the files of events and users are the same with and without"
