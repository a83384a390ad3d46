"""Random requests, good and bad, to a model with every kind of feature: a bad one never harms those beside it."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from hstu.serve.runtime import ServingError
from hstu.serve.server.model import Answer, ScoreRequest, ServedModel
from tests.serve.random_requests import random_requests
from tests.serve.served import Served

_NOTHING: list[Any] = [None, [], [None], {}, "", True, 1.5, -1, 10**400, 2**63, 1e308, "\ud800", [["x"]], [1, "x"]]


def good_requests(served: Served) -> list[dict[str, Any]]:
    requests = random_requests(served.model)[0]
    return [
        asdict(history) | {"candidates": shown.items, "candidate_features": dict(shown.features)}
        for history, shown in zip(requests.histories, requests.candidates, strict=True)
    ]


def mutated(request: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The request with a random part replaced, removed, repeated or swapped."""
    found = json.loads(json.dumps(request))
    place: Any = found
    while True:
        key = draw.choice([*place] if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], (dict, list)) and place[key] and draw.random() < 0.8:
            place = place[key]
            continue
        match draw.randrange(4):
            case 0:
                del place[key]
            case 1 if isinstance(place, list):
                place.append(place[key])
            case 2 if isinstance(place, list):
                place.reverse()
            case _:
                place[key] = draw.choice(_NOTHING)
        return found


def parsed(request: dict[str, Any]) -> ScoreRequest | None:
    try:
        return ScoreRequest.model_validate_json(json.dumps(request))
    except ValidationError:
        return None


def test_bad_requests_never_fail_good_ones_beside_them(ranking: Served) -> None:
    served, draw, good = ServedModel(ranking.model, "fuzzed"), random.Random(0), good_requests(ranking)
    queries = [ScoreRequest(**each) for each in good]
    alone = [answer_of(served, query) for query in queries]
    answered = refused = 0
    for _ in range(150):
        chosen = draw.sample(range(len(good)), 2)
        bad = [query for _ in range(3) if (query := parsed(mutated(draw.choice(good), draw))) is not None]
        *found, first, second = served.answer([*bad, *(queries[place] for place in chosen)])
        for place, answer in zip(chosen, (first, second), strict=True):
            assert isinstance(answer, dict)
            for name, values in answer["scores"].items():
                torch.testing.assert_close(values, alone[place]["scores"][name], rtol=1e-4, atol=1e-4)
        for answer in found:
            assert isinstance(answer, (dict, ServingError)), repr(answer)
            answered, refused = answered + isinstance(answer, dict), refused + isinstance(answer, ServingError)
    assert answered > 30 and refused > 30


def answer_of(served: ServedModel, query: ScoreRequest) -> Answer:
    (answer,) = served.answer([query])
    assert isinstance(answer, dict), answer
    return answer


@pytest.mark.parametrize("step", ["encode", "run"])
def test_a_defect_fails_the_request_that_causes_it(ranking: Served, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    model, served = ranking.model, ServedModel(ranking.model, "one")
    encode, run = model.encode, model.run
    queries = [ScoreRequest(**each) for each in good_requests(ranking)[:4]]

    def encodes(history: Any, *more: Any) -> Any:
        encoded = encode(history, *more)
        if history.items is queries[2].items:
            if step == "encode":
                raise OSError("a defect")
            marked.append(id(encoded))
        return encoded

    def runs(encoded: list[Any]) -> Any:
        if any(id(each) in marked for each in encoded):
            raise MemoryError("a defect")
        return run(encoded)

    marked: list[int] = []
    monkeypatch.setattr(model, "encode", encodes)
    monkeypatch.setattr(model, "run", runs)
    failure = OSError if step == "encode" else MemoryError
    assert [type(each) for each in served.answer(queries)] == [dict, dict, failure, dict]
