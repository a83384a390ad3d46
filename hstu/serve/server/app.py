"""Start the HTTP server, answer its routes, and end it in order."""

import asyncio
import gc
import logging
import resource
import signal
import sys
from collections import ChainMap
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

import hstu
from hstu.serve.runtime import ServingError

from .batching import Batcher, Metrics, ModelMetrics, Overloaded, Settings
from .follow import Follower
from .guard import BodyRoute, Guard, KeyFile, as_json, failure
from .listening import Server, bound
from .logs import CURRENT, set_up_logging
from .model import EventsRequest, RecommendRequest, ScoreRequest, ServedModel, User
from .shown import ShownLog
from .swap import LiveModel, load
from .traffic import Traffic, suitable
from .users import StoreError, Users, open_store

_SHOWN_PROBLEMS = 10
_EXPECTED = "Input should be "
"""How messages of pydantic begin."""
_FAILURES: dict[int | str, dict[str, Any]] = {
    401: {"description": "The server wants a key; see the header WWW-Authenticate"},
    413: {"description": "The request is too large"},
    422: {"description": "The request has mistakes, or does not fit the model"},
    429: {"description": "Too many requests wait; see the header Retry-After"},
    503: {"description": "The store of users does not answer"},
}
_EXPECTED_ERRORS = (RequestValidationError, ServingError, Overloaded, StoreError, HTTPException)
_STORE_LIMIT_S = 2
_SWITCH_INTERVAL_S = 1e-4
"""How long a thread may hold the GIL while others wait. PyTorch operators release it.
While another thread loads an export, requests take 3 times as long; with Python's default of 5 ms, 40 times."""
_log = logging.getLogger(__name__)


def serve(root: Path, host: str, port: int, settings: Settings) -> None:
    """Serve the newest export of ``root`` until SIGTERM or Ctrl-C. Raises ConfigError or DataError if it cannot."""
    set_up_logging(settings.log_format)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    torch.set_num_threads(settings.threads)
    resource.setrlimit(resource.RLIMIT_NOFILE, 2 * resource.getrlimit(resource.RLIMIT_NOFILE)[1:])  # 1,024 are few
    with bound(host, port) as listener:
        metrics = Metrics()
        gc.freeze()  # exempts imported modules, so that collecting a replaced model pauses threads for less time
        shown = f"[{host}]" if ":" in host else host
        server = Server(create_app(partial(load_models, root, settings, metrics), settings, metrics), settings)
        for each in (signal.SIGTERM, signal.SIGINT):  # before uvicorn listens, and when it raises them again at its end
            signal.signal(each, server.handle_exit)
        _log.info("listening url=http://%s:%d", shown, listener.getsockname()[1])
        server.run(sockets=[listener])
    _log.info("stopped")


def load_models(root: Path, settings: Settings, metrics: Metrics) -> list[LiveModel]:
    """Load the model of ``root`` and, if there is to be one, the second. Raises DataError if one cannot be served."""
    read = partial(load, mapped=settings.map_exports)
    models = [first := LiveModel(root, metrics, read, settings.items)]
    if settings.second_model is not None:
        own, like = ModelMetrics(metrics.registry, "hstu_second"), lambda *given: suitable(read(*given), first.current)
        models.append(LiveModel(settings.second_model, own, like, settings.items))
    return models


def create_app(models: Callable[[], Sequence[LiveModel]], settings: Settings, metrics: Metrics) -> FastAPI:
    """Create the ASGI application of what ``models`` loads: the first model, or both. Raises ConfigError or DataError
    for a mistake in the settings, before it loads them, or what ``models`` raises."""
    users = Users(None if settings.users is None else open_store(settings.users), metrics)
    keys = None if settings.api_keys is None else KeyFile(settings.api_keys)
    shown = None if settings.shown_log is None else ShownLog(settings.shown_log, metrics)

    def current() -> ServedModel:
        return traffic.first.live.current

    # Its own metrics are not shown. Requests that come during a transaction share the next.
    writer = Batcher(lambda queries: users.write(queries, current()), settings, Metrics())
    followers = [] if settings.follow is None else [Follower(settings.follow, users, writer, current, metrics)]
    traffic = Traffic(models(), users, settings, metrics, shown)
    checker = ThreadPoolExecutor(1, "ready")  # a store that hangs holds one thread, however often GET /ready asks

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for each in (*(model.batcher for model in traffic.models), writer):
            each.start()
        watching = _watch(traffic, keys, users, writer, settings.poll_s)
        tasks = [asyncio.create_task(each) for each in (watching, *(each.run() for each in followers))]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(traffic.close(), writer.close())
        users.close()

    app = FastAPI(
        title="HSTU",
        description="Recommendations of an exported model.",
        version=hstu.__version__,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from other hosts, which the header forbids
        redoc_url=None,
        exception_handlers=dict.fromkeys(_EXPECTED_ERRORS, _failed),
    )
    app.router.route_class = BodyRoute
    app.state.is_draining = False  # Server sets it

    async def written(query: Any, size: int = 0) -> Response:
        # Events are stored also for a client that does not wait for the answer.
        return as_json(await asyncio.shield(writer.ask(query, size, CURRENT.get().get("client", ""))))

    @app.post("/recommend", responses=_FAILURES)
    async def recommend(user: RecommendRequest) -> Response:
        """The items whose vectors are closest to that of the user. Retrieval only."""
        return as_json(await traffic.answer(user))

    @app.post("/score", responses=_FAILURES)
    async def score(user: ScoreRequest) -> Response:
        """What the model predicts for candidates: each task of a ranking model, the cosine of retrieval."""
        return as_json(await traffic.answer(user))

    @app.post("/embed", responses=_FAILURES)
    async def embed(user: User) -> Response:
        """The vector of the user. Retrieval only."""
        return as_json(await traffic.answer(user))

    @app.post("/events", responses=_FAILURES)
    async def events(request: EventsRequest) -> Response:
        """Store events of users, each once, at their places in time. Answered when a crash can lose none."""
        return await written(request, len(request.events))

    @app.get("/users/{user:path}", responses=_FAILURES)
    async def stored(user: str) -> Response:
        """The stored events of a user, in the fields of a request, with the titles of the items."""
        return as_json(await traffic.first.batcher.run(users.stored, user, current()))

    @app.delete("/users/{user:path}", responses=_FAILURES)
    async def forget(user: str) -> Response:
        """Forget a user: remove all stored events."""
        answer = await written(user)
        for each in traffic.models:
            await each.batcher.run(each.cache.drop, user)
        return answer

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the server answers, with which model, since when, and which files it refused, and why."""
        first, *others = ({"model": each.live.current.version, "since": each.live.since} for each in traffic.models)
        refused = dict(ChainMap(*(each.live.refused for each in traffic.models), keys.refused if keys else {}))
        second = [{**each, "share": settings.second_share, "shadow": settings.shadow} for each in others]
        return {"status": "ok", "task": current().task, **first, "second": next(iter(second), None), "refused": refused}

    @app.get("/ready", responses={503: {"description": "Send requests to another server"}})
    async def ready() -> Response:
        """Whether to send requests here: a model is loaded, the store of users answers, and the server does not end."""
        if app.state.is_draining:
            return failure(503, "the server ends; send requests to another")
        try:
            checked = asyncio.get_running_loop().run_in_executor(checker, users.check)
            await asyncio.wait_for(checked, _STORE_LIMIT_S)
        except TimeoutError:
            raise StoreError(f"no answer within {_STORE_LIMIT_S} s") from None
        return as_json({"status": "ready", "model": current().version})

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Counters in the text format of Prometheus."""
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/model")
    async def model() -> dict[str, Any]:
        """What the model in use reads and predicts, and the categories of its items."""
        return {**_facts(current()), "keeps_users": settings.users is not None}

    @app.get("/items", responses={422: _FAILURES[422]})
    def items(
        q: Annotated[str, Query(min_length=1, max_length=200)], count: Annotated[int, Query(ge=1, le=100)] = 10
    ) -> dict[str, Any]:
        """Search items by a part of their title, or by id."""
        served = current()
        return {"model": served.version, "items": served.search(q, count)}

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(Path(__file__).with_name("page.html"))

    paths = {getattr(route, "path", "") for route in app.routes}
    app.add_middleware(Guard, metrics=metrics, max_body_bytes=settings.max_body_bytes, paths=paths, keys=keys)
    return app


async def _failed(_: Request, error: Exception) -> Response:
    """Answer an error with JSON that leaves out the content of the request."""
    match error:
        case RequestValidationError():
            found: dict[str, dict[str, None]] = {}
            for each in error.errors():  # one per type that a value may have
                found.setdefault(_where(each, error.body), {})[str(each["msg"])] = None
            texts = [(where, " or ".join(messages)) for where, messages in [*found.items()][:_SHOWN_PROBLEMS]]
            problems = [
                {"where": where, "problem": text.replace(_EXPECTED, "expected ", 1).replace(_EXPECTED, "")}
                for where, text in texts
            ]
            more = f"; the first {_SHOWN_PROBLEMS} are shown" if len(found) > _SHOWN_PROBLEMS else ""
            return failure(422, f"the request has {len(found)} problem(s){more}", problems=problems)
        case Overloaded():
            return failure(429, str(error), {"Retry-After": str(error.retry_after_s)})
        case StoreError():
            _log.warning("store of users: %s", error)
            return failure(503, "the store of users does not answer; the server's log says why")
        case HTTPException(status_code=400):  # of FastAPI, if parsing fails for another reason than a mistake of syntax
            return failure(422, "the request is no JSON in UTF-8, or has a number or nested lists of extreme length")
        case HTTPException():
            return failure(error.status_code, str(error.detail), error.headers)
    return failure(422, str(error))


def _where(error: Mapping[str, Any], body: Any) -> str:
    """The location of an error, such as "items[3]". Long names are cut, because clients choose them."""
    _, *location = error["loc"]  # the first entry is "body" or "query"
    if error["type"] == "json_invalid":
        return f"character {location[0]}"
    parts: list[str] = []
    for part in location:
        try:
            body = body[part]
        except (KeyError, IndexError, TypeError):
            if parts and error["type"] != "missing":
                break  # the name of a type that the value may have
        parts.append(f"[{part}]" if isinstance(part, int) else f".{part[:80]}")
    return "".join(parts).removeprefix(".") or "the request"


async def _watch(traffic: Traffic, keys: KeyFile | None, users: Users, writer: Batcher, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        try:
            if keys is not None:
                await asyncio.to_thread(keys.refresh)
            for each in traffic.models:
                if await asyncio.to_thread(each.live.refresh):
                    gc.collect()  # the replaced model has reference cycles
            await writer.run(users.count_recent, [each.live.current for each in traffic.models])
        except Exception:  # such as an unavailable file system; models and keys stay as they are
            _log.exception("cannot look for newer exports, or count new events")


def _facts(served: ServedModel) -> dict[str, Any]:
    facts, encoder = served.model.facts, served.model.encoder
    action = encoder.described.get(facts["action"], {"count": 0, "values": []})
    return {
        "model": served.version,
        "task": served.task,
        "items": encoder.items.size,
        "max_events": facts["max_items"],
        "filter_seen": served.model.filter_seen,
        "reads": {
            "actions": facts["action"],
            "action_values": action["values"] if len(action["values"]) == action["count"] else [],
            "timestamps": facts["reads_times"],
            "request_time": facts["reads_request_time"],
            "context": {name: encoder.described[name] for name in facts["contextual"]},
            "features": {name: encoder.described[name] for name in encoder.given_features},
        },
        "predictions": facts["tasks"],
        "categories": [*served.catalog.numbers],
        "fallback": "popular" if served.task == "retrieval" and served.popularity is not None else None,
    }
