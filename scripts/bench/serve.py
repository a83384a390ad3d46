"""Load a server that keeps users, with newer exports and restarts all the time; or compare it with a minimal server.

    python scripts/bench/serve.py load --exports exports/first exports/second --folder /tmp/load --output load.json
    python scripts/bench/serve.py compare --exports exports/first --folder /tmp/compare --output compare.json

load: clients send events and requests of many users. The exports take turns as the newest, and SIGTERM ends the server,
which starts again. Every tenth answer is compared with the plain runtime's for the events of the user, and at the end
all stored events with those sent. Ctrl-C ends the load early. compare: scripts/serve.py, that of other checkouts, and
FastAPI servers whose route calls the runtime, in turn. With --stored, requests give ids of users with stored events.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from harness import ROOT, Row, publish

from hstu.serve import runtime
from hstu.serve.runtime import History, Model
from hstu.serve.runtime.files import digest_of
from hstu.serve.server.users import StoredEvents, open_store

JSON = {"content-type": "application/json"}
BEGIN, STEP_S, LATE = 1_800_000_000, 60, 2000
"""Time of the first event, seconds between events, and how many later ones may come before an event."""
MINIMAL = """
import socket, sys, torch, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from hstu.serve import runtime
torch.set_num_threads(1)
model, app = runtime.load(sys.argv[2]), FastAPI()
class User(BaseModel):
    items: list[int]
    actions: list[int]
    timestamps: list[int]
@app.post("/recommend")
async def recommend(user: User):
    found = model.recommend(runtime.History(items=user.items, actions=user.actions, timestamps=user.timestamps))
    return {"items": found.items, "scores": found.scores, "titles": found.titles}
listener = socket.create_server(("127.0.0.1", int(sys.argv[4])))
listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
print("listening", flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
"""


class Server:
    """A process that writes "listening" to its log when it serves."""

    def __init__(self, script: Path, export: Path, port: int, log: Path, *more: object) -> None:
        command = [sys.executable, script, "--export", export, "--port", port, *more]
        root = script.parents[1] if script.name == "serve.py" else ROOT
        environment, self.log = {**os.environ, "PYTHONPATH": str(root)}, log
        with log.open("wb") as out:  # in a session of its own, because Ctrl-C is not for it
            self.process = subprocess.Popen(
                [*map(str, command)], env=environment, stdout=out, stderr=out, start_new_session=True
            )
        self.folder = Path(f"/proc/{self.process.pid}")

    async def start(self) -> None:
        """Wait until it listens."""
        while b"listening" not in self.log.read_bytes():
            if self.process.poll() is not None:
                raise SystemExit(f"the server has ended: see {self.log}")
            await asyncio.sleep(0.05)
        self.cpu_s_at_start = self.cpu_s

    @property
    def cpu_s(self) -> float:
        """CPU time so far."""
        fields = (self.folder / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def memory_mb(self) -> float:
        """Resident memory."""
        return int((self.folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    async def stop(self) -> int:
        """End it by SIGTERM. Returns the exit code."""
        self.process.terminate()
        return await asyncio.to_thread(self.process.wait, 60)


class Load:
    """See the module. ``ids``: of the items."""

    def __init__(self, options: argparse.Namespace, ids: list[Any]) -> None:
        draw, count, users, asks = np.random.default_rng(0), options.events, options.users, options.requests
        few = (users * draw.random(count) ** 3).astype(int)  # some users have very many events
        owners = draw.permutation(np.concatenate([np.arange(users), few])[:count]).tolist()
        rows = zip(owners, draw.choice(ids, count).tolist(), draw.integers(1, 6, count).tolist(), strict=True)
        self.events = [Row(user=user, item=item, action=action) for user, item, action in rows]
        for number, event in enumerate(self.events):
            event["timestamp"] = BEGIN + STEP_S * number
        firsts = np.arange(0, count, 5)
        asked = (users * draw.random(asks) ** draw.choice([1, 3], asks)).astype(int).tolist()
        moments = np.concatenate([(firsts + draw.uniform(0, LATE, len(firsts))) / count, draw.random(asks)])
        steps: list[Any] = [*(range(first, min(first + 5, count)) for first in firsts), *asked]
        self.steps, self.options, self.random = iter([steps[n] for n in np.argsort(moments)]), options, random.Random(0)
        self.known, self.begun = [list[int]() for _ in range(users)], [0] * users
        self.counts, self.errors, self.cpu_s, self.memory = Counter[str](), Counter[str](), 0.0, list[Row]()
        self.answers, self.samples = list[tuple[float, float]](), list[tuple[Any, ...]]()
        self.swaps, self.restarts, self.clients, self.is_ended = [[inf, inf]], [[-inf, -inf]], options.clients, False

    async def run(self) -> None:
        """Send everything."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, lambda: setattr(self, "is_ended", True))
        self.publish()
        await self.start()
        try:
            async with aiohttp.ClientSession(f"http://127.0.0.1:{self.options.port}") as self.session:
                await asyncio.gather(self.disturb(), *(self.client() for _ in range(self.clients)))
        finally:
            await self.stop()

    def publish(self) -> None:
        """Make the next export the newest."""
        number, new = self.counts["exports"], self.options.folder / "exports/.new"
        shutil.copytree(self.options.exports[number % len(self.options.exports)] / "serving", new)
        (new / "manifest.json").touch()
        new.rename(new.with_name(f"{number:05d}"))
        shutil.rmtree(new.with_name(f"{number - 3:05d}"), ignore_errors=True)
        self.counts["exports"] += 1

    async def start(self) -> None:
        """Start a server with the store of the one before."""
        self.counts["servers"] += 1
        folder, log = self.options.folder, self.options.folder / f"server-{self.counts['servers']}.log"
        more = "--users", folder / "users.db", "--poll_s", 1
        self.server = Server(ROOT / "scripts/serve.py", folder / "exports", self.options.port, log, *more)
        await self.server.start()

    async def stop(self) -> None:
        """End the server."""
        self.cpu_s += self.server.cpu_s - self.server.cpu_s_at_start
        code = await self.server.stop()
        found = re.findall("defect.*|Traceback|refused.*", self.server.log.read_text())
        self.errors.update([f"{self.server.log}: {each}" for each in found] + [f"exit code {code}"] * bool(code))

    async def disturb(self) -> None:
        """Publish exports and restart the server at their times, and show the progress."""
        begun = time.monotonic()
        swap, restart, show = begun + self.options.swap_s / 2, begun + self.options.restart_s, begun + 10
        while self.clients:
            await asyncio.sleep(0.1)
            if (now := time.monotonic()) >= swap:
                swap += self.options.swap_s
                self.swaps.append([now, inf])
                self.publish()
            if now >= restart:
                self.restarts.append([now, inf])
                await self.stop()
                await self.start()
                self.restarts[-1][1] = time.monotonic()
                restart = max(restart + self.options.restart_s, self.restarts[-1][1] + 5)
            if now >= show:
                show += 10
                row = {"s": round(now - begun), "server": self.counts["servers"], "mb": round(self.server.memory_mb)}
                self.memory.append(row)
                print(row, dict(self.counts), "errors:", self.errors.total(), file=sys.stderr, flush=True)

    async def client(self) -> None:
        """Take steps until all are done."""
        for step in self.steps:
            await (self.ask(step) if isinstance(step, int) else self.send(step))
            if self.is_ended:
                break
        self.clients -= 1

    async def send(self, numbers: range) -> None:
        """Send events, some of them twice."""
        events, found = self.events[numbers.start : numbers.stop], None
        for event in events:
            self.begun[event["user"]] += 1
        for _ in range(1 + (self.random.random() < 0.02)):
            found = await self.answer("/events", {"events": events})
            self.counts.update(found or {})
        for number, event in zip(numbers, events, strict=True) if found else ():
            self.known[event["user"]].append(number)

    async def ask(self, user: int) -> None:
        """Send a request for a user, half of the times as of an earlier time."""
        known, begun, draw = self.known[user], self.begun[user], self.random.random
        last = int(self.counts["in_order"] * draw()) if draw() < 0.5 else len(self.events)
        at = {} if last == len(self.events) else {"at": BEGIN + STEP_S * last}
        events, is_still = [self.events[n] for n in sorted(known) if n <= last], begun == len(known)
        path = "/recommend" if draw() < 0.8 or not events else "/score" if draw() < 0.5 else "/embed"
        more = {"candidates": [event["item"] for event in self.events[user % 9 : 10]]} if path == "/score" else {}
        found = await self.answer(path, {"user": user, **at, **more})
        if found and found["model"].startswith(f"{self.counts['exports'] - 1:05d}"):
            self.swaps[-1][1] = min(self.swaps[-1][1], time.monotonic())
        if found and is_still and begun == self.begun[user] and draw() < 0.1:
            self.samples.append((events, at.get("at"), more.get("candidates"), found))

    async def answer(self, path: str, content: Any) -> Any:
        """The answer to a request, which is repeated where docs/serve.md says so. None: an error, or an early end."""
        body, begun = json.dumps(content).encode(), time.monotonic()
        while not self.is_ended:
            sent = time.monotonic()
            try:
                async with self.session.post(path, data=body, headers=JSON) as answer:
                    status, text, wait_s = answer.status, await answer.text(), int(answer.headers.get("retry-after", 1))
            except (OSError, aiohttp.ClientError) as error:
                signalled, listens = self.restarts[-1]
                self.counts["cut" if sent < signalled else "not connected"] += 1
                if not signalled - 0.1 < sent < listens:
                    self.errors[f"{error!r} {signalled - sent:.2f} s before SIGTERM"] += 1
                await asyncio.sleep(0.2)
                continue
            if status == 200:
                self.answers.append((begun, time.monotonic()))
                self.counts[path] += 1
                return json.loads(text)
            self.counts[f"status {status}"] += 1
            if status not in (429, 503):
                self.errors[f"{status} {text[:200]} to {path} {body[:200]!r}"] += 1
                return None
            await asyncio.sleep(wait_s)
        return None

    def report(self) -> Row:
        """Compare samples and stored events with what is right."""
        models = {digest_of(each / "serving")[:12]: runtime.load(each / "serving") for each in self.options.exports}
        wrong = sum(not is_right(models[sample[-1]["model"][6:]], *sample) for sample in self.samples)
        lost, foreign, store = 0, 0, open_store(str(self.options.folder / "users.db"))
        for user, text in enumerate(store.read([str(user).encode() for user in range(len(self.known))])):
            if self.begun[user] == len(self.known[user]):  # at an early end, some are stored without an answer
                kept = StoredEvents.read(text)
                rows = Counter(zip(kept.items, kept.actions, kept.timestamps, strict=True))
                sent = Counter((*self.events[n].values(),)[1:] for n in self.known[user])
                lost, foreign = lost + (sent - rows).total(), foreign + (rows - sent).total()
        store.close()
        begun, ended = np.array(self.answers).T
        ms, rest = Row(), np.full(len(begun), True)
        for name, windows in (("restart", self.restarts), ("swap", self.swaps), ("neither", [[-inf, inf]])):
            during = rest & np.any([(begun < last) & (ended > first) for first, last in windows], axis=0)
            rest &= ~during
            if during.any():
                ms[name] = [int(during.sum()), *np.quantile(1e3 * (ended - begun)[during], (0.5, 0.99, 1)).round(1)]
        facts = {"counts": self.counts, "users with events": sum(map(bool, self.known)), "errors": self.errors}
        facts |= {
            "answers compared": len(self.samples),
            "wrong": wrong,
            "events lost; doubled, foreign": [lost, foreign],
        }
        facts |= {"cpu ms per request": self.cpu_s / len(begun) * 1e3, "count, p50, p99, most, ms": ms}
        return facts | {"memory": self.memory}


def is_right(model: Model, events: list[Row], at: int | None, shown: list[Any] | None, found: Row) -> bool:
    """Whether an answer is the plain runtime's for these events."""
    items, actions, times = ([event[name] for event in events] for name in ("item", "action", "timestamp"))
    answered, scores = ([each[name] for each in found.get("items", [])] for name in ("item", "score"))
    if not events:
        return "fallback" in found  # to what is popular now, by the events of all users so far
    history = History(items=items, actions=actions, timestamps=times)
    vector = model.embed(history, at)
    if "vector" in found:
        pairs = [(found["vector"], vector)]
    elif shown is not None:
        pairs = [(found["scores"]["score"], model.item_vectors(shown) @ vector)]
    else:  # items of nearly equal scores may change places
        best = torch.tensor(model.recommend(history, 10, at).scores)
        pairs = [(scores, best), (scores, model.item_vectors(answered) @ vector)]
    return all(np.shape(own) == np.shape(right) and np.allclose(own, right, atol=1e-4) for own, right in pairs)


async def compare(options: argparse.Namespace, ids: list[Any]) -> Row:
    """See the module."""
    folder, draw, rows, histories = options.folder, random.Random(0), list[Row](), list[Row]()
    for _ in range(300):
        times = range(BEGIN, BEGIN + STEP_S * min(200, 10 + int(draw.expovariate(1 / 90))), STEP_S)
        lists = {"items": draw.choices(ids, k=len(times)), "actions": draw.choices(range(1, 6), k=len(times))}
        histories.append({**lists, "timestamps": [*times]})
    asked = [{"user": user} for user in range(len(histories))] if options.stored else histories
    bodies = [json.dumps(each).encode() for each in asked]
    scripts = {"hstu-serve": ROOT / "scripts/serve.py"}
    scripts |= {each.name: each / "scripts/serve.py" for each in options.checkouts}
    exports = dict(zip(scripts, options.exports, strict=True))
    if not options.stored:
        scripts |= {"async route": folder / "a.py", "thread pool": folder / "b.py"}
        scripts["async route"].write_text(MINIMAL)
        scripts["thread pool"].write_text(MINIMAL.replace("async def", "def"))
    servers = dict[str, Server]()
    for name, path in scripts.items():
        export, port = exports.get(name, options.exports[0]) / "serving", options.port + len(servers)
        more = ["--users", folder / f"{name}.db"] * options.stored
        servers[name] = Server(path, export, port, folder / f"{name}.log", *more)
    try:
        for server in servers.values():
            await server.start()
        for place in range(len(servers) * options.stored):
            await store(options.port + place, histories, bodies)
        for number, clients, (place, name) in product(range(options.rounds), (1, 16, 64), enumerate(servers)):
            cpu_s, begun = servers[name].cpu_s, time.monotonic()
            async with aiohttp.ClientSession(f"http://127.0.0.1:{options.port + place}") as session:
                each = [ask_until(begun + options.seconds, session, bodies) for _ in range(clients)]
                ms = [ms for found in await asyncio.gather(*each) for ms in found]
            row = {"round": number, "server": name, "clients": clients, "per_s": len(ms) / (time.monotonic() - begun)}
            row |= {"stored": options.stored, "load": os.getloadavg()[0]}
            row["p50_ms"], row["p99_ms"] = np.quantile(ms, (0.5, 0.99)).tolist()
            rows.append({**row, "cpu_ms": 1e3 * (servers[name].cpu_s - cpu_s) / len(ms)})
            print(rows[-1], file=sys.stderr, flush=True)
    finally:
        for server in servers.values():
            await server.stop()
    return {"rows": rows}


async def store(port: int, histories: list[Row], bodies: list[bytes]) -> None:
    """Store the events of users, and ask once for each."""
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", raise_for_status=True) as session:
        for user, (history, body) in enumerate(zip(histories, bodies, strict=True)):
            rows = zip(history["items"], history["actions"], history["timestamps"], strict=True)
            events = [{"user": user, "item": item, "action": action, "timestamp": at} for item, action, at in rows]
            for path, content in (("/events", json.dumps({"events": events}).encode()), ("/recommend", body)):
                async with session.post(path, data=content, headers=JSON) as answer:
                    await answer.read()


async def ask_until(end: float, session: aiohttp.ClientSession, bodies: list[bytes]) -> list[float]:
    """Milliseconds of one request after the other."""
    found = []
    while (begun := time.monotonic()) < end:
        async with session.post("/recommend", data=random.choice(bodies), headers=JSON) as answer:
            await answer.read()
            answer.raise_for_status()
        found.append(1e3 * (time.monotonic() - begun))
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=("load", "compare"))
    parser.add_argument("--exports", type=Path, nargs="+", required=True, help="of retrieval, with programs")
    parser.add_argument("--checkouts", type=Path, nargs="*", default=[], help="to compare; one more export for each")
    parser.add_argument("--stored", action="store_true", help="compare requests of users with stored events")
    parser.add_argument("--folder", type=Path, required=True, help="new, for the server's store and logs")
    parser.add_argument("--output", type=Path, help="file of the report")
    numbers = {"port": 8123, "requests": 100_000, "events": 100_000, "users": 50_000, "clients": 16, "swap_s": 60}
    for name, default in (numbers | {"restart_s": 60, "rounds": 3, "seconds": 5}).items():
        parser.add_argument(f"--{name}", type=int, default=default, help="%(default)s")
    options = parser.parse_args()
    (options.folder / "exports").mkdir(parents=True)
    torch.set_num_threads(1)
    items = runtime.load(options.exports[0] / "serving").encoder.items
    ids = items.values_at(torch.arange(items.size))
    if options.trial == "compare":
        publish(asyncio.run(compare(options, ids)), options.output)
    else:
        load = Load(options, ids)
        asyncio.run(load.run())
        publish(load.report(), options.output)


if __name__ == "__main__":
    main()
