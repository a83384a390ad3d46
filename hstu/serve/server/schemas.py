"""The JSON schemas of requests. They reject unknown fields, wrong types and values over the limits."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr

from hstu.serve.runtime import Candidates, History

from .model import Query

MAX_EVENTS, MAX_CANDIDATES, MAX_RECOMMENDED = 10_000, 1_000, 1_000
_MAX_TEXT = 1_000
_FIELDS_OF_HISTORY = [field.name for field in fields(History)]

Text = Annotated[StrictStr, Field(max_length=_MAX_TEXT)]
Id = StrictInt | Text
Seconds = Annotated[StrictInt, Field(ge=-(2**53), le=2**53)]
Value = StrictInt | StrictFloat | Text | None | list[StrictInt | StrictFloat | Text]
Name = Annotated[str, Field(max_length=_MAX_TEXT)]


class User(BaseModel):
    """A user: events in the ids of the raw data, oldest first. GET /model says what the model reads of them."""

    model_config = ConfigDict(extra="forbid")
    items: list[Id] = Field(max_length=MAX_EVENTS, description="Ids of the items, one per event; ranking needs none")
    actions: list[Id] | None = Field(None, max_length=MAX_EVENTS, description="One per event, if the model reads them")
    timestamps: list[Seconds] | None = Field(
        None, max_length=MAX_EVENTS, description="Seconds since 1970, one per event, if the model reads times"
    )
    context: dict[Name, Id | None] = Field({}, description="Contextual feature → value of the user")
    features: dict[Name, list[Value]] = Field({}, description="Feature of items or events → one value per event")
    user: Id | None = Field(None, description="Id of the user, for models that read it")
    at: Seconds | None = Field(
        None, description="When the user asks, in seconds since 1970, if the model reads it. Default: the newest event"
    )

    def query(self) -> Query:
        """What to compute."""
        history = History(**{name: getattr(self, name) for name in _FIELDS_OF_HISTORY})
        return Query(history, self.at)


class RecommendRequest(User):
    """Recommend items to a user."""

    k: StrictInt = Field(10, ge=1, le=MAX_RECOMMENDED, description="Number of items")
    filter_seen: bool = Field(True, description="Leave out the items of the user")

    def query(self) -> Query:
        """What to compute."""
        return replace(super().query(), k=self.k, filter_seen=self.filter_seen)


class ScoreRequest(User):
    """Score candidates for a user."""

    candidates: list[Id] = Field(min_length=1, max_length=MAX_CANDIDATES, description="Ids of the items to score")
    candidate_features: dict[Name, list[Value]] = Field({}, description="Feature → one value per candidate")

    def query(self) -> Query:
        """What to compute."""
        return replace(super().query(), candidates=Candidates(self.candidates, self.candidate_features))
