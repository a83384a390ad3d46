"""Compare an exported directory with the model that it was made of, on random requests and on batches of the data."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hstu.base.errors import DataError
from hstu.data.batches.batch import HSTUBatch
from hstu.data.batches.given_requests import GivenRequests
from hstu.serve import runtime
from hstu.serve.histories import BatchEncoder
from hstu.serve.loaded import LoadedModel
from hstu.train.inference import StoredSource

TOLERANCE = 1e-4
"""Largest difference of a score or a number of a vector, relative to 1 + its absolute value."""
_DAY_S = 86_400
_UNKNOWN = -7


@dataclass(frozen=True)
class Requests:
    """Requests of several users at one time."""

    histories: list[runtime.History]
    candidates: list[runtime.Candidates]
    """Items to score, one or more per user; read by ranking alone."""
    at: int | None


@dataclass(frozen=True)
class Change:
    """What another data type does to scores: cosines of retrieval, logits of ranking."""

    mean: float
    largest: float
    """Absolute differences."""
    kept: float | None
    """Retrieval: share of the ten best items of a user that stay among them."""


def random_requests(model: runtime.Model, seed: int = 0, count: int = 10) -> list[Requests]:
    """Requests with known and unknown ids and missing values of everything that a model reads, of all lengths."""
    draw = random.Random(seed)
    longest = model.facts["max_items"]
    lengths = [1, 2, longest + 3, *(draw.randint(1, longest) for _ in range(count - 3))]
    histories = [_history(model, user, length, draw) for user, length in enumerate(lengths)]
    rule = model.facts["candidates"]
    most = min(3, rule["most"] or 3) if rule["trained"] else 3
    shown = [_candidates(model, history, draw.randint(1, most), draw) for history in histories]
    found = [Requests(histories, shown, None)]
    if model.reads_request_time:
        newest = max(int(time) for history in histories for time in history.timestamps or ())
        found.append(Requests(histories, shown, newest + draw.randrange(1, _DAY_S)))
        if model.facts["task"] == "ranking":  # a user who has done nothing yet
            empty = runtime.History(items=[], context=histories[0].context, user=histories[0].user)
            found[-1] = replace(found[-1], histories=[empty, *histories], candidates=[shown[0], *shown])
    return found


def differences(trained: LoadedModel, model: runtime.Model, requests: Requests) -> Tensor:
    """Absolute differences between what model and directory compute, each divided by 1 + its absolute value; 1-D."""
    with torch.no_grad():
        expected, found = expected_answers(trained, model, requests), answers(model, requests)
    return _relative(found, expected)


def differences_on_the_data(trained: LoadedModel, model: runtime.Model, count: int = 10) -> Tensor:
    """The same for users of the data, whom the model reads in batches of the store. Empty where there is no data."""
    source, facts = trained.source, model.facts
    # A candidate that counts as the newest event is none in a batch of the store.
    if isinstance(source, StoredSource) or (facts["task"] == "ranking" and not facts["candidates"]["apart"]):
        return torch.empty(0)
    store, users = source.store, np.arange(min(count, source.store.num_users))
    histories = list(trained.histories_of(users))
    if facts["task"] == "retrieval":
        expected = trained.user_vectors(source.history_batches(users)).cpu()
        return _relative(model.embed_batch(histories), expected)
    # The newest event of each user is shown again.
    newest = np.asarray(store.offsets())[users + 1] - 1
    known = [name for name in model.encoder.known_before if name in store.features and name in histories[0].features]
    values = {name: store.sequence(name)[newest] for name in (store.item_feature, *known)}
    if facts["action"]:  # is not read
        values[facts["action"]] = np.full_like(values[store.item_feature], facts["tasks"][0]["first"])
    requests = GivenRequests(store, users, np.ones_like(users), values)
    logits = torch.zeros(len(users), sum(task["width"] for task in facts["tasks"]))
    for places, batch in source.candidate_batches(requests):
        found = trained.forward(batch).logits
        assert found is not None, "a ranking model has logits"
        logits[places] = found.float().cpu()
    shown = [
        runtime.Candidates(each.items[-1:], {name: each.features[name][-1:] for name in known}) for each in histories
    ]
    return _relative(torch.cat(model.predict_batch(histories, shown)), logits)


def _relative(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).abs().div(1 + expected.abs()).flatten()


def check(trained: LoadedModel, model: runtime.Model) -> float:
    """Return the largest difference on random requests and for users of the data; the tables must be in float32.

    Raises DataError if it is above TOLERANCE: the directory must not be used.
    """
    found = [differences(trained, model, requests) for requests in random_requests(model)]
    worst = float(torch.cat([*found, differences_on_the_data(trained, model)]).nan_to_num(torch.inf).max())
    if worst > TOLERANCE:
        raise DataError(
            f"cannot export a program: it differs from the model by {worst:.2g}, and {TOLERANCE:g} is allowed. "
            "This is a defect of the export for models of this configuration; please report it"
        )
    return worst


def compare(model: runtime.Model, other: runtime.Model) -> Change:
    """How the scores of a directory differ from those of another one of the same model, on random requests."""
    changes, kept = [], []
    for requests in random_requests(model):
        before, after = (_scores(each, requests) for each in (model, other))
        changes.append((after - before).abs().flatten())
        if model.facts["task"] == "retrieval":
            best = (each.topk(min(10, each.shape[1]), dim=1).indices for each in (before, after))
            kept += [len({*a} & {*b}) / len(a) for a, b in zip(*(rows.tolist() for rows in best), strict=True)]
    joined = torch.cat(changes)
    return Change(float(joined.mean()), float(joined.max()), sum(kept) / len(kept) if kept else None)


def _scores(model: runtime.Model, requests: Requests) -> Tensor:
    """Logits of the candidates, or cosines of users and items."""
    found = answers(model, requests)
    if model.facts["task"] == "ranking":
        return found
    users, items = found[: len(requests.histories)], found[len(requests.histories) :]
    return users @ items.t()


def answers(model: runtime.Model, requests: Requests) -> Tensor:
    """Vectors of users and items, or the logits of all candidates; [n, width]."""
    if model.facts["task"] == "ranking":
        return torch.cat(model.predict_batch(requests.histories, requests.candidates, requests.at))
    items = model.encoder.items
    vectors = model.item_vectors([items.value_at(place) for place in range(items.size)])
    return torch.cat([model.embed_batch(requests.histories, requests.at), vectors])


def expected_answers(trained: LoadedModel, model: runtime.Model, requests: Requests) -> Tensor:
    """The same, computed by the model as in evaluation."""
    if model.facts["task"] == "ranking":
        return torch.cat(list(_logits(trained, model, requests)))
    queries = trained.user_vectors(trained.encoder.batches(requests.histories), requests.at)
    return torch.cat([queries.cpu(), _item_vectors(trained, model)])


def _item_vectors(trained: LoadedModel, model: runtime.Model) -> Tensor:
    """Vectors of all items in the order of the directory; zeros for those that are no candidates."""
    corpus = trained.retrieval_evaluator().corpus()
    vectors = corpus.vectors()
    items = trained.vocabularies[trained.source.roles.item].values_at(corpus.ids.cpu())
    found = torch.zeros(model.encoder.items.size, vectors.shape[1])
    found[model.encoder.items.places(items)] = vectors
    return found


def _logits(trained: LoadedModel, model: runtime.Model, requests: Requests) -> Iterator[Tensor]:
    """Logits of the candidates: together, as in training with candidates; else each as the newest event."""
    encoder = BatchEncoder(trained.config, trained.source, trained.vocabularies, model.facts)
    is_trained, sequences = model.facts["candidates"]["trained"], []
    for history, shown in zip(requests.histories, requests.candidates, strict=True):
        count = len(shown.items)
        events = encoder.history(history, requests.at, model.facts["max_items"] - (count if is_trained else 1))
        parts = encoder.candidates(shown, history, requests.at, 1 if is_trained else count)
        sequences += [(events, part) for part in parts]
    first = 0
    for batch in encoder.batches_of(sequences):
        counts = [0 if shown is None else shown.length for _, shown in sequences[first : first + batch.real_batch_size]]
        first += batch.real_batch_size
        logits = trained.forward(_labelled(trained, model, batch, counts)).logits
        assert logits is not None, "a ranking model has logits"
        yield logits.cpu()


def _labelled(trained: LoadedModel, model: runtime.Model, batch: HSTUBatch, counts: Sequence[int]) -> HSTUBatch:
    """The batch with the newest ``counts`` items of each sequence labelled, and as candidates if they are any."""
    labels = np.zeros(batch.batch_size, dtype=np.int64)
    labels[: len(counts)] = counts
    total = int(labels.sum())
    shown = labels if model.facts["candidates"]["trained"] else np.zeros_like(labels)
    names = trained.source.roles.labels
    return replace(
        batch,
        num_candidates=torch.from_numpy(shown),
        num_candidates_host=shown,
        num_labels=torch.from_numpy(labels),
        num_labels_host=labels,
        labels=torch.full((total,), model.facts["tasks"][0]["first"]),
        label_values=torch.full((len(names), total), torch.nan) if names else None,
    )


def _history(model: runtime.Model, user: int, length: int, draw: random.Random) -> runtime.History:
    facts, times, now = model.facts, [], 1_000_000_000 + draw.randrange(_DAY_S)
    for _ in range(length):
        times.append(now)
        now += draw.choice((0, 30, draw.randrange(40 * _DAY_S)))
    chosen = [name for name in facts["contextual"] if draw.random() < 0.8]
    return runtime.History(
        items=_values(model, facts["item"], length, draw),
        actions=_values(model, facts["action"], length, draw, unknown=False) if facts["action"] else None,
        timestamps=times if facts["reads_times"] else None,
        context={name: _values(model, name, 1, draw)[0] for name in chosen},
        features={
            name: _of_events(model, name, length, draw)
            for name, must in model.encoder.given_features.items()
            if must or draw.random() < 0.3
        },
        user=user,
    )


def _candidates(model: runtime.Model, history: runtime.History, count: int, draw: random.Random) -> runtime.Candidates:
    names = [name for name in model.encoder.known_before if name in history.features]
    items = _values(model, model.facts["item"], count, draw)
    return runtime.Candidates(items, {name: _of_events(model, name, count, draw) for name in names})


def _of_events(model: runtime.Model, name: str, count: int, draw: random.Random) -> list[Any]:
    """Values of a feature, None among them."""
    widths = {entry["name"]: entry["width"] for entry in model.facts["numbers"]}
    found: list[Any]
    if name in widths:
        numbers = [[draw.gauss(0, 3) for _ in range(widths[name])] for _ in range(count)]
        found = [number[0] if widths[name] == 1 else number for number in numbers]
    elif model.facts["features"][name]["is_list"]:
        found = [_values(model, name, draw.randint(0, 3), draw) for _ in range(count)]
    else:
        found = _values(model, name, count, draw)
    return [None if draw.random() < 0.1 else value for value in found]


def _values(model: runtime.Model, feature: str, count: int, draw: random.Random, unknown: bool = True) -> list[Any]:
    """Known values of a feature, and now and then an unknown one."""
    vocabulary = model.encoder.vocabularies[feature]
    return [
        _UNKNOWN
        if not vocabulary.size or (unknown and draw.random() < 0.05)
        else vocabulary.value_at(draw.randrange(vocabulary.size))
        for _ in range(count)
    ]
