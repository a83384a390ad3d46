"""Answers from cached keys and values are those of the trainer, whatever came in whatever order before."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from hstu.data.store.sequence_store import SequenceStore
from hstu.model.program import ServingProgram
from hstu.parallel.mesh import Mesh
from hstu.serve import runtime
from hstu.serve.runtime import Candidates, History, Model
from hstu.serve.runtime.cache import Prefix, PrefixCache
from hstu.serve.runtime.inputs import Query
from hstu.serve.server.model import RecommendRequest, ServedModel
from hstu.serve.server.swap import load
from tests.serve.served import (
    BIAS,
    EVERY_FEATURE,
    Requests,
    Served,
    Tensors,
    answers_of_the_trainer,
    export_with,
    random_model,
    random_requests,
    serve,
)  # fmt: skip

CAUSAL: dict[str, Any] = {"disable_contextual_mask": True, "num_layers": 2}
TOWER: dict[str, Any] = {"task_args": {"item_tower": True}, "dataset": {"side_feature_names": ["colour", "time_gap"]}}
WINDOW: dict[str, Any] = {"max_attention_span": 3, "min_full_attention_tokens": 4}
LAYOUTS: dict[str, Any] = {
    "times and an item tower": ("retrieval", {"network": {**CAUSAL, **BIAS}, **TOWER}),
    "one token per event": ("retrieval", {"network": {**CAUSAL, **BIAS, "interleave_actions": False}}),
    "a window": ("retrieval", {"network": {**CAUSAL, **BIAS, **WINDOW}}),
    "candidates": ("ranking", {"network": {**CAUSAL, **BIAS}, "dataset": {**EVERY_FEATURE, "max_num_candidates": 3}}),
    "the newest event is scored": ("ranking", {"network": {**CAUSAL, **BIAS}, "dataset": EVERY_FEATURE}),
    "a window and the newest event": ("ranking", {"network": {**CAUSAL, **WINDOW}, "dataset": EVERY_FEATURE}),
    "a window and candidates": (
        "ranking", {"network": {**CAUSAL, **WINDOW}, "dataset": {**EVERY_FEATURE, "max_num_candidates": 2}},
    ),
}  # fmt: skip
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list(LAYOUTS)[1:]]


class Asked:
    """A user whose events come in any order, and what is cached of them."""

    def __init__(self, history: History, shown: Candidates, at: int | None) -> None:
        self.whole, self.shown, self.at = history, shown, at
        self.missing = [*range(len(history.items))]
        self.prefix: Prefix | None = None

    def take(self, draw: random.Random) -> None:
        """Some events come, mostly the next ones."""
        for _ in range(draw.choice((0, 1, 1, 2, len(self.missing)))):
            if self.missing:
                self.missing.pop(0 if draw.random() < 0.8 else draw.randrange(len(self.missing)))
        if draw.random() < 0.1:
            self.prefix = None

    @property
    def history(self) -> History:
        known = [place for place in range(len(self.whole.items)) if place not in self.missing]
        return self.whole.changed(lambda values: [values[place] for place in known])


@pytest.mark.parametrize("name", ["times and an item tower", *SLOW])
def test_answers_are_those_of_the_trainer(name: str, features: SequenceStore, mesh: Mesh, tmp_path: Path) -> None:
    task, options = LAYOUTS[name]
    served = serve(random_model(task, features, mesh, tmp_path, **options), tmp_path / "serving")
    model, draw, reused, computed = served.model, random.Random(0), 0, 0
    assert model.whole_because is None
    groups = random_requests(model)
    users = [Asked(*each, own.at) for own in groups for each in zip(own.histories, own.candidates, strict=True)]
    for _ in range(12):
        for user in users:
            user.take(draw)
        asked = [user for user in draw.sample(users, 8) if user.history.items]
        encoded = [encode(model, user) for user in asked]
        reused += sum(parts[0].cached_items for parts in encoded)
        computed += sum(parts[0].events.length for parts in encoded)
        kept: dict[int, Prefix] = {}
        for place, (user, output) in enumerate(zip(asked, model.run(encoded, kept.__setitem__), strict=True)):
            user.prefix = kept[place]
            (expected,) = answers_of_the_trainer(served.trained, model, Requests([user.history], [user.shown], user.at))
            assert float(((output - expected).abs() / (1 + expected.abs())).max()) <= 1e-5
    assert reused > 100 and computed > 100
    for user in users:
        (expected,) = answers_of_the_trainer(served.trained, model, Requests([user.whole], [user.shown], user.at))
        for late in range(len(user.whole.items)):
            user.missing, user.prefix = [late], None
            if user.history.items:
                model.run([encode(model, user)], kept.__setitem__)
                user.prefix = kept[0]
            user.missing = []
            (output,) = model.run([encode(model, user)])
            assert float(((output - expected).abs() / (1 + expected.abs())).max()) <= 1e-5, f"event {late} came late"


def encode(model: Model, user: Asked) -> Any:
    shown = user.shown if model.facts["task"] == "ranking" else None
    return model.encode_batch([Query(user.history, shown, user.at, user.prefix, caches=True)])[0]


@pytest.mark.parametrize(
    ("task", "network", "reason"),
    [
        ("retrieval", {"is_causal": False}, "is_causal = False: events see later ones"),
        ("ranking", {"disable_contextual_mask": False}, "context sees the whole history"),
        ("ranking", {"truncate_after_layer": 1, "truncate_to_items": 2}, "truncate_after_layer: each event moves"),
    ],
)
def test_layouts_in_which_a_new_event_changes_earlier_ones_are_computed_whole(
    task: str, network: dict[str, Any], reason: str, features: SequenceStore, mesh: Mesh, tmp_path: Path
) -> None:
    trained = random_model(task, features, mesh, tmp_path, network={"num_layers": 2, **network})
    assert reason in str(ServingProgram(trained.task).whole_because)


def test_the_server_says_at_start_why_it_keeps_no_keys_and_values(
    retrieval: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, "hstu"):
        load(retrieval.folder, "first@1", None)
        assert "no keys and values" not in caplog.text
        monkeypatch.setitem(retrieval.model.facts, "whole_because", "a reason")
        monkeypatch.setattr(runtime, "load", lambda *_, **__: Model(retrieval.model.contents))
        load(retrieval.folder, "first@1", None)
    assert "no keys and values are kept model=first@1 reason=a reason" in caplog.text


def test_a_swap_never_mixes_two_models(retrieval: Served, tmp_path: Path) -> None:
    def reverse(tables: Tensors, _: Tensors) -> None:
        tables["item_vectors"] *= -1

    other = export_with(retrieval.folder, tmp_path / "other", reverse)
    models = [ServedModel(retrieval.model, "a"), load(other, "b", None)]
    cache, draw = PrefixCache(1 << 20), random.Random(0)
    events = [{"items": [1000 + place % 9], "actions": [1], "timestamps": [60 * place]} for place in range(7)]
    for count in range(1, 8):
        for served in draw.sample(models, 2):
            columns = {name: [each[name][0] for each in events[:count]] for name in events[0]}
            requests = [RecommendRequest.model_validate({**columns, "user": user, "k": 3}) for user in ("x", "y")]
            found, expected = served.answer(requests, cache), served.answer(requests)
            for answer, whole in zip(found, expected, strict=True):
                assert isinstance(answer, dict) and isinstance(whole, dict)
                assert [each["item"] for each in answer["items"]] == [each["item"] for each in whole["items"]]
                for ours, theirs in zip(answer["items"], whole["items"], strict=True):
                    assert ours["score"] == pytest.approx(theirs["score"], abs=1e-6)
            assert cache.find("x", served.version) is not None
            assert cache.find("x", ({"a", "b"} - {served.version}).pop()) is None


def test_users_that_asked_longest_ago_leave_a_full_cache() -> None:
    prefix = Prefix(History(items=[]), 0, keys_values=Tensor(1, 2, 1, 1, 64))
    cache = PrefixCache(3 * prefix.num_bytes)
    for user in ("a", "b", "c"):
        cache.put(user, "m", prefix)
    assert cache.find("a", "m") is prefix and cache.find("b", "other") is None
    cache.put("d", "m", prefix)
    assert cache.find("b", "m") is None and cache.find("a", "m") is prefix and cache.num_bytes == cache.max_bytes
    cache.drop("a")
    assert cache.find("a", "m") is None and cache.num_bytes == 2 * prefix.num_bytes
    PrefixCache(0).put("a", "m", prefix)
