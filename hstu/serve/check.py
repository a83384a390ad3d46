"""Compare an exported directory with the model that it was made of, on random requests."""

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
from hstu.serve import runtime
from hstu.serve.loaded import LoadedModel
from hstu.train.given_histories import History, HistoryEncoder
from hstu.train.inference import asked_at

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
    most = 1 if _reads(model, "time_gap") else 3  # for the model, that of a candidate depends on the one before it
    if rule["trained"] and rule["most"]:
        most = min(most, rule["most"])
    shown = [_candidates(model, history, draw.randint(1, most), draw) for history in histories]
    found = [Requests(histories, shown, None)]
    if model.reads_request_time:
        newest = max(int(time) for history in histories for time in history.timestamps or ())
        found.append(Requests(histories, shown, newest + draw.randrange(1, _DAY_S)))
        if model.facts["task"] == "ranking":  # a user who has done nothing yet
            empty = runtime.History([], context=histories[0].context, user=histories[0].user)
            found[-1] = replace(found[-1], histories=[empty, *histories], candidates=[shown[0], *shown])
    return found


def differences(trained: LoadedModel, model: runtime.Model, requests: Requests) -> Tensor:
    """Absolute differences between what model and directory compute, each divided by 1 + its absolute value; 1-D."""
    with torch.no_grad():
        expected, found = expected_answers(trained, model, requests), answers(model, requests)
    return (found - expected).abs().div(1 + expected.abs()).flatten()


def check(trained: LoadedModel, model: runtime.Model) -> float:
    """Return the largest difference on random requests; the tables must be in float32.

    Raises DataError if it is above TOLERANCE: the directory must not be used.
    """
    worst = max(
        float(differences(trained, model, requests).nan_to_num(torch.inf).max()) for requests in random_requests(model)
    )
    if worst > TOLERANCE:
        raise DataError(
            f"cannot export a program: on random requests it differs from the model by {worst:.2g}, and {TOLERANCE:g} "
            "is allowed. This is a defect of the export for models of this configuration; please report it"
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
    encoder = HistoryEncoder(trained.config, trained.source, trained.vocabularies)
    if model.facts["task"] == "ranking":
        return torch.cat(list(_logits(trained, encoder, model, requests)))
    batches = encoder.batches([_as_given(history) for history in requests.histories])
    if requests.at is not None:
        batches = asked_at(batches, requests.at)
    found = []
    for batch in batches:
        queries = trained.model(batch.to(trained.mesh.device)).queries
        found.append(queries[: batch.real_batch_size].cpu())
    return torch.cat([*found, _item_vectors(trained, model)])


def _item_vectors(trained: LoadedModel, model: runtime.Model) -> Tensor:
    """Vectors of all items in the order of the directory; zeros for those that are no candidates."""
    corpus = trained.retrieval_evaluator().corpus()
    vectors = corpus.vectors()
    names = trained.vocabularies[trained.source.roles.item]
    places = model.encoder.items.places(names.decode(corpus.ids.cpu().numpy()))
    found = torch.zeros(model.encoder.items.size, vectors.shape[1])
    found[places] = vectors
    return found


def _logits(
    trained: LoadedModel, encoder: HistoryEncoder, model: runtime.Model, requests: Requests
) -> Iterator[Tensor]:
    """Logits of the candidates: together, as in training with candidates; else each as the newest event."""
    rule, whole, counts = model.facts["candidates"], [], []
    for history, shown in zip(requests.histories, requests.candidates, strict=True):
        for places in [range(len(shown.items))] if rule["trained"] else [[place] for place in range(len(shown.items))]:
            whole.append(_followed_by(model, history, shown, list(places), requests.at))
            counts.append(len(places))
    first = 0
    for batch in encoder.batches(whole):
        own = counts[first : first + batch.real_batch_size]
        first += batch.real_batch_size
        yield trained.model(_labelled(trained, model, batch, own).to(trained.mesh.device)).logits.cpu()


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


def _followed_by(
    model: runtime.Model, history: runtime.History, shown: runtime.Candidates, places: list[int], at: int | None
) -> History:
    """The history with some candidates as its newest events. What is unknown of them must have no influence."""
    given, count = _as_given(history), len(places)
    last = {name: list(values) + [values[-1]] * count for name, values in given.features.items()}
    for name, values in shown.features.items():
        last[name] = [*last.get(name, ())][: len(history.items)] + [values[place] for place in places]
    if not history.items:
        last |= {name: [None] * count for name in [*model.facts["known_after"], *_numbers_known_after(model)]}
    times = None
    if model.facts["reads_times"]:
        earlier = list(history.timestamps or ())
        times = earlier + [earlier[-1] if at is None else at] * count
    return replace(
        given,
        items=[*history.items, *(shown.items[place] for place in places)],
        actions=[*(history.actions or ()), *[1] * count],
        timestamps=times,
        features=last,
    )


def _numbers_known_after(model: runtime.Model) -> list[str]:
    return [entry["name"] for entry in model.facts["numbers"] if entry["known_after"]]


def _as_given(history: runtime.History) -> History:
    return History(**vars(history))


def _reads(model: runtime.Model, feature: str) -> bool:
    return feature in (*model.facts["side"], *model.facts["known_after"])


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
        features={name: _of_events(model, name, length, draw) for name in _given(model, draw)},
        user=user,
    )


def _candidates(model: runtime.Model, history: runtime.History, count: int, draw: random.Random) -> runtime.Candidates:
    facts = model.facts
    before = [*facts["side"], *(entry["name"] for entry in facts["numbers"] if not entry["known_after"])]
    names = [name for name in before if name in history.features]
    items = _values(model, facts["item"], count, draw)
    return runtime.Candidates(items, {name: _of_events(model, name, count, draw) for name in names})


def _given(model: runtime.Model, draw: random.Random) -> list[str]:
    """The features that a history gives: those of events and, sometimes, of items."""
    facts = model.facts
    names = [*facts["side"], *facts["known_after"], *(entry["name"] for entry in facts["numbers"])]
    return [
        name
        for name in names
        if facts["features"].get(name, {}).get("kind") != "time"
        and (not model.encoder.knows_of_items(name) or draw.random() < 0.3)
    ]


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
