"""Latency, throughput and memory of the server over 127.0.0.1, while newer exports replace the model.

python scripts/bench/serve_cpu.py --exports exports/first exports/second --data tmp_data/ml-1m --output serve.json

Both exports are of retrieval models of the data, such as two checkpoints of a run. A request asks for the ten best
items of a user, after all events but the last few. One server answers all rows without a cache, another those with
one. Now and then a copy of the other export takes the place of the model. Clients run in a process of their own
(serve_clients.py). Every answer is compared with the one that the plain runtime gives with the model that the answer
names; what is right is computed before, and answers are checked after a row.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
from harness import Row, command_line, publish

from hstu import api
from hstu.serve import runtime
from hstu.serve.server.swap import serving_folder, version_of
from scripts.server_process import start_server

SHARES = {(0, 1): 4, (0, 16): 13, (0, 64): 13, (64, 1): 10, (64, 16): 30, (64, 64): 30}
"""(Megabytes of the cache, clients) → percent of all requests."""
_K, _NEWEST_LEFT_OUT = 10, 10
_SAMPLE_S, _AT_ONCE = 1.0, 16
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Right:
    """What a model answers to a request."""

    scores: list[float]
    """Of the best items, best first."""
    of_items: dict[Any, float]
    """Item → score, also of those that come next: where scores are almost equal, other items may be the best."""


def requests_of(data: Path, count: int) -> list[dict[str, Any]]:
    """Users of the data, each with all events but up to ten of the newest."""
    draw = random.Random(0)
    store, found = api.open_store(data), []
    for each in api.histories(store, [draw.randrange(store.num_users) for _ in range(count)]):
        events = slice(0, max(1, len(each.items) - draw.randrange(_NEWEST_LEFT_OUT)))
        request: dict[str, Any] = {"items": [*map(_plain, each.items[events])], "k": _K}
        if each.actions is not None:
            request["actions"] = [*map(_plain, each.actions[events])]
        if each.timestamps is not None:
            request["timestamps"] = [*map(int, each.timestamps[events])]
        found.append(request)
    return found


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def right_answers(folder: Path, requests: Sequence[dict[str, Any]]) -> list[Right]:
    """What the model of an export answers to each request, without a server."""
    model, found = runtime.load(folder), list[Right]()
    histories = [
        runtime.History(items=each["items"], actions=each.get("actions"), timestamps=each.get("timestamps"))
        for each in requests
    ]
    for first in range(0, len(histories), _AT_ONCE):
        for best in model.recommend_batch(histories[first : first + _AT_ONCE], k=2 * _K):
            found.append(Right(best.scores[:_K], dict(zip(best.items, best.scores, strict=True))))
    return found


def is_right(content: bytes, right: Right) -> bool:
    """Whether an answer has the best items with their scores."""
    items = json.loads(content)["items"]
    scores = [item["score"] for item in items]
    return len(scores) == len(right.scores) and all(
        abs(item["score"] - score) <= _TOLERANCE
        and abs(item["score"] - right.of_items.get(item["item"], 9.0)) <= _TOLERANCE
        for item, score in zip(items, right.scores, strict=True)
    )


@dataclass
class Server:
    """A server of the exports in a folder of its own, in which other exports appear now and then."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    exports: Path
    sources: dict[str, int] = field(default_factory=dict)
    """Version of a copy → index of its source."""
    published: dict[str, float] = field(default_factory=dict)
    """Version of a copy → when it was complete."""
    memory: list[tuple[float, float]] = field(default_factory=list)
    """(time, resident megabytes), once per second."""

    def publish(self, sources: Sequence[Path]) -> None:
        """Let a copy of the next source appear. The copy before the last is removed."""
        number = len(self.sources)
        partial, folder = self.exports.with_name("partial") / f"copy-{number}", self.exports / f"copy-{number}"
        shutil.copytree(sources[number % len(sources)], partial)
        version = version_of(partial)
        os.utime(partial / "manifest.json")
        self.sources[version], self.published[version] = number % len(sources), time.monotonic()
        partial.rename(folder)
        shutil.rmtree(self.exports / f"copy-{number - 2}", ignore_errors=True)

    def cpu_s(self) -> float:
        """Processor seconds so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def sample(self) -> None:
        """Note the memory."""
        self.memory.append((time.monotonic(), psutil.Process(self.process.pid).memory_info().rss / 2**20))

    def page(self, path: str) -> str:
        """What GET gives."""
        with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return str(answer.read().decode())


@contextmanager
def serving(sources: Sequence[Path], scratch: Path, cache_mb: int, every_s: float) -> Iterator[Server]:
    """A server with the first of the sources, and another one every ``every_s`` seconds."""
    exports, log = scratch / "exports", scratch / "log.txt"
    exports.mkdir()
    shutil.copytree(sources[0], exports / "copy-0")
    process, port = start_server(exports, log, "--cache_mb", str(cache_mb), "--poll_s", "0.5")
    server = Server(process, port, log, exports, {version_of(exports / "copy-0"): 0})
    ended = threading.Event()

    def publish_now_and_then() -> None:
        while not ended.wait(every_s):
            server.publish(sources)

    def sample_memory() -> None:
        while not ended.wait(_SAMPLE_S):
            server.sample()

    threads = [threading.Thread(target=each) for each in (publish_now_and_then, sample_memory)]
    for thread in threads:
        thread.start()
    try:
        yield server
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def send(server: Server, clients: int, bodies: Path, count: int) -> dict[str, Any]:
    """What serve_clients.py writes."""
    answers = bodies.with_name("answers.pickle")
    script = Path(__file__).with_name("serve_clients.py")
    command = [sys.executable, str(script), str(server.port), str(clients), str(count), str(bodies), str(answers)]
    subprocess.run(command, check=True)
    found: dict[str, Any] = pickle.loads(answers.read_bytes())
    return found


def measure(server: Server, cache_mb: int, clients: int, bodies: Path, count: int, right: list[list[Right]]) -> Row:
    """One row of the table."""
    send(server, clients, bodies, 2 * clients)  # opens what is opened once
    server.sample()
    cpu_s, begun = server.cpu_s(), time.monotonic()
    found = send(server, clients, bodies, count)
    server.sample()
    cpu_s = server.cpu_s() - cpu_s
    answers = found["answers"]
    seconds = max(each[3] for each in answers) - min(each[2] for each in answers)
    memory = [used for at, used in server.memory if at >= begun]
    right_by_model = {version: right[source] for version, source in server.sources.items()}
    return {
        "cache_mb": cache_mb,
        "clients": clients,
        "requests": count,
        "requests_per_s": round(len(answers) / seconds, 1),
        **times_ms([each[3] - each[2] for each in answers]),
        "while_loading": times_ms([each[3] - each[2] for each in while_loading(answers, server.published)]),
        **outcomes(answers, count, right_by_model),
        "memory_mb": first_last_largest(memory),
        "server_cpu": round(cpu_s / seconds, 2),
        "clients_cpu": round(found["cpu_s"] / seconds, 2),
        "load_average": round(os.getloadavg()[0], 1),
    }


def times_ms(seconds: Sequence[float]) -> Row:
    """Number, median, 99th percentile and maximum, in milliseconds."""
    if not seconds:
        return {"answers": 0}
    times = sorted(1000 * each for each in seconds)
    found = {"p50_ms": statistics.median(times), "p99_ms": times[int(0.99 * (len(times) - 1))], "max_ms": times[-1]}
    return {"answers": len(times), **{name: round(value, 1) for name, value in found.items()}}


def while_loading(answers: Sequence[Any], published: dict[str, float]) -> list[Any]:
    """The answers that were waited for between the moment when an export was complete and its first answer."""
    first: dict[str, float] = {}
    for _, status, _, answered, content in answers:
        if status == 200:
            version = _model_of(content)
            first[version] = min(answered, first.get(version, answered))
    spans = [(published[version], end) for version, end in first.items() if version in published]
    return [each for each in answers if any(each[2] < end and each[3] > start for start, end in spans)]


def _model_of(content: bytes) -> str:
    version: str = json.loads(content)["model"]
    return version


def outcomes(answers: Sequence[Any], count: int, right: dict[str, list[Right]]) -> Row:
    """How many answers there are of each kind. ``right``: version of a model → what it answers to each request."""
    good = [(number, content) for number, status, _, _, content in answers if status == 200]
    models = [_model_of(content) for _, content in good]
    statuses = [each[1] for each in answers]
    return {
        "refused": statuses.count(429),
        "failed": sum(status not in (0, 200, 429) for status in statuses),
        "lost": statuses.count(0) + count - len(answers),
        "wrong": sum(
            not is_right(content, right[model][number]) for model, (number, content) in zip(models, good, strict=True)
        ),
        "models_that_answered": len(set(models)),
    }


def first_last_largest(memory: Sequence[float]) -> list[int]:
    """Three of the samples, rounded."""
    return [round(each) for each in (memory[0], memory[-1], max(memory))]


def measure_all(options: argparse.Namespace, sources: Sequence[Path]) -> dict[str, Any]:
    """The report."""
    requests = requests_of(options.data, options.different)
    _say(f"computing the right answers to {len(requests):,} requests of {len(sources)} models")
    right = [right_answers(folder, requests) for folder in sources]
    rows: list[Row] = []
    servers: list[Row] = []
    for cache_mb in sorted({cache_mb for cache_mb, _ in SHARES}):
        with tempfile.TemporaryDirectory() as scratch:
            bodies = Path(scratch) / "bodies.pickle"
            bodies.write_bytes(pickle.dumps([json.dumps(each).encode() for each in requests]))
            with serving(sources, Path(scratch), cache_mb, options.swap_every_s) as server:
                for (cache, clients), share in SHARES.items():
                    if cache == cache_mb:
                        count = max(clients, options.requests * share // 100)
                        rows.append(measure(server, cache_mb, clients, bodies, count, right))
                        _say(json.dumps(rows[-1]))
                servers.append(_of_server(server, cache_mb))
    lengths = [len(each["items"]) for each in requests]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "different_requests": len(requests),
        "mean_events": round(statistics.mean(lengths), 1),
        "swap_every_s": options.swap_every_s,
        **{name: sum(row[name] for row in rows) for name in ("requests", "refused", "failed", "lost", "wrong")},
        "servers": servers,
        "rows": rows,
    }


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, as docs/benchmarks/serve has them."""
    titles = ["clients", "cache", "requests", "per s", "p50, ms", "p99, ms", "p99 while loading, ms", "models"]
    lines = [[*titles, "memory: first, last, largest, MB", "CPUs: server, clients"]]
    for row in rows:
        cache = f"{row['cache_mb']} MB" if row["cache_mb"] else "none"
        loading = row["while_loading"].get("p99_ms", "–")
        numbers = (row[name] for name in ("requests", "requests_per_s", "p50_ms", "p99_ms"))
        cells = [row["clients"], cache, *numbers, loading, row["models_that_answered"]]
        memory = ", ".join(map(str, row["memory_mb"]))
        lines.append([*map(_cell, cells), memory, f"{row['server_cpu']}, {row['clients_cpu']}"])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)


def _of_server(server: Server, cache_mb: int) -> Row:
    """What one server did in all its rows."""
    metrics = dict(re.findall(r"^(\w+) (\S+)$", server.page("/metrics"), re.MULTILINE))
    loads = [float(each) for each in re.findall(r" load=([\d.]+)s", server.log.read_text())]
    memory = [used for _, used in server.memory]
    return {
        "cache_mb": cache_mb,
        "seconds": round(server.memory[-1][0] - server.memory[0][0]),
        "memory_mb": first_last_largest(memory),
        "memory_mb_each_minute": [round(each) for each in memory[::60]],
        "swaps": int(float(metrics["hstu_model_swaps_total"])),
        "refused_exports": len(json.loads(server.page("/health"))["refused"]),
        "first_load_s": loads[0],
        "later_loads_s": loads[1:],
    }


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def main() -> None:
    """Command line."""
    parser = command_line(__doc__, output=True)
    parser.add_argument("--exports", type=Path, nargs=2, required=True, help="two exports with a program")
    parser.add_argument("--data", type=Path, required=True, help="their preprocessed data")
    parser.add_argument("--requests", type=int, default=100_000, help="of all rows together (%(default)s)")
    parser.add_argument("--different", type=int, default=2_000, help="so many of them are different (%(default)s)")
    parser.add_argument("--swap_every_s", type=float, default=60.0, help="seconds between two exports (%(default)s)")
    options = parser.parse_args()
    folders = [serving_folder(path) for path in options.exports]
    for path, folder in zip(options.exports, folders, strict=True):
        if folder is None:
            parser.error(f"--exports: {path} has no program; write it with scripts/export.py --program")
    report = measure_all(options, [folder for folder in folders if folder is not None])
    _say("\n" + table(report["rows"]))
    publish(report, options.output)


if __name__ == "__main__":
    main()
