"""One model, applied in each way there is, has one set of metrics: trained, exported, from a cache, and served.

Exports of models with other settings (slow) compute what the models compute. A score has one meaning: it is the same in
an evaluation, in a file of predictions and in an export. Evaluation and use agree on the items that a
user has had, too: RetrievalArgs.filter_seen is the policy of both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu import api
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.serve import runtime
from hstu.serve.command import Candidates
from hstu.serve.contents import caveats
from hstu.serve.export import TOLERANCE as ROUNDING
from hstu.serve.export import difference
from hstu.serve.loaded import LoadedModel
from hstu.serve.predict import Evaluation, RankingPredictor, RetrievalPredictor, evaluate_split
from hstu.serve.runtime import Candidates as Shown
from hstu.serve.runtime.files import read_tensors, tables_of
from hstu.serve.runtime.inputs import Query
from hstu.serve.server.model import RecommendRequest, ServedModel
from hstu.train.evaluate import RetrievalEvaluator
from tests.conftest import write_small_store
from tests.serve.http_server import running
from tests.serve.served import BIAS, EVERY_FEATURE, Served, feature_store, largest_difference, random_model, serve
from tests.train.tiny import ITEMS, OF_THE_ACTION, tiny_config, walks

TOLERANCE = 1e-4
Predict = Callable[[api.History, list[Any], int], Any]
"""History, candidates, time of the request → what the model predicts for each: a cosine, or logits of the classes."""


def of_program(exported: Path, _: Mesh) -> Iterator[Predict]:
    model = runtime.load(exported / "serving")

    def predict(history: api.History, candidates: list[Any], at: int) -> Any:
        asked = at if model.reads_request_time else None
        return model.predict_batch([as_request(history)], [candidates], asked)[0].numpy()

    yield predict


def of_cache(exported: Path, _: Mesh) -> Iterator[Predict]:
    """The keys and values of the first half of a history come from a request before."""
    model = runtime.load(exported / "serving")

    def predict(history: api.History, candidates: list[Any], at: int) -> Any:
        whole, kept = as_request(history), list[Any]([None])
        for count in ((len(whole.items) + 1) // 2, len(whole.items)):
            part = whole.cut(slice(count))
            asked = Query(part, Shown(candidates), at if model.reads_request_time else None, kept[-1], True)
            (encoded,) = model.encode_batch([asked])
            (output,) = model.run([encoded], lambda _, prefix: kept.append(prefix))
        return model.outputs_of(candidates, output).numpy()

    yield predict


def of_server(exported: Path, _: Mesh) -> Iterator[Predict]:
    with running(exported / "serving") as client:
        facts = client.get("/model").json

        def predict(history: api.History, candidates: list[Any], at: int) -> Any:
            request = {key: value for key, value in vars(as_request(history)).items() if value}
            asked = {"at": at} if facts["reads"]["request_time"] else {}
            reply = client.post("/score", {**request, **asked, "candidates": candidates})
            assert reply.status == 200, reply.text
            scores = reply.json["scores"]
            if facts["task"] == "retrieval":
                return np.array(scores["score"])
            return np.log([values for name, values in scores.items() if name.startswith("p_")]).T

        yield predict


def as_request(history: api.History) -> runtime.History:
    """The history in Python's own types, as JSON has them."""
    values = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in vars(history).items()}
    context = {key: np.asarray(value).item() for key, value in history.context.items()}
    return runtime.History(**{**values, "context": context, "user": np.asarray(history.user).item()})


def predicted_again(evaluation: Evaluation, predict: Predict, store: SequenceStore) -> np.ndarray:
    """The results of an evaluation, computed in another way; nan where the model had no event before the item."""
    found, seen = evaluation.observations, dict[int, int]()
    users = list(api.histories(store))
    everything = store.raw_ids(store.item_feature).tolist()
    is_retrieval = isinstance(evaluation.evaluator, RetrievalEvaluator)
    results = np.full_like(found.results, np.nan)
    for row, (user, before) in enumerate(zip(found.users, found.history, strict=True)):
        whole = users[user]
        assert whole.timestamps is not None
        if is_retrieval:
            place = len(whole.items) - 1
        else:
            place = max(0, len(whole.items) - 8) + seen.get(user, 0)
            seen[user] = seen.get(user, 0) + 1
        if before == 0:
            continue
        history, at = whole.cut(slice(place - before, place)), int(whole.timestamps[place])
        target = np.asarray(whole.items).tolist()[place]
        if is_retrieval:
            unseen = [item for item in everything if item not in whole.items[:place] or item == target]
            clocks = (at, int(whole.timestamps[place - 1]))[: results.shape[1]]
            scores = np.stack([predict(history, unseen, clock).reshape(-1) for clock in clocks])
            results[row] = 1 + (scores > scores[:, unseen.index(target), None]).sum(axis=1)
        else:
            results[row] = predict(history, [target], at)[0]
    return results


WAYS: dict[str, Any] = {"program": of_program, "cache": of_cache, "server": of_server}


@pytest.mark.parametrize("name", ["retrieval", "ranking"])
@pytest.mark.parametrize("way", WAYS)
def test_metrics_are_those_of_the_checkpoint(
    way: str,
    name: str,
    exported: Callable[[str], Path],
    loaded: Callable[[str], LoadedModel],
    store: SequenceStore,
    mesh: Mesh,
) -> None:
    model = loaded(name)
    split = model.with_data().final_splits[-1]
    trained, of_weights = (
        evaluate_split(model, split),
        evaluate_split(LoadedModel.load(exported(name), mesh=mesh), split),
    )
    assert of_weights.metrics() == trained.metrics()
    predict = next(ways := WAYS[way](exported(name), mesh))
    results = predicted_again(trained, predict, store)
    ways.close()
    has_history = ~np.isnan(results.reshape(len(results), -1)).any(axis=1)
    assert has_history.sum() > len(results) / 2
    checked = trained.observations.select(has_history)
    expected = trained.evaluator.metrics(checked)
    again = trained.evaluator.metrics(replace(checked, results=results[has_history].astype(checked.results.dtype)))
    assert again == pytest.approx(expected, abs=TOLERANCE)
    if name == "ranking":
        probabilities = [
            torch.as_tensor(values).double().softmax(1) for values in (results[has_history], checked.results)
        ]
        torch.testing.assert_close(*probabilities, atol=TOLERANCE, rtol=0)


# --- exports of models with other settings ---

WINDOW = {"max_attention_span": 3, "min_full_attention_tokens": 2, "truncate_after_layer": 1, "truncate_to_items": 3}
ADDED = {"interleave_actions": False, "contextual_embedding_dim": 6}
SEES_ALL = {"is_causal": False, "disable_contextual_mask": False}
FACTORS = {"num_factors": 2}
CANDIDATES = {"max_num_candidates": 3}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "time of the last event, raw ids": (
        "retrieval",
        {"network": BIAS, "dataset": {"query_time": "last_event"}, "dynamic": True, "raw": True},
    ),
    "averages": ("retrieval", {"optimizer": {"ema_decay": 0.5}}),
    "every feature": ("retrieval", {"network": BIAS, "dataset": EVERY_FEATURE}),
    "no actions": (
        "retrieval",
        {
            "dataset": {
                "action_feature_name": "",
                "side_feature_names": ["device", "watched"],
                "known_after": ["watched"],
            }
        },
    ),
    "window and truncation": ("retrieval", {"network": {**BIAS, **WINDOW}}),
    "raw ids, tower": (
        "retrieval",
        {
            "dynamic": True,
            "raw": True,
            "dataset": {"side_feature_names": ["colour", "tags"]},
            "task_args": {"item_tower": True},
        },
    ),
    "every event": ("ranking", {"network": {**BIAS, **FACTORS}, "dataset": EVERY_FEATURE}),
    "every event, window and truncation": ("ranking", {"network": {**BIAS, **WINDOW}}),
    "bit tasks": ("ranking", {"task_args": {"prediction_head_arch": [8, 2], "num_tasks": 2}}),
    "candidates, added actions": (
        "ranking",
        {
            "network": {**BIAS, **ADDED, **SEES_ALL},
            "dataset": {**EVERY_FEATURE, **CANDIDATES},
            "task_args": OF_THE_ACTION,
        },
    ),
    "candidates, window and truncation": (
        "ranking",
        {"network": {**BIAS, **WINDOW, **FACTORS}, "dataset": CANDIDATES},
    ),
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, SequenceStore]:
    """Whether raw ids are kept → the data."""
    root = tmp_path_factory.mktemp("stores")
    large = np.sort(np.random.default_rng(0).integers(-(2**60), 2**60, ITEMS)).tolist()
    return {False: feature_store(root / "a"), True: feature_store(root / "b", item_ids=large, raw=("item_id",))}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_an_export_computes_what_the_model_computes(
    mesh: Mesh, stores: dict[bool, SequenceStore], tmp_path: Path, name: str
) -> None:
    task, options = SETTINGS[name]
    options = dict(options)
    trained = random_model(task, stores[options.pop("raw", False)], mesh, tmp_path, **options)
    served = serve(trained, tmp_path / "serving")
    assert largest_difference(trained, served.model) <= ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "largest"), [("bfloat16", 2**-8), ("int8", 1 / 127)])
def test_tables_of_fewer_bits_are_close(
    mesh: Mesh, stores: dict[bool, SequenceStore], tmp_path: Path, dtype: str, largest: float
) -> None:
    trained = random_model("retrieval", stores[False], mesh, tmp_path)
    served = serve(trained, tmp_path / "serving", table_dtype=dtype)
    rows = trained.model.rows_of({"item_id": torch.arange(ITEMS)})["item_id"].detach()
    places = served.model.encoder.items.rows(range(1000, 1000 + ITEMS))
    found = tables_of(read_tensors(served.folder / "tables.safetensors"))["item_id_table"].rows(places)
    assert 0 < ((found - rows).abs() / rows.abs().amax(dim=1, keepdim=True)).max() <= largest


# --- a score has one meaning ---


def test_a_score_does_not_depend_on_the_candidates_beside(ranking: Served) -> None:
    users, names = np.arange(20), [name for name in ranking.model.encoder.known_before if name == "device"]

    def first_of(count: int) -> np.ndarray:
        items = np.tile(np.arange(count), len(users))
        given = Candidates(users, np.full_like(users, count), items, {name: items % 3 for name in names})
        return RankingPredictor(ranking.trained, given, at=10**7).logits(given)[::count]

    for count in (2, 3, 7, 11):
        np.testing.assert_allclose(first_of(count), first_of(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("what", ["weight", "gap", "history"])
def test_the_check_of_an_export_notices_another_weight_or_meaning(
    ranking: Served, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    assert ranking.difference is not None and ranking.difference <= ROUNDING
    if what == "weight":
        weight = ranking.trained.model.dense.get_parameter("task.encoder.layers.0.bias.time_weight")
        monkeypatch.setattr(weight, "data", weight.data + 0.05)
    elif what == "history":  # cut to what fits beside fewer candidates
        monkeypatch.setitem(ranking.model.facts["candidates"], "most", 2)
    else:  # counted from the candidate before
        codes = SequenceStore.time_codes

        def from_the_event_before(store: SequenceStore, feature: str, events: np.ndarray, _: Any = None) -> np.ndarray:
            return codes(store, feature, events)

        monkeypatch.setattr(SequenceStore, "time_codes", from_the_event_before)
    found = difference(ranking.trained, ranking.model)
    assert found is not None and found > 100 * ROUNDING


def test_an_export_says_where_evaluation_and_service_differ(features: SequenceStore, tmp_path: Path) -> None:
    def said(task: str = "ranking", **options: Any) -> str:
        return " ".join(caveats(tiny_config(task, features, tmp_path, **options)))

    window = {"max_attention_span": 3, "min_full_attention_tokens": 2}
    truncated = {"truncate_after_layer": 1, "truncate_to_items": 2}
    assert "min_full_attention_tokens treats the newest events otherwise" in said(network=window)
    assert "truncate_to_items treats" in said(network=truncated)
    assert not said("retrieval", network=truncated) and not said(network=window, dataset={"max_num_candidates": 2})
    requests = {"candidates": "requests"}
    assert "their scores depend on their number" in said(dataset=requests)
    assert not said(dataset={**requests, "max_num_candidates": 2})


TOP = 4


@pytest.mark.parametrize("filter_seen", [True, False])
def test_hits_of_the_evaluation_are_items_that_users_get(
    mesh: Mesh, tmp_path: Path, filter_seen: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The held-out items of half of the users are the first items of their histories."""
    events = walks()
    events["items"] = [[*row[:-1], row[0]] if place % 2 else row for place, row in enumerate(events["items"])]
    store = write_small_store(tmp_path / "store", **events)
    task_args = {"filter_seen": filter_seen, "eval_metrics": (f"HR@{TOP}",)}
    (tmp_path / "manifest.json").write_text("{}")  # of which predictions name the checksum
    trained = random_model("retrieval", store, mesh, tmp_path, task_args=task_args, network={"num_layers": 1})
    served = serve(trained, tmp_path / "serving")
    whole = [*trained.histories_of(np.arange(store.num_users))]
    given, targets = [each.cut(slice(-1)) for each in whole], [each.items[-1] for each in whole]
    repeated = sum(target in each.items for each, target in zip(given, targets, strict=True))
    with caplog.at_level(logging.WARNING):
        expected = trained.evaluate("test")[f"HR@{TOP}"]
    assert repeated and (f"{repeated} of {len(whole)} targets" in caplog.text) == filter_seen

    requests = [RecommendRequest.model_construct(**vars(each), k=TOP) for each in given]
    answers = ServedModel(served.model, "").answer(requests)
    for found in (
        [each.items for each in trained.recommend_for(given, TOP)[0]],
        [each.items for each in served.model.recommend_batch(given, TOP)],
        [[best["item"] for best in each["items"]] for each in answers],  # type: ignore[index]
    ):
        assert np.mean([target in items for items, target in zip(found, targets, strict=True)]) == expected
    rows = RetrievalPredictor(trained, TOP).predict(np.arange(store.num_users)).to_pylist()
    pairs = {(row["user"], row["item"]) for row in rows}
    best = trained.recommend([*store.raw_ids("user_id")], TOP)
    assert pairs == {(each.user, item) for each in best for item in each.items}
    assert pairs.isdisjoint((each.user, item) for each in whole for item in each.items) == filter_seen
