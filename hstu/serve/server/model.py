"""The JSON of requests with its limits, and the answers of an exported model to batches of mixed requests."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from itertools import islice, zip_longest
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from hstu.serve.runtime import Candidates, History, Model, Recommendation, ServingError
from hstu.serve.runtime.cache import Prefix, PrefixCache
from hstu.serve.runtime.inputs import Query
from hstu.serve.runtime.model import Lists

from .rules import Catalog, chosen_items

MAX_EVENTS, MAX_CANDIDATES, MAX_RECOMMENDED, MAX_POSTED = 10_000, 1_000, 1_000, 1_000
_MAX_EXPLAINED, _MAX_COMPARED, _COMPARED_AT_ONCE = 10, 50, 2
"""Of an explanation: candidates, events to leave out, and how many of them before other requests are answered."""
_MAX_TEXT = 1_000
_MOST_OF_DATA, _LEAST_OF_CONTEXT = 10, 10
"""New events as which the data's most popular item counts, others in proportion; events that a context must have."""
_NOT_FINITE = "the model gives no finite number for this request; look for extreme numbers in it"

Text = Annotated[StrictStr, Field(max_length=_MAX_TEXT)]
Id = StrictInt | Text
Seconds = Annotated[StrictInt, Field(ge=-(2**53), le=2**53)]
Number = StrictInt | Annotated[StrictFloat, Field(allow_inf_nan=False)]
Value = Number | Text | None | list[Number | Text]
Name = Annotated[str, Field(max_length=_MAX_TEXT)]


class User(BaseModel):
    """A user: events in the ids of the raw data, oldest first. GET /model says what the model reads of them.

    Without items, ``user`` names the user whose stored events are read.
    """

    model_config = ConfigDict(extra="forbid")
    items: list[Id] | None = Field(
        None,
        max_length=MAX_EVENTS,
        description="Ids of the items, one per event; ranking needs none. Default: those stored of the user",
    )
    actions: list[Id] | None = Field(None, max_length=MAX_EVENTS, description="One per event, if the model reads them")
    timestamps: list[Seconds] | None = Field(
        None, max_length=MAX_EVENTS, description="Seconds since 1970, one per event, if the model reads times"
    )
    context: dict[Name, Number | Text | None] = Field({}, description="Contextual feature → value of the user")
    features: dict[Name, list[Value]] = Field({}, description="Feature of items or events → one value per event")
    user: Id | None = Field(None, description="Id of the user, for models that read it, and for stored events")
    at: Seconds | None = Field(
        None, description="When the user asks, in seconds since 1970, if the model reads it. Default: the newest event"
    )

    @model_validator(mode="after")
    def _has_events(self) -> Self:
        if self.items is None:
            if self.user is None:
                raise PydanticCustomError("events", "give items, or the user whose stored events are to be read")
            if given := [name for name in ("actions", "timestamps", "features") if getattr(self, name)]:
                raise PydanticCustomError("events", f"give items with {', '.join(given)}, or the user alone")
        return self

    @property
    def size(self) -> int:
        """Number of events and candidates in the request."""
        return len(self.items or ())

    @cached_property
    def history(self) -> History:
        """The events and facts of the user."""
        assert self.items is not None, "those of stored users are filled in"
        return History(**{each.name: getattr(self, each.name) for each in fields(History)})


class RecommendRequest(User):
    """Recommend items to a user."""

    k: StrictInt = Field(10, ge=1, le=MAX_RECOMMENDED, description="Number of items")
    filter_seen: StrictBool | None = Field(None, description="Leave out the user's items. Default: as in evaluation")
    allow: list[Id] | None = Field(None, max_length=MAX_EVENTS, description="The only items to recommend. Default: all")
    deny: list[Id] = Field([], max_length=MAX_EVENTS, description="Items not to recommend")
    min_score: Number | None = Field(None, description="The least score of a recommended item")
    most_per_category: StrictInt | None = Field(None, ge=0, description="The most items of one category")
    quotas: dict[Name, Annotated[StrictInt, Field(ge=0)]] = Field({}, description="Category → the most items of it")
    diversity: Number = Field(0.0, ge=0, lt=1, description="Weight of the largest cosine with an item further up")
    exploration: Number = Field(0.0, ge=0, le=1, description="Part of the k items that are drawn at random")
    seed: StrictInt | None = Field(None, ge=0, lt=2**63, description="Of the draw. Default: another each time")

    @property
    def has_rules(self) -> bool:
        """Whether more than lists of items decides what is recommended."""
        is_limited = (self.min_score, self.most_per_category) != (None, None)
        return bool(self.quotas or self.diversity or self.exploration) or is_limited


class ScoreRequest(User):
    """Score candidates for a user."""

    candidates: list[Id] = Field(min_length=1, max_length=MAX_CANDIDATES, description="Ids of the items to score")
    candidate_features: dict[Name, list[Value]] = Field({}, description="Feature → one value per candidate")
    explain: StrictInt = Field(0, ge=0, le=_MAX_COMPARED, description="Events to name that change each score most")
    prediction: Name | None = Field(None, description="The prediction to explain. Default: the first")

    @model_validator(mode="after")
    def _explains_the_prediction(self) -> Self:
        if self.prediction is not None and not self.explain:
            raise PydanticCustomError("explain", "prediction is the one to explain; give explain, too, or leave it out")
        return self

    @property
    def size(self) -> int:
        """Number of events and candidates to compute."""
        return (super().size + len(self.candidates)) * (1 + _MAX_COMPARED * bool(self.explain))

    @property
    def shown(self) -> Candidates:
        """The candidates with their features."""
        return Candidates(self.candidates, self.candidate_features)


class Event(BaseModel):
    """An event of a user, in the ids of the raw data."""

    model_config = ConfigDict(extra="forbid")
    user: Id
    item: Id
    timestamp: Seconds = Field(description="Seconds since 1970")
    action: Id | None = Field(None, description="If the model reads actions")
    features: dict[Name, Value] = Field({}, description="The features that GET /model calls required → value")
    context: dict[Name, Number | Text | None] = Field({}, description="Where it is popular, by context; not stored")
    id: Id | None = Field(
        None, description="One of a kind among the events of the user. Default: the time and the item, together"
    )


class EventsRequest(BaseModel):
    """Events to store. All are stored, or none."""

    model_config = ConfigDict(extra="forbid")
    events: list[Event] = Field(min_length=1, max_length=MAX_POSTED)


Answer = dict[str, Any]
"""JSON: "model", its version; "items", "scores" or "vector"; "unknown_items", and "unknown" with values of the action
and of each feature, which the model does not have; "fallback" and "popular_in" for users without events."""
Recent = Mapping[str, Mapping[str, float]]
"""Context, such as "country=DE", or "" for all → item → number of new events, weighted by age."""
Result = Answer | Exception | Iterator[Answer | None]  # an answer in steps: None, until it is there


class ServedModel:
    """A model with its version. Only one thread may call ``answer``."""

    def __init__(self, model: Model, version: str) -> None:
        self.model, self.version = model, version
        self.task: str = model.facts["task"]
        self.catalog = Catalog(None, None, {})
        """What the server's item file says of the items."""
        self.popularity = model.popularity
        """Score of each item for users without events, [items + 1]."""
        self.recent: Recent = {}
        self._data_in, self._recent_in = _with_enough(model.popular_in), dict[str, tuple[Tensor, Tensor]]()
        """Context with enough events of the data, of new ones → their items, int64 [n], and how many, float32 [n]."""
        self._titles = [title.casefold() for title in model.titles]

    def set_recent(self, recent: Recent) -> None:
        """Count new events as popularity, too."""
        self.recent, items, known = recent, self.model.encoder.items, self.model.popularity
        found = {context: (items.places([*own]), torch.tensor([*own.values()])) for context, own in recent.items()}
        self._recent_in = _with_enough(found)
        counts = torch.zeros(items.size + 1)
        if "" in found:
            counts[found[""][0]] = found[""][1]
        counts[-1] = 0  # where unknown items were written
        scores = counts if known is None else counts + _MOST_OF_DATA * known
        self.popularity = scores / scores.max() if counts.any() else known

    def contexts_of(self, context: Mapping[str, Any]) -> list[str]:
        """The keys in ``Recent`` of those values that the model has; a number counts as its range."""
        found = []
        for name in self.model.facts["contextual"]:
            if name != "user_id" and context.get(name) is not None:
                vocabulary = self.model.encoder.vocabularies[name]
                places = vocabulary.places([context[name]])
                found += [f"{name}={value}" for value in vocabulary.values_at(places[places >= 0])]
        return found

    def _in_context(self, scores: Tensor, context: Mapping[str, Any]) -> tuple[Tensor, list[str]]:
        """``popularity`` with the events in a context, the data's before new ones; its values with enough of them."""
        every, named = (self._data_in, self._recent_in), self.model.facts["contextual"]
        if unknown := [name for name in context if name not in named]:
            has = ", ".join(map(self.model.encoder.text_of, named)) or "none"
            raise ServingError(f"the model has no contextual feature {unknown[0]!r}; it has {has}")
        values = self.contexts_of(context)
        for counts in every:
            if own := [counts[each] for each in values if each in counts]:
                scores = _MOST_OF_DATA * scores
                for places, events in own:
                    scores[places] += events
                scores /= scores[:-1].max()
        return scores, [each for each in values if any(each in counts for counts in every)]

    def falls_back(self, request: User) -> bool:
        """Whether a user without events gets popular items."""
        is_asked = self.task == "retrieval" and isinstance(request, RecommendRequest)
        return is_asked and not len(request.history.items) and self.popularity is not None

    @property
    def event_features(self) -> list[str]:
        """Features that every event needs; the model knows the others of the items."""
        return [name for name, is_required in self.model.encoder.given_features.items() if is_required]

    def mistakes(self, events: Sequence[Event]) -> Iterator[tuple[int, str]]:
        """Yield the place of each event that the model could not read, and why."""
        try:
            self._check_events(events)
        except ServingError:  # one by one takes a hundred times as long
            for place, event in enumerate(events):
                try:
                    self._check_events([event])
                except ServingError as error:
                    yield place, str(error)

    def _check_events(self, events: Sequence[Event]) -> None:
        needed = self.event_features
        for event in events:
            if event.features.keys() != {*needed}:
                raise ServingError(
                    f"it has the features {', '.join(event.features) or 'none'}; give those that the model reads of "
                    f"every event, null where one is missing, and no others: "
                    f"{', '.join(map(self.model.encoder.text_of, needed)) or 'none'}"
                )
        ordered = sorted(events, key=lambda event: event.timestamp)
        actions = [event.action for event in ordered]
        history = History(
            items=[event.item for event in ordered],
            actions=None if None in actions else actions,
            timestamps=[event.timestamp for event in ordered],
            context={name: value for event in events for name, value in event.context.items()},
            features={name: [event.features[name] for event in ordered] for name in needed},
        )
        self.model.encoder.histories([(history, None, len(events))])

    def answer(self, requests: Sequence[User], cache: PrefixCache | None = None) -> list[Result]:
        """Answer requests together. One that fails gets its exception, a ServingError if it does not fit the model.

        If one makes them fail, each half is computed again, so that an error belongs to the request that causes it.
        ``cache``: of users whose ids are given.
        """
        try:
            with torch.inference_mode():
                outputs = self._outputs(requests, cache)
                best = self._recommendations(requests, outputs)
                unknown = self.model.unknown_batch([each.history for each in requests], [*map(_named, requests)])
                return [self._answer(*each) for each in zip(requests, outputs, best, unknown, strict=True)]
        except Exception as error:
            half = len(requests) // 2
            return [*self.answer(requests[:half], cache), *self.answer(requests[half:], cache)] if half else [error]

    def search(self, text: str, count: int) -> list[dict[str, Any]]:
        """Find up to ``count`` items whose title contains ``text`` or whose id equals it, as JSON. Thread-safe."""
        items, wanted = self.model.encoder.items, text.casefold()
        places = [place for place in items.places([text]).tolist() if place >= 0]
        others = (place for place, title in enumerate(self._titles) if wanted in title and place not in places)
        places = [*places, *islice(others, count)][:count]
        return self.titled(items.values_at(torch.tensor(places, dtype=torch.int64)))

    def titled(self, items: Sequence[Any]) -> list[dict[str, Any]]:
        """Items with their titles, as JSON; "" for those without one. Thread-safe."""
        places, titles = self.model.encoder.items.places(items).tolist(), self.model.titles
        found = [titles[place] if titles and place >= 0 else "" for place in places]
        return [{"item": item, "title": title} for item, title in zip(items, found, strict=True)]

    def _outputs(self, requests: Sequence[User], cache: PrefixCache | None) -> list[Tensor]:
        """For each request, the user vector [1, E], or the logits [candidates, outputs]. Empty if it falls back."""

        def query(request: User) -> Query:
            shown = request.shown if isinstance(request, ScoreRequest) else None
            if cache is None or request.user is None:
                return Query(request.history, shown, request.at)
            return Query(request.history, shown, request.at, cache.find(str(request.user), self.version), True)

        def keep(place: int, prefix: Prefix) -> None:
            if cache is not None:
                cache.put(str(requests[place].user), self.version, prefix)

        asked = [place for place, each in enumerate(requests) if not self.falls_back(each)]
        encoded = dict(zip(asked, self.model.encode_batch([query(requests[place]) for place in asked]), strict=True))
        outputs = self.model.run([encoded.get(place, []) for place in range(len(requests))], keep)
        if not all(each.isfinite().all() for each in outputs):
            raise ServingError(_NOT_FINITE)
        return outputs

    def _recommendations(self, requests: Sequence[User], outputs: Sequence[Tensor]) -> list[Answer | None]:
        """The best items, for each RecommendRequest."""
        found: list[Answer | None] = [None] * len(requests)
        simple = list[tuple[int, Tensor, int, Lists]]()
        for place, (request, output) in enumerate(zip(requests, outputs, strict=True)):
            if isinstance(request, RecommendRequest):
                lists = [*request.deny, *self.model.left_out(request.history, request.filter_seen)], request.allow
                if request.has_rules or self.falls_back(request) or self.catalog.in_stock is not None:
                    found[place] = self._by_rules(request, output, lists)
                else:
                    simple.append((place, output, request.k, lists))
        if simple:
            places, queries, counts, every = zip(*simple, strict=True)
            for place, best in zip(places, self.model.nearest(torch.cat(queries), counts, every), strict=True):
                found[place] = _listed(best)
        return found

    def _by_rules(self, request: RecommendRequest, output: Tensor, lists: Lists) -> Answer:
        """The best items by rules.py: those closest to the user vector ``output``, or popular ones."""
        popularity = self.popularity if self.falls_back(request) else None
        catalog = self.catalog  # another thread may replace it
        query = output if popularity is None else torch.zeros(1, self.model.stored_vectors.shape[1])
        scores = self.model.scores(query, [lists])[0]
        if popularity is not None:
            popularity, contexts = self._in_context(popularity, request.context)
            scores += popularity
        elif request.min_score is not None:
            scores[scores < request.min_score] = -torch.inf
        if catalog.in_stock is not None:
            scores[~catalog.in_stock] = -torch.inf
        places, is_drawn = chosen_items(scores, request, catalog, self.model.vectors if request.diversity else None)
        found = _listed(self.model.named(scores[places].tolist(), places), is_drawn.tolist())
        return found if popularity is None else {**found, "fallback": "popular", "popular_in": contexts}

    def _answer(self, request: User, output: Tensor, best: Answer | None, unknown: dict[str, list[Any]]) -> Result:
        content, unknown_items = Answer() if best is None else best, set[Any]()
        if isinstance(request, ScoreRequest):
            outputs = self.model.outputs_of(request.candidates, output)
            content["scores"], has_none = self.model.predictions(outputs), outputs.isnan().all(dim=1).tolist()
            unknown_items = {item for item, no_score in zip(request.candidates, has_none, strict=True) if no_score}
        elif best is None:
            content["vector"] = output[0].tolist()
        unknown_items.update(unknown.pop(self.model.facts["item"], []))
        answer = {"model": self.version, **content, "unknown_items": sorted(unknown_items, key=str), "unknown": unknown}
        return self._explained(request, answer) if isinstance(request, ScoreRequest) and request.explain else answer

    def _explained(self, asked: ScoreRequest, answer: Answer) -> Iterator[Answer | None]:
        """Compare the scores with those without one of the newest events. Yields None between steps, then the answer.

        The time of the request stays. Raises ServingError if the history has one event, or the prediction is unknown.
        """
        model, history, shown, at = self.model, asked.history, asked.shown, asked.at
        facts, count = model.facts, len(history.items)
        name, why = asked.prediction or next(iter(answer["scores"])), []
        if name not in answer["scores"]:
            raise ServingError(f"the model has no prediction {name!r}; it has {', '.join(answer['scores'])}")
        if count < 2 or len(shown.items) > _MAX_EXPLAINED:
            most = f"two events or more and up to {_MAX_EXPLAINED} candidates"
            raise ServingError(f"explain takes {most}, and the request has {count} and {len(shown.items)}")
        if at is None and model.reads_request_time and history.timestamps is not None:
            at = int(history.timestamps[-1])
        room = facts["max_items"] if facts["task"] == "retrieval" else model.encoder.room(len(shown.items))[0]
        read = min(count, room)
        if model.encoder.running is None:  # events before these change nothing, and to check them takes time
            history = history.cut(slice(-(read + 2), None))
        kept: list[Prefix] = []

        def scored(*queries: Query, keep: Any = None) -> list[Any]:
            outputs = model.run(model.encode_batch(queries), keep)
            return [model.predictions(model.outputs_of(shown.items, each)) for each in outputs]

        scores = scored(Query(history, shown, at, None, True), keep=lambda _, prefix: kept.append(prefix))
        newest, older = len(history.items) - 1, count - len(history.items)
        compared = range(newest, newest - min(read, _MAX_COMPARED), -1)
        for first in range(0, len(compared), _COMPARED_AT_ONCE):
            yield None
            places, earlier = compared[first : first + _COMPARED_AT_ONCE], next(iter(kept), None)
            scores += scored(*(Query(history.without(place), shown, at, earlier, True) for place in places))
        for whole, *parts in zip(*(each[name] for each in scores), strict=True):  # of one candidate
            changes = [] if whole is None else [(whole - p, place) for p, place in zip(parts, compared, strict=True)]
            largest = sorted(changes, key=lambda change: -abs(change[0]))[: asked.explain]
            titled = self.titled([history.items[place] for _, place in largest])
            more = [{"place": place + older, "difference": change} for change, place in largest]
            why.append([item | own for item, own in zip(titled, more, strict=True)])
        yield {**answer, "prediction": name, "compared_events": len(compared), "read_events": read, "why": why}


def _with_enough(counts: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    return {context: own for context, own in counts.items() if own[1].sum() >= _LEAST_OF_CONTEXT}


def _named(request: User) -> Candidates:
    """Items that a request names besides its events, with their features."""
    if isinstance(request, RecommendRequest):
        return Candidates([*(request.allow or ()), *request.deny])
    return request.shown if isinstance(request, ScoreRequest) else Candidates([])


def _listed(best: Recommendation, are_drawn: Sequence[bool] = ()) -> Answer:
    rows = zip(best.items, best.scores, best.titles or [""] * len(best.items), strict=True)
    items = [{"item": item, "score": score, "title": title} for item, score, title in rows]
    return {"items": [each | {"drawn": True} if drawn else each for each, drawn in zip_longest(items, are_drawn)]}
