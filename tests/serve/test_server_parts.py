"""Batching, which export is served, rules, and random requests of which a bad one harms no other; without HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from hstu.base.errors import DataError
from hstu.data.store.sequence_store import SequenceStore
from hstu.serve.runtime import ServingError
from hstu.serve.server.batching import Batcher, Compute, Metrics, Overloaded, Settings
from hstu.serve.server.model import Answer, RecommendRequest, ScoreRequest, ServedModel
from hstu.serve.server.rules import Catalog, ItemFile, chosen_items
from hstu.serve.server.swap import LiveModel, find_exports
from tests.serve.http_server import StubLoader, write_folder
from tests.serve.served import Served, random_requests


class Doubler:
    """Computes twice the number, once its gate is open."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate, self.has_begun = threading.Event(), threading.Event()

    def __call__(self, queries: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(queries))
        self.has_begun.set()
        assert self.gate.wait(30)
        if 13 in queries:
            raise RuntimeError("unlucky")
        return [ValueError("negative") if query < 0 else 2 * query for query in queries]

    async def begun(self) -> None:
        await asyncio.to_thread(self.has_begun.wait, 30)


def started(compute: Compute, **settings: float) -> Batcher:
    batcher = Batcher(compute, Settings(**settings), Metrics())  # type: ignore[arg-type]
    batcher.start()
    return batcher


@pytest.mark.parametrize(
    ("max_batch", "sizes", "expected"),
    [
        (4, [1] * 7, [[1, 2, 3, 4], [5, 6, 7]]),
        (2, [9000, 9000, 9000, 5], [[4], [1], [2], [3]]),  # the small one first; no two large ones together
        (2, [9000, 5, 5, 5, 5, 5, 5], [[2, 3], [1], [4, 5], [6, 7]]),  # many small ones do not starve a large one
        (2, [200, 5, 100], [[1, 2], [3]]),  # of small ones, the oldest first
    ],
)
def test_queries_that_come_meanwhile_are_computed_together_and_small_ones_overtake_large_ones(
    max_batch: int, sizes: list[int], expected: list[list[int]]
) -> None:
    async def main() -> list[int]:
        batcher = started(compute, max_batch=max_batch)
        first = asyncio.create_task(batcher.ask(0))
        await compute.begun()
        others = [asyncio.create_task(batcher.ask(number, size)) for number, size in enumerate(sizes, 1)]
        await asyncio.sleep(0)
        compute.gate.set()
        answers = await asyncio.gather(first, *others)
        await batcher.close()
        return answers

    compute = Doubler()
    assert asyncio.run(main()) == [2 * number for number in range(len(sizes) + 1)]
    assert compute.batches == [[0], *expected]


def test_equally_small_queries_of_all_clients_come_in_turn() -> None:
    """Those of one that asks all the time do not come before those of one that asks now and then."""

    async def main() -> None:
        batcher = started(compute, max_batch=2)
        first = asyncio.create_task(batcher.ask(0, 1, "busy"))
        await compute.begun()
        busy = [asyncio.create_task(batcher.ask(number, 1, "busy")) for number in range(1, 7)]
        await asyncio.sleep(0)
        asked = ((10, "a"), (20, "b"), (11, "a"))
        others = [asyncio.create_task(batcher.ask(number, 1, client)) for number, client in asked]
        await asyncio.sleep(0)
        compute.gate.set()
        await asyncio.gather(first, *busy, *others)
        await batcher.close()

    compute = Doubler()
    asyncio.run(main())
    assert compute.batches == [[0], [10, 20], [1, 11], [2, 3], [4, 5], [6]]


def test_the_event_loop_computes_small_queries_that_wait_alone_if_it_may() -> None:
    async def main() -> None:
        batcher = started(lambda queries: [threading.current_thread() is threading.main_thread()] * len(queries))
        asked = ((255, True), (256, True), (255, False))
        assert [await batcher.ask(0, size, in_loop=in_loop) for size, in_loop in asked] == [True, False, False]
        assert await asyncio.gather(*(batcher.ask(0, in_loop=True) for _ in range(2))) == [False, False]
        await batcher.close()

    asyncio.run(main())


def test_too_many_waiting_queries_are_refused() -> None:
    async def main() -> None:
        batcher = started(compute, max_waiting=2, max_batch=1)
        first = asyncio.create_task(batcher.ask(1))
        await compute.begun()
        waiting = [asyncio.create_task(batcher.ask(number)) for number in (2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="try again in 1 s") as refused:
            await batcher.ask(4)
        assert refused.value.retry_after_s == 1
        first.cancel()  # is being computed; the others must get their own answers all the same
        await asyncio.sleep(0)
        compute.gate.set()
        assert await asyncio.gather(*waiting) == [4, 6]
        await batcher.close()

    compute = Doubler()
    asyncio.run(main())


def test_a_mistake_costs_its_query_and_a_defect_its_batch() -> None:
    async def main() -> None:
        batcher = started(compute, max_batch=2)
        found = await asyncio.gather(batcher.ask(-1), batcher.ask(1), return_exceptions=True)
        assert isinstance(found[0], ValueError) and found[1] == 2
        unlucky = await asyncio.gather(batcher.ask(13), batcher.ask(1), return_exceptions=True)
        assert [type(error) for error in unlucky] == [RuntimeError, RuntimeError]
        assert await asyncio.gather(batcher.ask(3), batcher.ask(4)) == [6, 8]
        waiting = asyncio.create_task(batcher.ask(5))
        await asyncio.sleep(0)
        await batcher.close()
        assert await waiting == 10  # closing answers what waits

    compute = Doubler()
    compute.gate.set()
    asyncio.run(main())


def written(folder: Path, content: str, at: int) -> Path:
    """As ``write_folder``, with a manifest of a given time."""
    write_folder(folder, content)
    os.utime(folder / "manifest.json", ns=(at, at))
    return folder


def name_of(live: LiveModel) -> str:
    return live.current.version.split("@")[0]


def test_an_export_a_folder_of_exports_and_a_link_are_found(tmp_path: Path) -> None:
    old, new = written(tmp_path / "all/old/serving", "", 1), written(tmp_path / "all/new", "", 2)
    for unfinished in (".writing_next/serving", ".writing_next"):
        written(tmp_path / "all" / unfinished, "", 3)
    assert [each.folder for each in find_exports(tmp_path / "all")] == [new, old]
    assert [each.folder for each in find_exports(tmp_path / "all/old")] == [old]
    assert [each.folder for each in find_exports(old)] == [old]
    (tmp_path / "all/latest").symlink_to("old")
    assert [each.folder for each in find_exports(tmp_path / "all")] == [old]
    (tmp_path / "all/latest").unlink()
    (tmp_path / "all/latest").symlink_to("nowhere")
    assert find_exports(tmp_path / "all") == []


def test_a_newer_export_replaces_the_model_and_a_bad_one_does_not(tmp_path: Path) -> None:
    written(tmp_path / "a", "", 1)
    load = StubLoader()
    live = LiveModel(tmp_path, Metrics(), load)
    assert name_of(live) == "a" and not live.refresh()
    written(tmp_path / "b", "", 2)
    assert live.refresh() and name_of(live) == "b"
    for number, content in enumerate(("bad: a byte has changed", "broken", "ranking")):
        written(tmp_path / content[:3], content, 3 + number)
    (tmp_path / "half").mkdir()
    (tmp_path / "half/serving.json").write_text("no manifest yet")
    assert not live.refresh() and name_of(live) == "b"
    assert live.refused == {
        str(tmp_path / "bad"): "ServingError: bad: a byte has changed",
        str(tmp_path / "bro"): "KeyError: 'broken'",
        str(tmp_path / "ran"): "ServingError: it is a ranking model, and a retrieval model is in use",
    }
    loaded = len(load.models)
    assert not live.refresh() and len(load.models) == loaded  # a bad one is not loaded again and again
    written(tmp_path / "bad", "repaired", 9)
    shutil.rmtree(tmp_path / "ran")
    assert live.refresh() and name_of(live) == "bad" and [*live.refused] == [str(tmp_path / "bro")]


def test_a_model_whose_folder_is_damaged_goes_on_and_one_that_is_removed_gives_way_to_an_older(tmp_path: Path) -> None:
    written(tmp_path / "a", "", 1)
    newer = written(tmp_path / "b", "", 2)
    live = LiveModel(tmp_path, Metrics(), StubLoader())
    written(newer, "bad: copied over", 2)
    assert not live.refresh() and name_of(live) == "b" and list(live.refused) == [str(newer)]
    shutil.rmtree(newer)
    assert live.refresh() and name_of(live) == "a" and not live.refused
    shutil.rmtree(tmp_path / "a")
    assert not live.refresh() and name_of(live) == "a"


def test_a_place_without_a_good_export_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="hstu-export --program"):
        LiveModel(tmp_path, Metrics(), StubLoader())
    write_folder(tmp_path / "worse", "bad: old format")
    with pytest.raises(DataError, match="worse: ServingError: bad: old format"):
        LiveModel(tmp_path, Metrics(), StubLoader())
    written(tmp_path / "fine", "", 1)
    live = LiveModel(tmp_path, Metrics(), StubLoader())
    assert name_of(live) == "fine" and len(live.refused) == 1  # the newest is bad, the one before serves


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
    encode, run = model.encode_batch, model.run
    queries = [ScoreRequest(**each) for each in good_requests(ranking)[:4]]

    def encodes(asked: Any) -> Any:
        encoded = encode(asked)
        for each, own in zip(asked, encoded, strict=True):
            if each.history.items is queries[2].items:
                if step == "encode":
                    raise OSError("a defect")
                marked.append(id(own))
        return encoded

    def runs(encoded: list[Any], *more: Any) -> Any:
        if any(id(each) in marked for each in encoded):
            raise MemoryError("a defect")
        return run(encoded, *more)

    marked: list[int] = []
    monkeypatch.setattr(model, "encode_batch", encodes)
    monkeypatch.setattr(model, "run", runs)
    failure = OSError if step == "encode" else MemoryError
    assert [type(each) for each in served.answer(queries)] == [dict, dict, failure, dict]


def recommend(**fields: Any) -> RecommendRequest:
    return RecommendRequest.model_validate(fields)


def _steps(scores: np.ndarray, asked: RecommendRequest, categories: np.ndarray, vectors: np.ndarray) -> Any:
    """Oracle of the rules over all items: a function that checks the items of one list, and how many there must be."""
    room = {number: asked.quotas.get(str(number), asked.most_per_category) for number in range(5)}
    free = scores > -np.inf

    def has_room(item: int, chosen: list[int]) -> bool:
        most, own = room.get(int(categories[item])), [categories[each] for each in chosen]
        return most is None or own.count(categories[item]) < most

    def check(chosen: list[int]) -> None:
        for count, item in enumerate([*chosen, None][: asked.k]):
            before = chosen[:count]
            left = [each for each in np.flatnonzero(free).tolist() if each not in before and has_room(each, before)]
            closest = (vectors[left] @ vectors[before].T).max(axis=1, initial=-1) if before else np.zeros(len(left))
            values = (1 - asked.diversity) * scores[left] - asked.diversity * closest
            assert (item is None) == (not left)
            assert item is None or values[left.index(item)] >= values.max() - 1e-5

    return check


@pytest.mark.parametrize("seed", range(40))
def test_rules_choose_among_all_items(seed: int) -> None:
    draw = np.random.default_rng(seed)
    count, k = int(draw.choice([3, 40, 700])), int(draw.choice([1, 5, 20]))
    vectors = draw.normal(size=(count + 1, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = vectors @ vectors[0]
    scores[draw.random(count + 1) < draw.choice([0, 0.5])] = -np.inf
    scores[-1], categories = -np.inf, draw.integers(-1, 5, count + 1)
    categories[np.argsort(-scores)[: count // 2]] = 1  # most of the best are of one category
    quotas = {str(number): int(draw.integers(0, 4)) for number in draw.choice(5, draw.integers(0, 3), replace=False)}
    most, diversity = [None, 1, 3][draw.integers(3)], float(draw.choice([0, 0.3, 0.9]))
    asked = recommend(items=[1], k=k, most_per_category=most, quotas=quotas, diversity=diversity)
    given = (torch.from_numpy(scores), Catalog(None, torch.from_numpy(categories), {str(n): n for n in range(5)}))
    places, is_drawn = chosen_items(given[0], asked, given[1], torch.from_numpy(vectors))
    assert not is_drawn.any()
    check = _steps(scores, asked, categories, vectors.astype(np.float64))
    check(places.tolist())

    explores = asked.model_copy(update={"exploration": 0.4, "seed": seed})
    some, is_drawn = chosen_items(given[0], explores, given[1], torch.from_numpy(vectors))
    assert some.equal(chosen_items(given[0], explores, given[1], torch.from_numpy(vectors))[0])
    drawn = round(0.4 * k)
    assert is_drawn.sum() <= drawn and len({*some.tolist()}) == len(some) and (scores[some] > -np.inf).all()
    best = asked.model_copy(update={"k": k - drawn})
    if best.k:
        _steps(scores, best, categories, vectors.astype(np.float64))(some[~is_drawn].tolist())
    for number in range(5):
        limit = quotas.get(str(number), most)
        assert limit is None or (categories[some] == number).sum() <= limit


def test_items_follow_the_item_file_and_a_user_without_events_gets_popular_ones(
    retrieval: Served, features: SequenceStore, tmp_path: Path
) -> None:
    path = tmp_path / "items.csv"
    path.write_text(
        "item,in_stock,category,price\n1001,true,a,9\n1002,1,b,9\n1003,false,a,9\n1004,true,,9\n7,true,a,9\n"
    )
    (tmp_path / "root").symlink_to(retrieval.folder)
    live = LiveModel(tmp_path / "root", Metrics(), lambda _, name, __: ServedModel(retrieval.model, name), path)

    def recommended(**options: Any) -> Answer:
        (answer,) = live.current.answer([recommend(**{"items": [], "filter_seen": False, **options})])
        assert isinstance(answer, dict), answer
        return answer

    counts = np.bincount(features.sequence("item_id"))
    popular, history = recommended(), {"items": [1001], "actions": [1], "timestamps": [0]}
    assert popular["fallback"] == "popular" and "fallback" not in recommended(**history)
    assert {each["item"] for each in popular["items"]} == {1001, 1002, 1004}
    for each in popular["items"]:
        assert each["score"] == pytest.approx(counts[each["item"] - 1000] / counts.max())
    every = recommended(**history)["items"]
    assert recommended(**history, min_score=every[1]["score"])["items"] == every[:2]
    assert {each["item"] for each in recommended(quotas={"a": 0})["items"]} == {1002, 1004}
    (unfit,) = live.current.answer([recommend(items=[], quotas={"c": 1})])
    assert "no item has the category 'c'; there are 2: a, b" in str(unfit)

    path.write_text("item,in_stock\n1001,perhaps\n")
    assert not live.refresh() and "perhaps" in live.refused[str(path)]
    assert {each["item"] for each in recommended()["items"]} == {1001, 1002, 1004}
    path.write_text("item,in_stock\n1003,true\n")
    assert not live.refresh() and not live.refused
    assert [each["item"] for each in recommended()["items"]] == [1003]
    (unfit,) = live.current.answer([recommend(items=[], most_per_category=1)])
    assert "with a column category" in str(unfit)
    for text, problem in (("a,b\n", "no column 'item'"), ("item\n1\n1\n", "several rows"), ("", "Empty")):
        path.write_text(text)
        with pytest.raises(DataError, match=problem):
            ItemFile(path)
