"""The JSON of requests with its limits, and the answers of an exported model to batches of mixed requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr
from torch import Tensor

from hstu.serve.runtime import Candidates, History, Model, Recommendation, ServingError

MAX_EVENTS, MAX_CANDIDATES, MAX_RECOMMENDED = 10_000, 1_000, 1_000
_MAX_TEXT = 1_000
_NOT_FINITE = "the model gives no finite number for this request; look for extreme numbers in it"

Text = Annotated[StrictStr, Field(max_length=_MAX_TEXT)]
Id = StrictInt | Text
Seconds = Annotated[StrictInt, Field(ge=-(2**53), le=2**53)]
Number = StrictInt | Annotated[StrictFloat, Field(allow_inf_nan=False)]
Value = Number | Text | None | list[Number | Text]
Name = Annotated[str, Field(max_length=_MAX_TEXT)]


@dataclass(frozen=True)
class Query:
    """One request: the vector of a user, the best ``k`` items, or the scores of ``candidates``."""

    history: History
    at: int | None = None
    k: int | None = None
    """Not None: recommend."""
    filter_seen: bool | None = None
    allow: Sequence[Any] | None = None
    deny: Sequence[Any] = ()
    candidates: Candidates | None = None
    """Not None: score."""


class User(BaseModel):
    """A user: events in the ids of the raw data, oldest first. GET /model says what the model reads of them."""

    model_config = ConfigDict(extra="forbid")
    items: list[Id] = Field(max_length=MAX_EVENTS, description="Ids of the items, one per event; ranking needs none")
    actions: list[Id] | None = Field(None, max_length=MAX_EVENTS, description="One per event, if the model reads them")
    timestamps: list[Seconds] | None = Field(
        None, max_length=MAX_EVENTS, description="Seconds since 1970, one per event, if the model reads times"
    )
    context: dict[Name, Number | Text | None] = Field({}, description="Contextual feature → value of the user")
    features: dict[Name, list[Value]] = Field({}, description="Feature of items or events → one value per event")
    user: Id | None = Field(None, description="Id of the user, for models that read it")
    at: Seconds | None = Field(
        None, description="When the user asks, in seconds since 1970, if the model reads it. Default: the newest event"
    )

    def query(self) -> Query:
        """What to compute."""
        history = History(**{each.name: getattr(self, each.name) for each in fields(History)})
        return Query(history, **self.model_dump(include={"at", "k", "filter_seen", "allow", "deny"}))


class RecommendRequest(User):
    """Recommend items to a user."""

    k: StrictInt = Field(10, ge=1, le=MAX_RECOMMENDED, description="Number of items")
    filter_seen: StrictBool | None = Field(None, description="Leave out the user's items. Default: as in evaluation")
    allow: list[Id] | None = Field(None, max_length=MAX_EVENTS, description="The only items to recommend. Default: all")
    deny: list[Id] = Field([], max_length=MAX_EVENTS, description="Items not to recommend")


class ScoreRequest(User):
    """Score candidates for a user."""

    candidates: list[Id] = Field(min_length=1, max_length=MAX_CANDIDATES, description="Ids of the items to score")
    candidate_features: dict[Name, list[Value]] = Field({}, description="Feature → one value per candidate")

    def query(self) -> Query:
        """What to compute."""
        return replace(super().query(), candidates=Candidates(self.candidates, self.candidate_features))


@dataclass(frozen=True)
class Answer:
    """The answer of a model to a query."""

    model: str
    """Version of the model."""
    content: Any
    """A Recommendation; a dict of predictions for candidates; or a vector as a list."""
    unknown: dict[str, Any]
    """What the model does not have: "unknown_items", and "unknown" with values of the action and of each feature."""


class ServedModel:
    """A model with its version. Only one thread may call ``answer``."""

    def __init__(self, model: Model, version: str) -> None:
        self.model, self.version = model, version
        self.task: str = model.facts["task"]
        self._titles = [title.casefold() for title in model.titles]

    def answer(self, queries: Sequence[Query]) -> list[Answer | Exception]:
        """Answer queries together. A query that fails gets its exception, a ServingError if it does not fit the model.

        If one makes them fail together, each is computed alone, so that an error belongs to the query that causes it.
        """
        try:
            with torch.inference_mode():
                outputs = self._outputs(queries)
                best = self._recommendations(queries, outputs)
                return [
                    output if isinstance(output, Exception) else self._answer(query, output, best.get(place))
                    for place, (query, output) in enumerate(zip(queries, outputs, strict=True))
                ]
        except Exception as error:
            return [error] if len(queries) == 1 else [self.answer([query])[0] for query in queries]

    def search(self, text: str, count: int) -> list[tuple[Any, str]]:
        """Find up to ``count`` (id, title) pairs whose title contains ``text`` or whose id equals it. Thread-safe."""
        items, wanted, titles = self.model.encoder.items, text.casefold(), self.model.titles
        places = [place for place in items.places([text]).tolist() if place >= 0]
        others = (place for place, title in enumerate(self._titles) if wanted in title and place not in places)
        places = [*places, *islice(others, count)][:count]
        values = items.values_at(torch.tensor(places, dtype=torch.int64))
        return [(value, titles[place] if titles else "") for value, place in zip(values, places, strict=True)]

    def _outputs(self, queries: Sequence[Query]) -> list[Tensor | Exception]:
        """For each query, the user vector [1, E], the logits [candidates, outputs], or its exception."""
        encoded: list[Any] = []
        for query in queries:
            try:
                if self.task == "ranking" and query.candidates is None:
                    raise ServingError("a ranking model has no vectors of users and items; use /score")
                encoded.append(self.model.encode(query.history, query.candidates, query.at))
            except Exception as error:  # also a defect
                encoded.append(error)
        outputs = iter(self.model.run([each for each in encoded if not isinstance(each, Exception)]))
        found = [each if isinstance(each, Exception) else next(outputs) for each in encoded]
        return [
            one if isinstance(one, Exception) or one.isfinite().all() else ServingError(_NOT_FINITE) for one in found
        ]

    def _recommendations(
        self, queries: Sequence[Query], outputs: Sequence[Tensor | Exception]
    ) -> dict[int, Recommendation]:
        """Index of a query with ``k`` → its best items."""
        vectors = {place: output for place, output in enumerate(outputs) if isinstance(output, Tensor)}
        ranked = [place for place in vectors if queries[place].k is not None]
        if not ranked:
            return {}
        of = [queries[place] for place in ranked]
        lists = [([*each.deny, *self.model.left_out(each.history, each.filter_seen)], each.allow) for each in of]
        found = self.model.nearest(torch.cat([vectors[place] for place in ranked]), [each.k or 0 for each in of], lists)
        return dict(zip(ranked, found, strict=True))

    def _answer(self, query: Query, output: Tensor, best: Recommendation | None) -> Answer:
        shown = query.candidates or Candidates([])
        named = [*shown.items, *(query.allow or ()), *query.deny]
        found = self.model.unknown(query.history, Candidates(named, shown.features))
        unknown_items = set(found.pop(self.model.facts["item"], []))
        content: Any = best or output[0].tolist()
        if query.candidates is not None:
            outputs = self.model.outputs_of(shown.items, output)
            content, has_none = self.model.predictions(outputs), outputs.isnan().all(dim=1).tolist()
            unknown_items |= {item for item, no_score in zip(shown.items, has_none, strict=True) if no_score}
        return Answer(self.version, content, {"unknown_items": sorted(unknown_items, key=str), "unknown": found})
