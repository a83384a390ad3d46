"""Which model answers a request: the first, or for a share of the users a second one, which may be their shadow."""

import asyncio
import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hstu.serve.runtime import ServingError
from hstu.serve.runtime.cache import PrefixCache
from hstu.serve.runtime.encode import joined

from .batching import BATCH_SIZE, Batcher, Metrics, Overloaded, Settings
from .logs import CURRENT
from .model import Answer, RecommendRequest, Result, ScoreRequest, ServedModel, User
from .shown import ShownLog
from .swap import LiveModel
from .users import Users

_log = logging.getLogger(__name__)


class Answering:
    """A live model with its queue, its thread, and the keys and values that it has computed of users."""

    def __init__(self, live: LiveModel, users: Users, settings: Settings) -> None:
        self.live, self._users, self.cache = live, users, PrefixCache(settings.cache_bytes)
        self.batcher = Batcher(self._answers, settings, live.metrics)

    async def ask(self, query: User, is_shadow: bool = False) -> Answer:
        """Answer a request. Raises Overloaded, StoreError, or ServingError if it does not fit the model."""
        client, answer = CURRENT.get().get("client", ""), Answer()
        with self.live.metrics.answer_seconds.time():
            answer = await self.batcher.ask(query, query.size, client, query.items is not None and not is_shadow)
            while isinstance(answer, Iterator):
                answer = await self.batcher.ask(answer, BATCH_SIZE + 1, client)  # alone, after what is smaller
        return answer

    def _answers(self, queries: Sequence[Any]) -> list[Result]:
        if isinstance(queries[0], Iterator):  # it is alone in its batch
            return [next(queries[0]) or queries[0]]
        served = self.live.current
        filled = self._users.filled(queries, served)
        found = iter(served.answer([each for each in filled if not isinstance(each, Exception)], self.cache))
        self.live.metrics.cache_bytes.set(self.cache.num_bytes)
        return [each if isinstance(each, Exception) else next(found) for each in filled]


class Traffic:
    """Has requests answered by the first model or, for ``settings.second_share`` of the users, by a second.

    With ``settings.shadow`` the first answers all, and the second then computes what it would have answered to these
    users, if its queue has room. No answer waits for that, and none fails with it. ``models``: one or both.
    """

    def __init__(
        self, models: Sequence[LiveModel], users: Users, settings: Settings, metrics: Metrics, shown: ShownLog | None
    ) -> None:
        self.models = [Answering(live, users, settings) for live in models]
        self.first, self._second = self.models[0], self.models[-1]
        self._share = settings.second_share if len(models) > 1 else 0.0
        self._has_shadow, self._metrics, self._shown = settings.shadow and self._share > 0, metrics, shown
        of_shadow = shown and shown.folder / "shadow"
        self._of_shadow = ShownLog(of_shadow, self._second.live.metrics) if of_shadow and self._has_shadow else None
        self._tasks, self._failed = set[asyncio.Task[None]](), ""  # the model of which the log has a failure

    async def close(self) -> None:
        """Answer what waits, but for the shadow."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(each.batcher.close() for each in self.models))
        for log in filter(None, (self._shown, self._of_shadow)):
            await asyncio.to_thread(log.close)

    async def answer(self, query: User) -> Answer:
        """Answer a request by the model for its user. Raises as ``Answering.ask``."""
        request_id = CURRENT.get()["request_id"]
        is_of_share = place_of(request_id if query.user is None else query.user) < self._share
        answer = await (self._second if is_of_share and not self._has_shadow else self.first).ask(query)
        if self._shown is not None:
            self._shown.add(query, answer, request_id)
        if is_of_share and self._has_shadow and not (isinstance(query, ScoreRequest) and query.explain):
            task = asyncio.create_task(self._compare(query, answer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return answer

    async def _compare(self, query: User, answer: Answer) -> None:
        """Compute an answered request by the second model, log it, and compare the items or the scores."""
        outcome, version = "computed", self._second.live.current.version
        try:
            own = await self._second.ask(query, is_shadow=True)
            if self._of_shadow is not None:
                self._of_shadow.add(query, own, CURRENT.get()["request_id"])
            self._observe(query, answer, own)
        except Overloaded:
            outcome = "dropped"
        except Exception as error:  # also a defect; the answer is sent already
            outcome = "failed"
            if self._failed != version:
                self._failed = version
                text = "the shadow has failed, and hstu_shadow_total counts further failures model=%s reason=%s: %s"
                _log.warning(text, version, type(error).__name__, error)
        self._metrics.shadow.labels(outcome).inc()

    def _observe(self, query: User, *answers: Answer) -> None:
        """Count how far the answers of both models agree."""
        if isinstance(query, RecommendRequest) and not any("fallback" in answer for answer in answers):
            one, other = ({each["item"] for each in answer["items"] if "drawn" not in each} for answer in answers)
            if one or other:
                self._metrics.overlap.observe(len(one & other) / max(len(one), len(other)))
        elif isinstance(query, ScoreRequest):
            first, second = (answer["scores"] for answer in answers)
            pairs = joined(zip(first[name], second[name], strict=True) for name in first.keys() & second.keys())
            if found := [abs(one - other) for one, other in pairs if one is not None and other is not None]:
                self._metrics.score_difference.observe(sum(found) / len(found))


def suitable(second: ServedModel, first: ServedModel) -> ServedModel:
    """The second model. Raises ServingError if it has other items than the first. Logs what one of them alone reads."""
    if second.task != first.task:
        raise ServingError(f"it is a {second.task} model, and the first is a {first.task} model")
    items, others = second.model.encoder.items, first.model.encoder.items
    some = others.values_at(torch.arange(0, others.size, max(1, others.size // 1_000)))
    if (items.places(some) < 0).all():
        raise ServingError(f"it has no item of the first model, such as {some[0]!r}")
    reads = [
        {*each.encoder.described, "timestamps" * each.facts["reads_times"]} for each in (first.model, second.model)
    ]
    if names := (reads[0] ^ reads[1]) - {""}:
        text = "only one of the models %s and %s reads %s, so requests with items may fit one alone"
        _log.warning(text, first.version, second.version, ", ".join(sorted(names)))
    return second


def place_of(user: Any) -> float:
    """A number from 0 to below 1 that depends on the id alone, evenly distributed: 7 and "7" are one user."""
    return int.from_bytes(hashlib.sha256(str(user).encode()).digest()[:6]) / 2**48
