"""The routes of the server."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse, Response

import hstu
from hstu.serve.runtime import Recommendation

from . import schemas
from .batching import Batcher
from .guard import ClientGone, Guard, add_handlers
from .model import Answer, ServedModel
from .settings import Metrics, Settings
from .swap import LiveModel

_SHOWN_ACTIONS = 20
_FAILURES: dict[int | str, dict[str, Any]] = {
    413: {"model": schemas.Failure, "description": "The request is too large"},
    422: {"model": schemas.Failure, "description": "The request has mistakes, or does not fit the model"},
    429: {"model": schemas.Failure, "description": "Too many requests wait; see the header Retry-After"},
}
_log = logging.getLogger(__name__)


def create_app(live: LiveModel, settings: Settings, metrics: Metrics) -> FastAPI:
    """The application, in ASGI. While it runs, it replaces the model by newer exports.

    Args:
        live: the model in use.
        settings: limits.
        metrics: what ``live`` counts in, too.
    """
    batcher: Batcher

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        nonlocal batcher
        batcher = Batcher(lambda queries: live.current.answer(queries), settings, metrics)
        batcher.start()
        watching = asyncio.create_task(_watch(live, settings.poll_s))
        yield
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        await batcher.close()

    app = FastAPI(
        title="HSTU",
        description="Recommendations of an exported model.",
        version=hstu.__version__,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere, which the server's headers forbid
        redoc_url=None,
    )
    add_handlers(app)

    async def ask(user: schemas.User, request: Request) -> Answer:
        answer = asyncio.ensure_future(batcher.ask(user.query()))
        gone = asyncio.ensure_future(_hung_up(request))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ClientGone
            return answer.result()
        finally:
            answer.cancel()
            gone.cancel()

    @app.post("/recommend", response_model=schemas.Recommendations, responses=_FAILURES)
    async def recommend(user: schemas.RecommendRequest, request: Request) -> Response:
        """The items whose vectors are closest to that of the user. Retrieval only."""
        answer = await ask(user, request)
        found = answer.content
        assert isinstance(found, Recommendation)
        titles = found.titles or [""] * len(found.items)
        rows = zip(found.items, found.scores, titles, strict=True)
        return _said(answer, items=[{"item": item, "score": score, "title": title} for item, score, title in rows])

    @app.post("/score", response_model=schemas.Scores, responses=_FAILURES)
    async def score(user: schemas.ScoreRequest, request: Request) -> Response:
        """What the model predicts for candidates: each task of a ranking model, the cosine of retrieval."""
        answer = await ask(user, request)
        return _said(answer, scores=answer.content)

    @app.post("/embed", response_model=schemas.Vector, responses=_FAILURES)
    async def embed(user: schemas.User, request: Request) -> Response:
        """The vector of the user. Retrieval only."""
        answer = await ask(user, request)
        return _said(answer, vector=answer.content)

    @app.get("/health")
    async def health() -> schemas.Health:
        """Whether the server answers, with which model, and which exports it could not load."""
        current = live.current
        return schemas.Health(
            status="ok", model=current.version, task=current.task, since=live.since, refused=live.refused
        )

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Counters in the text format of Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/model")
    async def model() -> schemas.ModelFacts:
        """What the model in use reads and predicts."""
        return _facts(live.current)

    @app.get("/items", responses={422: _FAILURES[422]})
    def items(
        q: Annotated[str, Query(min_length=1, max_length=200)], count: Annotated[int, Query(ge=1, le=100)] = 10
    ) -> schemas.FoundItems:
        """Search items by a part of their title, or by id."""
        current = live.current
        found = [schemas.FoundItem(item=item, title=title) for item, title in current.search(q, count)]
        return schemas.FoundItems(model=current.version, items=found)

    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text)

    paths = {getattr(route, "path", "") for route in app.routes}
    app.add_middleware(Guard, metrics=metrics, max_body_bytes=settings.max_body_bytes, paths=paths)
    return app


def _said(answer: Answer, **content: Any) -> Response:
    # Written here, and not by the schema, which would check again each number of what this program has computed.
    text = json.dumps({"model": answer.model, **content, "unknown_items": answer.unknown_items}, allow_nan=False)
    return Response(text, media_type="application/json")


async def _hung_up(request: Request) -> None:
    """Ends when the client of a request, whose body has been read, has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _watch(live: LiveModel, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        try:
            if await asyncio.to_thread(live.refresh):
                gc.collect()  # the earlier model has circles of references
        except Exception:  # such as a file system that is gone for a while; the model in use goes on
            _log.exception("cannot look for newer exports")


def _facts(served: ServedModel) -> schemas.ModelFacts:
    facts, encoder = served.model.facts, served.model.encoder
    actions = encoder.vocabularies[facts["action"]] if facts["action"] else None
    shown = range(actions.size if actions is not None and actions.size <= _SHOWN_ACTIONS else 0)
    return schemas.ModelFacts(
        model=served.version,
        task=served.task,
        items=encoder.items.size,
        max_events=facts["max_items"],
        reads=schemas.Reads(
            actions=facts["action"],
            action_values=[actions.value_at(place) for place in shown] if actions is not None else [],
            timestamps=facts["reads_times"],
            request_time=facts["reads_request_time"],
            context=facts["contextual"],
            features=encoder.given_features,
        ),
        predictions=[{name: task[name] for name in ("name", "kind", "width", "first")} for task in facts["tasks"]],
    )
