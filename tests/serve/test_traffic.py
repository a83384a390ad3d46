"""A second model, for a share of the users or as shadow of the first, and several servers behind a proxy."""

from __future__ import annotations

import logging
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hstu.base.errors import EXIT_BAD_CONFIG, EXIT_BAD_DATA
from hstu.serve import runtime
from hstu.serve.export import TOLERANCE
from hstu.serve.runtime import History, ServingError
from hstu.serve.server.batching import Settings
from hstu.serve.server.model import Answer, ServedModel, User
from hstu.serve.server.traffic import place_of, suitable
from scripts import serve
from tests.serve.http_server import ROOT, Client, StubLoader, StubModel, running, started, until, write_folder
from tests.serve.served import Served, export_with
from tests.serve.test_production import shown_rows
from tests.serve.test_server import metric
from tests.serve.test_users import event

ITEMS = [1000, 1001, 1002]


@pytest.fixture(scope="module")
def other(retrieval: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with other item vectors."""

    def turn(tables: dict[str, Any], _: dict[str, Any]) -> None:
        tables["item_vectors"] = tables["item_vectors"].flip(1)

    return export_with(retrieval.folder, tmp_path_factory.mktemp("other") / "a", turn)


def history(user: int) -> dict[str, Any]:
    return {"items": [*ITEMS, 1000 + user % 7], "actions": [1, 2, 1, 1], "timestamps": [0, 60, 120, 180]}


def expected(model: runtime.Model, user: int) -> list[Any]:
    return model.recommend(History(user, **history(user)), 3).items


def ended(server: subprocess.Popen[str]) -> str:
    """What else the server has written until it ends."""
    server.terminate()
    assert server.wait(20) == 0 and server.stderr is not None
    return server.stderr.read()


def test_a_share_of_the_users_is_answered_by_the_second_model_which_is_replaced_alone(
    retrieval: Served, other: Path, tmp_path: Path
) -> None:
    second, shown = shutil.copytree(other, tmp_path / "second/a").parent, tmp_path / "shown"
    options = ["--second_model", str(second), "--second_share", "0.3", "--poll_s", "0.2"]
    server, port = started(retrieval.folder, *options, "--users", str(tmp_path / "users.db"), "--shown_log", str(shown))
    client = Client(port)
    models = {retrieval.folder.parent.name: retrieval.model, "a": runtime.load(other)}
    seconds = {user for user in range(60) if place_of(user) < 0.3}
    assert 8 < len(seconds) < 28 and seconds == {user for user in range(60) if place_of(str(user)) < 0.3}
    events = [
        event(60 * place, item, user, action=1 + (place == 1))
        for user in range(60)
        for place, item in enumerate(history(user)["items"])
    ]
    assert client.post("/events", {"events": events}).status == 200
    for user in [*range(60)] * 2:  # keys and values are kept, of each model its own
        name = "a" if user in seconds else retrieval.folder.parent.name
        for asked in ({"user": user, "k": 3}, {**history(user), "user": str(user), "k": 3}):
            answer = client.post("/recommend", asked).json
            assert answer["model"].startswith(f"{name}@")
            assert [each["item"] for each in answer["items"]] == expected(models[name], user)
    assert metric(client, "hstu_second_answer_seconds_count") == 4 * len(seconds)
    assert metric(client, "hstu_answer_seconds_count") == 4 * (60 - len(seconds))
    health = client.get("/health").json["second"]
    assert health["model"].startswith("a@") and (health["share"], health["shadow"]) == (0.3, False)
    nobody = {client.post("/embed", history(0), X_Request_Id=str(number)).json["model"] for number in range(20)}
    assert len(nobody) == 2
    shutil.copytree(other, second / "b")
    until(lambda: client.post("/recommend", {"user": min(seconds), "k": 3}).json["model"].startswith("b@"))
    first = next(user for user in range(60) if user not in seconds)
    assert client.post("/recommend", {"user": first}).json["model"].startswith(f"{retrieval.folder.parent.name}@")
    assert client.delete(f"/users/{first}").json == {"forgotten": 4}
    ended(server)
    found = {(int(row["user"]), row["model"].split("@")[0]) for row in shown_rows(shown)}
    assert {user for user, name in found if name in "ab"} == seconds


def test_a_shadow_answers_nobody_and_is_logged_apart_from_what_was_shown(
    retrieval: Served, other: Path, tmp_path: Path
) -> None:
    shown, second = tmp_path / "shown", runtime.load(other)
    server, port = started(retrieval.folder, "--second_model", str(other), "--shadow", "--shown_log", str(shown))
    client, overlaps = Client(port), list[float]()
    for user in range(12):
        asked = {**history(user), "user": user, "k": 3}
        items = [each["item"] for each in client.post("/recommend", asked, X_Request_Id=f"r{user}").json["items"]]
        assert items == expected(retrieval.model, user)
        overlaps.append(len({*items} & {*expected(second, user)}) / 3)
        explained = {**history(user), "user": user, "candidates": [1003], "explain": 1}
        assert client.post("/score", explained).status == 200, "explanations have no shadow"
    candidates = [1003, 99999, 1005]
    one = client.post("/score", {**history(1), "user": 1, "candidates": candidates}).json["scores"]["score"]
    other_score = second.score(History(1, **history(1)), candidates)["score"]
    assert one[1] is None
    until(lambda: metric(client, 'hstu_shadow_total{outcome="computed"}') == 13)
    difference = sum(abs(one[place] - float(other_score[place])) for place in (0, 2)) / 2
    assert metric(client, "hstu_shadow_score_difference_count") == 1
    assert metric(client, "hstu_shadow_score_difference_sum") == pytest.approx(difference, abs=TOLERANCE)
    assert difference > 100 * TOLERANCE
    assert metric(client, "hstu_shadow_overlap_count") == 12
    assert metric(client, "hstu_shadow_overlap_sum") == pytest.approx(sum(overlaps)) and 0 < sum(overlaps) < 12
    ended(server)
    first = (shown, retrieval.folder.parent.name, retrieval.model)
    for folder, name, model in (first, (shown / "shadow", "a", second)):
        rows = shown_rows(folder)
        assert {row["model"].split("@")[0] for row in rows} == {name} and len(rows) == 12 * 3 + 3
        for user in range(12):
            assert [int(row["item"]) for row in rows if row["request"] == f"r{user}"] == expected(model, user)


class Failing(StubModel):
    def _answer(self, request: User) -> Answer | Exception:
        return RuntimeError("a defect") if request.history.items[0] == 1 else super()._answer(request)


def shadows(client: Client, outcome: str) -> float:
    name = f'hstu_shadow_total{{outcome="{outcome}"}}'
    return metric(client, name) if name in client.get("/metrics").text else 0


def test_a_slow_or_failing_shadow_changes_no_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("hstu"), "propagate", True)
    slow: Any = Failing("second")
    settings = Settings(poll_s=3600, max_waiting=2, second_model=write_folder(tmp_path / "second"), shadow=True)
    with running(write_folder(tmp_path / "first"), StubLoader(), settings, lambda *_: slow) as own:
        client = Client(own.port, timeout_s=5)
        for number in range(10):  # the shadow computes until its gate opens
            assert client.post("/embed", {"items": [number % 2]}).json["vector"] == [number % 2]
        until(lambda: shadows(client, "dropped") >= 7)
        slow.gate.set()
        for _ in range(4):
            before = shadows(client, "failed")
            assert client.post("/embed", {"items": [1]}).status == 200
            until(lambda: shadows(client, "failed") > before)  # noqa: B023
        assert caplog.text.count("the shadow has failed") == 1 and "a defect" in caplog.text
        slow.gate.clear()
        count = len(slow.batches)
        for _ in range(3):
            client.post("/embed", {"items": [0]})
        until(lambda: len(slow.batches) > count)
        threading.Timer(0.5, slow.gate.set).start()
    assert len(slow.batches) == count + 1, "what waits is dropped at the end"


def test_a_second_model_that_cannot_take_the_place_of_the_first_is_refused(
    retrieval: Served, ranking: Served, tmp_path: Path
) -> None:
    def rename(_: dict[str, Any], words: dict[str, Any]) -> None:
        words[f"ids.{retrieval.model.facts['item']}"] += 50_000

    first = ServedModel(retrieval.model, "first")
    strange = runtime.load(export_with(retrieval.folder, tmp_path / "strange", rename))
    for model, problem in ((ranking.model, "it is a ranking model, and"), (strange, "it has no item .* such as 1000")):
        with pytest.raises(ServingError, match=problem):
            suitable(ServedModel(model, "second"), first)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--shadow", "--second_share and --shadow need --second_model"),
        ("--second_model a", "--second_model needs --second_share, of the users"),
        ("--second_model a --second_share 1.5", "1.5 is not from 0 to 1"),
        ("--api_keys {0}/no.keys", "no.keys cannot be read"),
        ("--follow {0}/events.jsonl", "--follow needs --users"),
    ],
)
def test_mistakes_in_options_are_named_before_a_model_is_loaded(
    options: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        sys.exit(serve.main(["--export", str(tmp_path / "none"), "--port", "0", *options.format(tmp_path).split()]))
    error, code = capsys.readouterr().err, EXIT_BAD_DATA if "keys" in options else EXIT_BAD_CONFIG
    assert exit_.value.code == code and problem in error and "no export" not in error


@contextmanager
def proxy(folder: Path, ports: list[int]) -> Iterator[Client]:
    """HAProxy as docs/serve.md configures it, without TLS, before servers at ``ports``."""
    if shutil.which("haproxy") is None:
        pytest.skip("haproxy is not installed: apt-get install haproxy")
    (content,) = re.findall(r"```text\n(defaults\n.*?)```", (ROOT / "docs/serve.md").read_text(), re.DOTALL)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    content = re.sub(r"bind .*", f"bind 127.0.0.1:{port}", content)
    for number, own in enumerate(ports, 1):
        content = content.replace(f"127.0.0.1:800{number}", f"127.0.0.1:{own}")
    (folder / "haproxy.cfg").write_text(content)
    with subprocess.Popen(["haproxy", "-f", str(folder / "haproxy.cfg")], stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
            yield Client(port)
        finally:
            process.terminate()


def test_users_of_a_killed_server_are_answered_rightly_by_the_other(retrieval: Served, tmp_path: Path) -> None:
    options = ["--users", str(tmp_path / "users.db"), "--map_exports"]
    with ThreadPoolExecutor(2) as pool:
        servers = [*pool.map(lambda _: started(retrieval.folder, *options), range(2))]
    own = [Client(port) for _, port in servers]

    def answered() -> list[int]:
        return [int(metric(client, "hstu_answer_seconds_count")) for client in own]

    with proxy(tmp_path, [port for _, port in servers]) as client:
        until(lambda: client.get("/ready").status == 200)
        events = [event(time, 1000 + time, user) for time in range(4) for user in range(20)]
        assert client.post("/events", {"events": events}).status == 200
        for user in range(20):
            before = answered()
            assert [client.post("/embed", {"user": user}).status for _ in range(2)] == [200] * 2
            assert 2 in [now - old for now, old in zip(answered(), before, strict=True)], "each user has one server"
        assert all(answered()), "each server has users"
        servers[0][0].send_signal(signal.SIGKILL)
        servers[0][0].wait()
        for user in range(20):
            client.post("/events", {"events": [event(9, 1006, user)]})
            found = client.post("/embed", {"user": user}).json["vector"]
            whole = History(user, items=[*ITEMS, 1003, 1006], actions=[1] * 5, timestamps=[0, 1, 2, 3, 9])
            assert found == pytest.approx(retrieval.model.embed(whole).tolist(), abs=TOLERANCE)
    ended(servers[1][0])
