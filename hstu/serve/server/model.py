"""The JSON of requests with its limits, and the answers of an exported model to batches of mixed requests."""

from collections.abc import Sequence
from dataclasses import fields
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

    @property
    def history(self) -> History:
        """The events and facts of the user."""
        return History(**{each.name: getattr(self, each.name) for each in fields(History)})


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

    @property
    def shown(self) -> Candidates:
        """The candidates with their features."""
        return Candidates(self.candidates, self.candidate_features)


Answer = dict[str, Any]
"""JSON: "model", its version; "items", "scores" or "vector"; "unknown_items", and "unknown" with values of the action
and of each feature, which the model does not have."""


class ServedModel:
    """A model with its version. Only one thread may call ``answer``."""

    def __init__(self, model: Model, version: str) -> None:
        self.model, self.version = model, version
        self.task: str = model.facts["task"]
        self._titles = [title.casefold() for title in model.titles]

    def answer(self, requests: Sequence[User]) -> list[Answer | Exception]:
        """Answer requests together. One that fails gets its exception, a ServingError if it does not fit the model.

        If one makes them fail together, each is computed alone, so that an error belongs to the request that causes it.
        """
        try:
            with torch.inference_mode():
                outputs = self._outputs(requests)
                best = self._recommendations(requests, outputs)
                return [
                    output if isinstance(output, Exception) else self._answer(request, output, best.get(place))
                    for place, (request, output) in enumerate(zip(requests, outputs, strict=True))
                ]
        except Exception as error:
            return [error] if len(requests) == 1 else [self.answer([request])[0] for request in requests]

    def search(self, text: str, count: int) -> list[dict[str, Any]]:
        """Find up to ``count`` items whose title contains ``text`` or whose id equals it, as JSON. Thread-safe."""
        items, wanted, titles = self.model.encoder.items, text.casefold(), self.model.titles
        places = [place for place in items.places([text]).tolist() if place >= 0]
        others = (place for place, title in enumerate(self._titles) if wanted in title and place not in places)
        places = [*places, *islice(others, count)][:count]
        values = items.values_at(torch.tensor(places, dtype=torch.int64))
        found = zip(values, places, strict=True)
        return [{"item": value, "title": titles[place] if titles else ""} for value, place in found]

    def _outputs(self, requests: Sequence[User]) -> list[Tensor | Exception]:
        """For each request, the user vector [1, E], the logits [candidates, outputs], or its exception."""
        encoded: list[Any] = []
        for request in requests:
            try:
                shown = request.shown if isinstance(request, ScoreRequest) else None
                if self.task == "ranking" and shown is None:
                    raise ServingError("a ranking model has no vectors of users and items; use /score")
                encoded.append(self.model.encode(request.history, shown, request.at))
            except Exception as error:  # also a defect
                encoded.append(error)
        outputs = iter(self.model.run([each for each in encoded if not isinstance(each, Exception)]))
        found = [each if isinstance(each, Exception) else next(outputs) for each in encoded]
        return [
            one if isinstance(one, Exception) or one.isfinite().all() else ServingError(_NOT_FINITE) for one in found
        ]

    def _recommendations(
        self, requests: Sequence[User], outputs: Sequence[Tensor | Exception]
    ) -> dict[int, Recommendation]:
        """Index of a RecommendRequest → its best items."""
        vectors = {place: output for place, output in enumerate(outputs) if isinstance(output, Tensor)}
        ranked = [(place, each) for place in vectors if isinstance(each := requests[place], RecommendRequest)]
        if not ranked:
            return {}
        queries, counts = torch.cat([vectors[place] for place, _ in ranked]), [each.k for _, each in ranked]
        lists = [([*each.deny, *self.model.left_out(each.history, each.filter_seen)], each.allow) for _, each in ranked]
        found = self.model.nearest(queries, counts, lists)
        return {place: best for (place, _), best in zip(ranked, found, strict=True)}

    def _answer(self, request: User, output: Tensor, best: Recommendation | None) -> Answer:
        shown, content, unknown_items = Candidates([]), Answer(), set[Any]()
        if isinstance(request, ScoreRequest):
            shown = request.shown
            outputs = self.model.outputs_of(shown.items, output)
            content["scores"], has_none = self.model.predictions(outputs), outputs.isnan().all(dim=1).tolist()
            unknown_items = {item for item, no_score in zip(shown.items, has_none, strict=True) if no_score}
        elif isinstance(request, RecommendRequest):
            assert best is not None, "_recommendations answers each"
            shown = Candidates([*(request.allow or ()), *request.deny])
            rows = zip(best.items, best.scores, best.titles or [""] * len(best.items), strict=True)
            content["items"] = [{"item": item, "score": score, "title": title} for item, score, title in rows]
        else:
            content["vector"] = output[0].tolist()
        unknown = self.model.unknown(request.history, shown)
        unknown_items.update(unknown.pop(self.model.facts["item"], []))
        return {"model": self.version, **content, "unknown_items": sorted(unknown_items, key=str), "unknown": unknown}
