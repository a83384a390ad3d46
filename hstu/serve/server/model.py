"""An exported model as the server uses it: batches of queries of any kind, and a cache of users' vectors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor

from hstu.serve.runtime import Candidates, History, Model, ServingError

from .settings import Metrics

ENTRY_BYTES = 1024
"""What a cached vector takes beside its numbers: the key, the tensor object and the entry of the dictionary."""


@dataclass(frozen=True)
class Query:
    """One request: the vector of a user, the best ``k`` items, or the scores of ``candidates``."""

    history: History
    at: int | None = None
    k: int | None = None
    """Not None: recommend."""
    filter_seen: bool = True
    candidates: Candidates | None = None
    """Not None: score."""

    @cached_property
    def user_key(self) -> bytes:
        """Digest of everything that the user's vector depends on."""
        text = json.dumps([vars(self.history), self.at], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=32).digest()


@dataclass(frozen=True)
class Answer:
    """What a model says to a query."""

    model: str
    """Version of the model."""
    content: Any
    """A Recommendation, for candidates a dict of predictions, else the vector as a list."""
    unknown_items: list[Any]
    """Items of the query that the model does not have."""


class ServedModel:
    """A model with its version and its cache. ``answer`` belongs to one thread.

    Args:
        model: what to serve.
        version: names the model in answers.
        cache_bytes: all cached vectors of users together take at most so many bytes. A ranking model has none.
        metrics: counts hits and misses.
    """

    def __init__(self, model: Model, version: str, cache_bytes: int, metrics: Metrics) -> None:
        self.model, self.version = model, version
        self.task: str = model.facts["task"]
        self._cache: LRUCache[bytes, Tensor] = LRUCache(cache_bytes, lambda vector: vector.nbytes + ENTRY_BYTES)
        self._metrics = metrics
        self._titles = [title.casefold() for title in model.titles]

    def answer(self, queries: Sequence[Query]) -> list[Answer | Exception]:
        """An answer per query, computed together; a ServingError in place of one whose query does not fit the model."""
        with torch.inference_mode():
            contents = self._of_vectors(queries) if self.task == "retrieval" else self._of_pairs(queries)
        return [
            content if isinstance(content, Exception) else Answer(self.version, content, self._unknown(query))
            for query, content in zip(queries, contents, strict=True)
        ]

    def search(self, text: str, count: int) -> list[tuple[Any, str]]:
        """Ids and titles of ``count`` items whose title has ``text``, or whose id it is. Any thread may call it."""
        items, wanted, found = self.model.encoder.items, text.casefold(), []
        place = int(items.places([text])[0])
        if place >= 0:
            found.append((items.value_at(place), self.model.titles[place] if self._titles else ""))
        for other, title in enumerate(self._titles):
            if len(found) >= count:
                break
            if wanted in title and other != place:
                found.append((items.value_at(other), self.model.titles[other]))
        return found

    def check(self) -> None:
        """Answer one query. Raises ServingError if that fails or gives what is no number."""
        facts, encoder = self.model.facts, self.model.encoder
        if not encoder.items.size:
            raise ServingError("the model has no items")
        item, given = encoder.items.value_at(0), [name for name, must in encoder.given_features.items() if must]
        actions = encoder.vocabularies[facts["action"]] if facts["action"] else None
        history = History(
            items=[item],
            actions=None if actions is None else [actions.value_at(0) if actions.size else 0],
            timestamps=[0] if facts["reads_times"] else None,
            features={name: [None] for name in given},
        )
        shown = Candidates([item], {name: [None] for name in given if name in encoder.known_before})
        for answer in self.answer([Query(history, candidates=shown)]):
            if isinstance(answer, Exception):
                raise ServingError(f"the model cannot answer: {answer}") from answer

    def _of_vectors(self, queries: Sequence[Query]) -> list[Any]:
        """Contents of answers of a retrieval model."""
        contents = self._vectors(queries)
        known = [place for place, vector in enumerate(contents) if isinstance(vector, Tensor)]
        ranked = [place for place in known if queries[place].k is not None]
        if ranked:
            best = self.model.nearest(
                torch.stack([contents[place] for place in ranked]),
                [queries[place].k or 0 for place in ranked],
                [queries[place].history.items if queries[place].filter_seen else () for place in ranked],
            )
        for place in known:
            vector, shown = contents[place], queries[place].candidates
            if shown is not None:
                contents[place] = {"cosine": (self.model.item_vectors(shown.items) @ vector).tolist()}
            elif place in ranked:
                contents[place] = best[ranked.index(place)]
            else:
                contents[place] = vector.tolist()
        return contents

    def _vectors(self, queries: Sequence[Query]) -> list[Any]:
        """The vector of each query's user, float32 [E], or a ServingError; equal users are computed once."""
        users = {query.user_key: query for query in queries}
        known: dict[bytes, Any] = {key: self._cache.get(key) for key in users}
        missing = [key for key, vector in known.items() if vector is None]
        self._metrics.cache_hits.inc(len(users) - len(missing))
        self._metrics.cache_misses.inc(len(missing))
        encoded = {}
        for key in missing:
            try:
                encoded[key] = self.model.encode(users[key].history, users[key].at)
            except ServingError as error:
                known[key] = error
        if encoded:
            for key, vector in zip(encoded, self.model.run([*encoded.values()]), strict=True):
                known[key] = _finite(vector[0])
                if isinstance(known[key], Tensor):
                    with suppress(ValueError):  # it is larger than the whole cache
                        self._cache[key] = known[key].clone()  # a row would keep the whole batch in memory
        self._metrics.cache_bytes.set(self._cache.currsize)
        return [known[query.user_key] for query in queries]

    def _of_pairs(self, queries: Sequence[Query]) -> list[Any]:
        """Contents of answers of a ranking model."""
        contents: list[Any] = []
        sequences: list[Any] = []
        for query in queries:
            try:
                if query.candidates is None:
                    raise ServingError("a ranking model has no vectors of users and items; use /score")
                own = self.model.encoder.sequences(query.history, query.candidates, query.at)
                contents.append(range(len(sequences), len(sequences) + len(own)))
                sequences += own
            except ServingError as error:
                contents.append(error)
        outputs = self.model.run(sequences) if sequences else []
        for place, content in enumerate(contents):
            if isinstance(content, range):
                logits = _finite(torch.cat([outputs[part] for part in content]))
                contents[place] = logits if isinstance(logits, Exception) else self.model.predictions(logits)
        return contents

    def _unknown(self, query: Query) -> list[Any]:
        shown = () if query.candidates is None else query.candidates.items
        items = list(dict.fromkeys([*query.history.items, *shown]))
        places = self.model.encoder.items.places(items).tolist()
        return [item for item, place in zip(items, places, strict=True) if place < 0]


def _finite(values: Tensor) -> Tensor | ServingError:
    if values.isfinite().all():
        return values
    return ServingError("the model gives no finite number for this request; look for extreme numbers in it")
