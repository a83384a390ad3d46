"""Latency and throughput of the server over 127.0.0.1, while newer exports replace the model.

python scripts/bench/serve_cpu.py --exports exports/first exports/second --data tmp_data/ml-100k

Both exports are of retrieval models of the data, such as two checkpoints of a run. A server is started for each number
of clients and each size of the cache. A client is a thread that sends its next request when it has the answer: the ten
best items for the first events of a user. Every few seconds a copy of the other export takes the place of the model.
Every answer is compared with the one that the plain runtime gives with the model that the answer names.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import ROOT, command_line, publish

from hstu import api
from hstu.serve import runtime
from hstu.serve.server.swap import serving_folder, version_of

_K = 10
_START_S = 180.0
_TOLERANCE = 1e-4


def requests_of(data: Path, count: int, longest: int) -> list[dict[str, Any]]:
    """Users of the data, each with a random number of first events."""
    draw = random.Random(0)
    store, found = api.open_store(data), []
    for each in api.histories(store, [draw.randrange(store.num_users) for _ in range(count)]):
        events = slice(0, draw.randint(1, min(longest, len(each.items))))
        request: dict[str, Any] = {"items": [*map(_plain, each.items[events])], "k": _K}
        if each.actions is not None:
            request["actions"] = [*map(_plain, each.actions[events])]
        if each.timestamps is not None:
            request["timestamps"] = [*map(int, each.timestamps[events])]
        found.append(request)
    return found


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def expected(folder: Path, requests: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Scores of the best items of each request, without a server."""
    model = runtime.load(folder)
    histories = [runtime.History(each["items"], each.get("actions"), each.get("timestamps")) for each in requests]
    return [found.scores for found in model.recommend_batch(histories, k=_K)]


class Server:
    """A server of the exports in a folder of its own, which takes a copy of another export every few seconds."""

    def __init__(self, sources: Sequence[Path], scratch: Path, cache_mb: int, every_s: float) -> None:
        self._sources, self._scratch, self._every_s, self.copies = sources, scratch, every_s, 0
        self.sources: dict[str, int] = {}
        """Version of a copy → index of its source."""
        self._copy()
        command = [sys.executable, str(ROOT / "scripts/serve.py"), "--export", str(scratch / "exports"), "--port", "0"]
        command += ["--cache_mb", str(cache_mb), "--poll_s", "0.5"]
        self._log = (scratch / "log.txt").open("w+b")
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        self.port = self._wait_for_port()
        self._ended = threading.Event()
        self._copier = threading.Thread(target=self._copy_now_and_then)

    def _wait_for_port(self) -> int:
        end = time.monotonic() + _START_S
        while time.monotonic() < end and self.process.poll() is None:
            if found := re.search(r"listening url=http://[^ ]+:(\d+)", (self._scratch / "log.txt").read_text()):
                return int(found[1])
            time.sleep(0.1)
        self.process.kill()
        raise SystemExit(f"the server does not start:\n{(self._scratch / 'log.txt').read_text()}")

    def __enter__(self) -> Server:
        self._copier.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._copier.join()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self._log.close()

    def _copy_now_and_then(self) -> None:
        while not self._ended.wait(self._every_s):
            self._copy()

    def _copy(self) -> None:
        source = self.copies % len(self._sources)
        folder = self._scratch / "exports" / f"copy-{self.copies}"
        shutil.copytree(self._sources[source], folder)  # it is not complete without its manifest
        self.copies += 1
        self.sources[version_of(folder)] = source
        os.utime(folder / "manifest.json")

    def memory_mb(self) -> float:
        """Resident memory of the server."""
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1]) / 1024  # type: ignore[index]


def load_with(server: Server, clients: int, requests: Sequence[dict[str, Any]], total: int) -> list[Any]:
    """(request, status, seconds, answer) of ``total`` requests by so many clients at once."""
    bodies = [json.dumps(each).encode() for each in requests]
    answers: list[Any] = []

    def client(number: int) -> None:
        draw = random.Random(number)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        for _ in range(total // clients):
            place = draw.randrange(len(bodies))
            begun = time.perf_counter()
            connection.request("POST", "/recommend", bodies[place], {"content-type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
            answers.append((place, answer.status, time.perf_counter() - begun, content))
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def wrong_answers(server: Server, answers: Sequence[Any], right: Sequence[Sequence[Sequence[float]]]) -> int:
    """Number of answers whose scores are not those of the model that they name. Right scores by source and request."""
    wrong = 0
    for place, status, _, content in answers:
        if status != 200:
            continue
        found = json.loads(content)
        scores = right[server.sources[found["model"]]][place]
        ours = [item["score"] for item in found["items"]]
        wrong += len(ours) != len(scores) or any(abs(a - b) > _TOLERANCE for a, b in zip(ours, scores, strict=True))
    return wrong


def measure(
    options: argparse.Namespace,
    sources: list[Path],
    clients: int,
    cache_mb: int,
    requests: list[dict[str, Any]],
    right: Any,
) -> dict[str, Any]:
    """One row of the table."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        Server(sources, Path(scratch), cache_mb, options.swap_every_s) as server,
    ):
        load_with(server, clients, requests, 2 * clients)  # opens what is opened once
        before, begun = server.memory_mb(), time.perf_counter()
        answers = load_with(server, clients, requests, options.requests)
        seconds, after = time.perf_counter() - begun, server.memory_mb()
        times = sorted(1000 * each[2] for each in answers)
        versions = {json.loads(each[3])["model"] for each in answers if each[1] == 200}
        return {
            "clients": clients,
            "cache_mb": cache_mb,
            "requests": len(answers),
            "requests_per_s": round(len(answers) / seconds, 1),
            "p50_ms": round(statistics.median(times), 1),
            "p99_ms": round(times[int(0.99 * (len(times) - 1))], 1),
            "max_ms": round(times[-1], 1),
            "refused": sum(each[1] == 429 for each in answers),
            "failed": sum(each[1] not in (200, 429) for each in answers),
            "lost": options.requests // clients * clients - len(answers),
            "wrong": wrong_answers(server, answers, right),
            "models_that_answered": len(versions),
            "memory_mb": [round(before), round(after)],
        }


def main() -> None:
    """Command line."""
    parser = command_line(__doc__, output=True)
    parser.add_argument("--exports", type=Path, nargs=2, required=True, help="two exports with a program")
    parser.add_argument("--data", type=Path, required=True, help="their preprocessed data")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--cache_mb", type=int, nargs="+", default=[0, 64])
    parser.add_argument("--requests", type=int, default=3000, help="of each row")
    parser.add_argument("--swap_every_s", type=float, default=10.0)
    options = parser.parse_args()
    sources = [folder for path in options.exports if (folder := serving_folder(path)) is not None]
    requests = requests_of(options.data, 1000, runtime.load(sources[0]).facts["max_items"])
    right = [expected(folder, requests) for folder in sources]
    rows = [
        measure(options, sources, clients, cache_mb, requests, right)
        for cache_mb in options.cache_mb
        for clients in options.clients
    ]
    load = [round(each, 1) for each in os.getloadavg()]
    lengths = [len(each["items"]) for each in requests]
    publish(
        {
            "cores": os.cpu_count(),
            "load_average": load,
            "different_requests": len(requests),
            "mean_events": statistics.mean(lengths),
            "swap_every_s": options.swap_every_s,
            "rows": rows,
        },
        options.output,
    )


if __name__ == "__main__":
    main()
