"""One model, applied in each way there is, has one set of metrics: trained, exported, from a cache, and served.

Exports of models with other settings (slow) compute what the models compute.
"""

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
from hstu.serve.export import TOLERANCE as ROUNDING
from hstu.serve.loaded import LoadedModel
from hstu.serve.predict import Evaluation, evaluate_split
from hstu.serve.runtime.files import read_tensors, tables_of
from hstu.train.evaluate import RetrievalEvaluator
from scripts import export
from tests.serve.http_server import running
from tests.serve.served import BIAS, EVERY_FEATURE, feature_store, largest_difference, random_model, serve
from tests.train.tiny import ITEMS, OF_THE_ACTION, FinishedRun

TOLERANCE = 1e-4
MEGABYTE = 1 << 20
Predict = Callable[[api.History, list[Any], int], Any]
"""History, candidates, time of the request → what the model predicts for each: a cosine, or logits of the classes."""


@pytest.fixture(scope="module", params=["retrieval", "ranking"])
def name(request: Any) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def exported(name: str, finished: Any, mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The newest checkpoint of a run, exported by the command."""
    run: FinishedRun = finished(name)
    output = tmp_path_factory.mktemp("exported") / name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hstu.serve.loaded.mesh_of_this_process", lambda: mesh)
        patch.setattr(export, "mesh_of_this_process", lambda: mesh)
        assert export.main(["--ckpt", str(run.path.parent / "checkpoints"), "--output", str(output), "--program"]) == 0
    return output


def of_program(exported: Path, _: Mesh) -> Iterator[Predict]:
    model = runtime.load(exported / "serving")

    def predict(history: api.History, candidates: list[Any], at: int) -> Any:
        asked = at if model.reads_request_time else None
        return model.predict_batch([as_request(history)], [candidates], asked)[0].numpy()

    yield predict


def of_cache(exported: Path, mesh: Mesh) -> Iterator[Predict]:
    """The first half of a history is encoded, and the rest is appended."""
    model = api.load(exported, mesh=mesh)
    session = model.session(MEGABYTE)

    def predict(history: api.History, candidates: list[Any], at: int) -> Any:
        half = (len(history.items) + 1) // 2
        session.encode([history.cut(slice(half))])
        if half < len(history.items):
            session.append([history.cut(slice(half, None))])
        return session.score(history.user, candidates, at=at if model.reads_request_time else None).numpy()

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


@pytest.mark.parametrize("way", WAYS)
def test_metrics_are_those_of_the_checkpoint(
    way: str, name: str, exported: Path, loaded: Callable[[str], LoadedModel], store: SequenceStore, mesh: Mesh
) -> None:
    model = loaded(name)
    split = model.with_data().final_splits[-1]
    trained, of_weights = evaluate_split(model, split), evaluate_split(LoadedModel.load(exported, mesh=mesh), split)
    assert of_weights.metrics() == trained.metrics()
    predict = next(ways := WAYS[way](exported, mesh))
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
    "every event": ("ranking", {"network": BIAS, "dataset": EVERY_FEATURE}),
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
    "candidates, window and truncation": ("ranking", {"network": {**BIAS, **WINDOW}, "dataset": CANDIDATES}),
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
