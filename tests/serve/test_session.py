"""Sessions of trained models: answers equal those of whole forwards over the same events."""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu import api
from hstu.api import History, TrainedModel
from hstu.base.errors import ConfigError, DataError
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.serve.session import Session
from hstu.train.builder import build_model
from hstu.train.inference import InferenceSource
from tests.conftest import write_small_store
from tests.train.tiny import ITEM_FEATURES, OF_THE_ACTION, enlarge, tiny_config, walks

MEGABYTE = 1 << 20
RELATIVE = {"position_encoding": ("absolute", "relative_bias")}


def untrained(task: str, store: SequenceStore, mesh: Mesh, path: Path, **options: Any) -> TrainedModel:
    """A model with large random weights, so that what one token does to another is not lost in rounding."""
    config = tiny_config(task, store, path, **options)
    source = InferenceSource(config, config.dataset, mesh)  # type: ignore[arg-type]
    model, optimizers = build_model(config, source, mesh)
    return TrainedModel(config, path, mesh, source, enlarge(model), optimizers, [])


def part(history: History, start: int, stop: int) -> History:
    return history.cut(slice(start, stop))


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of sums, which rounds logits by some eps of the largest, also where they are small."""
    largest = float(expected[expected.isfinite()].abs().max())
    rounding = 4 * torch.finfo(torch.float32).eps * largest
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=max(1e-5, rounding))


@pytest.fixture(scope="module")
def retrieval(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """A model of histories of at most 8 items, with context and features of items, that reads when it is asked."""
    path = tmp_path_factory.mktemp("retrieval")
    data = write_small_store(path / "store", **walks(), item_features=ITEM_FEATURES)
    return untrained(
        "retrieval", data, mesh, path / "run", network=RELATIVE, dataset={"side_feature_names": ["colour", "tags"]}
    )


@pytest.fixture(scope="module")
def long(retrieval: TrainedModel) -> History:
    """A user with 10 events."""
    row = int(np.argmax([len(items) for items in walks()["items"]]))
    (history,) = api.histories(retrieval.store, [row])
    assert len(history.items) == 10
    return history


def vectors_of(model: TrainedModel, history: History, at: int | None = None) -> torch.Tensor:
    """By the whole forward."""
    return model.user_vectors(model.encoder.batches([history]), at)


def test_vectors_follow_the_events_also_where_histories_outgrow_the_model(
    retrieval: TrainedModel, long: History
) -> None:
    session = retrieval.session(MEGABYTE)
    session.encode([part(long, 0, 2)])
    for count in range(3, 11):
        session.append([part(long, count - 1, count)])
        assert_equal(session.user_embeddings([long.user]), vectors_of(retrieval, part(long, 0, count)))
    assert (session.statistics.hits, session.statistics.misses) == (6, 2)  # the last two events move all positions
    assert_equal(session.user_embeddings([long.user]), retrieval.user_embeddings([long.user]))
    later = int(np.asarray(long.timestamps)[-1]) + 10**6
    assert_equal(session.user_embeddings([long.user], at=later), retrieval.user_embeddings([long.user], at=later))


def test_trimmed_histories_are_shorter_and_encoded_less_often(retrieval: TrainedModel, long: History) -> None:
    session = retrieval.session(MEGABYTE, trim_events=2)
    session.encode([part(long, 0, 8)])
    for count, kept in ((9, 7), (10, 8)):
        session.append([part(long, count - 1, count)])
        assert_equal(session.user_embeddings([long.user]), vectors_of(retrieval, part(long, count - kept, count)))
    assert (session.statistics.hits, session.statistics.misses) == (1, 1)
    with pytest.raises(ConfigError, match="trim_events = 9; give a number from 1 to 8"):
        retrieval.session(MEGABYTE, trim_events=9)


def test_cosines_are_those_of_the_vectors_and_unknown_items_score_nothing(
    retrieval: TrainedModel, long: History
) -> None:
    session = retrieval.session(MEGABYTE)
    session.encode([long])
    scores = session.score(long.user, [1003, 99, 1000])
    items = retrieval.item_embeddings() @ retrieval.user_embeddings([long.user])[0]
    assert_equal(scores[::2], items[[3, 0]])
    assert scores[1].isnan()


def test_many_users_share_a_cache_that_holds_few(retrieval: TrainedModel) -> None:
    users = list(retrieval.histories(range(100, 120)))
    expected = retrieval.user_embeddings([history.user for history in users])
    least = 2 * 2 * 16 * 4 * 32  # 2 layers, K and V, 16 channels, float32, and one page of 32 tokens
    session = retrieval.session(4 * least, page_tokens=32)
    session.encode(users)
    assert session.statistics.users == 4
    order = [19, 3, 18, 3, 19, 0]
    assert_equal(session.user_embeddings([users[row].user for row in order]), expected[order])
    assert session.statistics.used_bytes == session.statistics.capacity_bytes == 4 * least
    assert (session.statistics.hits, session.statistics.misses) == (4, 2)
    session.forget([users[0].user])
    assert session.statistics.users == 3
    with pytest.raises(ConfigError, match=r"holds 0 pages of 8,192 bytes, and a history of 17 tokens needs 1"):
        retrieval.session(least - 1, page_tokens=32)


@pytest.mark.parametrize("options", [{}, {"task_args": OF_THE_ACTION}], ids=["action", "tasks"])
def test_a_model_whose_context_sees_everything_is_encoded_again(
    mesh: Mesh, store: SequenceStore, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = untrained(
        "ranking",
        store,
        mesh,
        tmp_path,
        dataset={"max_num_candidates": 2},
        network={"disable_contextual_mask": False},
        **options,
    )
    session = model.session(MEGABYTE)
    assert "disable_contextual_mask = False" in str(session.reencodes_because)
    batch = next(model.batches("valid"))
    logits = model.forward(batch).logits
    assert logits is not None
    row = int(np.argmax(batch.item_lengths))
    (whole,) = api.histories(store, [int(batch.user_ids[row])])
    history = part(whole, len(whole.items) - int(batch.item_lengths[row]), len(whole.items) - 2)
    session.encode([part(history, 0, 2)])
    session.append([part(history, 2, len(history.items))])
    assert_equal(session.score(history.user, whole.items[-2:]), logits[2 * row : 2 * row + 2])
    assert session.statistics.misses == 1
    with pytest.raises(ConfigError, match="the model does not read the time of a request"):
        session.score(history.user, whole.items[-2:], at=10**9)


LATER = range(2_000_000, 2_000_020)
NOTHING = History("zoe", items=[])


def events_of(history: History, count: int, **given: Any) -> History:
    """Later events of a user."""
    return History(history.user, items=[1000] * count, **{"actions": [1] * count, "timestamps": LATER[:count], **given})


@pytest.fixture
def session(retrieval: TrainedModel, long: History) -> Iterator[Session]:
    session = retrieval.session(MEGABYTE)
    session.encode([part(long, 0, 5)])
    yield session
    assert_equal(session.user_embeddings([long.user]), vectors_of(retrieval, part(long, 0, 5)))  # nothing has changed


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda s, h: s.append([part(h, 0, 1)]), "begin at 1000000, before its newest at 1000240; give them in order"),
        (
            lambda s, h: s.append([History(h.user, items=[1000], actions=[1])]),
            "has no timestamps, but the model reads times: give one per item",
        ),
        (lambda s, h: s.append([events_of(h, 2, actions=[1] * 3)]), "has 3 actions for 2 items; give one per item"),
        (lambda s, h: s.append([events_of(h, 20, actions=[1] * 21)]), "has 21 actions for 20 items"),
        (lambda s, h: s.append([events_of(h, 20, timestamps=[*LATER[:2], *LATER[:18]])]), "before one at 2000000"),
        (lambda s, h: s.append([part(h, 5, 6), part(h, 6, 7), part(h, 5, 6)]), "begin at 1000300, before its newest"),
        (
            lambda s, h: s.append([part(h, 5, 6), events_of(h, 1, context={"town": 9}), History("zoe", items=[1])]),
            "zoe",
        ),
        (lambda s, h: s.encode([events_of(h, 20, actions=[1] * 21)]), "has 21 actions for 20 items"),
        (lambda s, h: s.encode([events_of(h, 20, timestamps=[*LATER[:2], *LATER[:18]])]), "before one at 2000000"),
        (
            lambda s, h: s.encode([replace(part(h, 0, 3), user=user) for user in (h.user, *"abcdefghi")] + [NOTHING]),
            "the history of 'zoe' has no items",
        ),
        (
            lambda s, h: s.append([History("zoe", items=[1000])]),
            "the session has no history of 'zoe'; give it to encode",
        ),
        (lambda s, h: s.user_embeddings([h.user], at=5), "a history has an event at"),
    ],
)
def test_mistakes_are_refused_and_change_nothing(
    session: Session, long: History, mistake: Callable[[Session, History], None], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        mistake(session, long)


def test_an_append_that_fails_while_it_computes_changes_no_user(
    retrieval: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = [part(history, 0, 4) for history in retrieval.histories(range(100, 103))]
    session, before = retrieval.session(MEGABYTE), torch.cat([vectors_of(retrieval, user) for user in users])
    session.encode(users)
    write, writes = session._cache.write, itertools.count()

    def fail_late(*args: Any) -> None:
        if next(writes) == 3:  # the second of two layers of the second user
            raise MemoryError
        write(*args)

    monkeypatch.setattr(session._cache, "write", fail_late)
    with pytest.raises(MemoryError):
        session.append([events_of(user, 2) for user in users])
    assert_equal(session.user_embeddings([user.user for user in users]), before)


def test_threads_lose_no_event_and_read_the_vectors_of_their_users(mesh: Mesh, tmp_path: Path) -> None:
    data = write_small_store(tmp_path / "store", **walks())
    options = {"dataset": {"max_sequence_length": 100}, "optimizer": {"ema_decay": 0.5}}
    model = untrained("retrieval", data, mesh, tmp_path / "run", **options)  # its averages are not its weights
    users = list(model.histories(range(100, 120)))
    expected = model.user_embeddings([user.user for user in users])
    session = model.session(10 * 2 * 2 * 16 * 4 * 32, page_tokens=32)  # 7 pages for the longest history, 3 for others
    growing = replace(users[0], user="growing")
    session.encode([*users, growing])

    def work(seed: int) -> None:
        for row in np.random.default_rng(seed).integers(0, len(users), 10):
            session.append([events_of(growing, 1)])
            read = (session, model)[row % 2].user_embeddings([users[row].user])
            assert_equal(read, expected[row : row + 1])

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    later = events_of(growing, 80, timestamps=[LATER[0]] * 80)
    names = ("items", "actions", "timestamps")
    grown: dict[str, Any] = {name: [*getattr(growing, name), *getattr(later, name)] for name in names}
    assert_equal(session.user_embeddings(["growing"]), vectors_of(model, replace(growing, **grown)))
    assert session.statistics.evictions > 10
