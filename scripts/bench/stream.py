"""Try a stream on generated events: kill it at random moments, or let a server answer while it trains on from Kafka.

    python scripts/bench/stream.py kills --folder /tmp/kills --ranks 2 --count 30
    python scripts/bench/stream.py load --folder /tmp/load --minutes 20

kills: the stream, or the launcher of its training, gets SIGKILL or SIGTERM, and is started again. At the end, tables,
weights, evaluations, deltas and store are compared with those of a stream that was not killed, byte by byte. The same
command goes on after --limit_s. load: 12 hours of events in --minutes. Each answer is compared with what the export
that it names gives, and the events of the store with those that were sent. Both write a record to --folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from hstu.base.files import digest_of, remove
from hstu.checkpoint.find import locate
from hstu.checkpoint.tensors import open_tensors
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore
from hstu.serve import runtime

ROOT = Path(__file__).resolve().parents[2]
GIN = """
TrainerArgs.train_batch_size = 16
TrainerArgs.eval_batch_size = 64
TrainerArgs.num_train_epochs = 2
TrainerArgs.ckpt_save_interval = 4
DatasetArgs.dataset_name = "films"
DatasetArgs.max_sequence_length = 32
DatasetArgs.window_stride = 16
NetworkArgs.num_layers = 2
NetworkArgs.hidden_size = 32
NetworkArgs.num_attention_heads = 2
NetworkArgs.kv_channels = 16
NetworkArgs.dtype_str = "float32"
NetworkArgs.interleave_actions = False
OptimizerArgs.optimizer_str = "adam"
OptimizerArgs.learning_rate = 3e-3
RetrievalArgs.eval_metrics = ("HR@10", "NDCG@10")
film/DynamicEmbeddingArgs.feature_names = ["film"]
film/DynamicEmbeddingArgs.table_name = "film"
film/DynamicEmbeddingArgs.item_vocab_size_or_capacity = 1024
film/DynamicEmbeddingArgs.sharding_type = "model_parallel"
"""
BEGIN, HOURS, KINDS = 1_700_000_000, 12, ("SIGKILL", "SIGTERM", "launcher")
Event = tuple[int, int, int]
"""User, film, seconds since 1970."""


def events(draw: np.random.Generator, count: int, first: float, last: float) -> list[Event]:
    """Events in the order of time. Some films are popular, and new films and users come with time."""
    times = np.sort(draw.uniform(first, last, count))
    grown = 1 + (times - BEGIN) / 86_400
    users, films = 150 * grown * draw.random(count), 250 * grown * draw.random(count) ** 2
    return [*zip(users.astype(int).tolist(), films.astype(int).tolist(), times.astype(int).tolist(), strict=True)]


def start(folder: Path, source: str, *more: object) -> subprocess.Popen[bytes]:
    """Start the stream of a folder, which writes to stream.log."""
    (folder / "films.gin").write_text(GIN, encoding="utf-8")
    words = ["scripts/stream.py", "--source", source, "--run_dir", folder / "run", "--task", "retrieval",
             "--gin-config-file", folder / "films.gin", "--dataset_name", "films", "--user", "user", "--item", "film",
             "--time", "at", "--any_times", *more]  # fmt: skip
    with (folder / "stream.log").open("ab") as log:
        return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=log, stderr=log)


def contents(run: Path) -> dict[str, str]:
    """What a stream has made → its digest; of results without what they cost, and of evaluations without the
    digest of the checkpoint, which has a random id of the run."""
    files = [*run.glob("exports/**/*"), *run.glob("store/*.npy"), *run.glob("parts/*/frozen.json")]
    found = {str(file.relative_to(run)): digest_of([file]) for file in files if file.is_file()}
    for file in [*run.glob("parts/*/result.json"), *run.glob("parts/*/evaluation.json")]:
        result = json.loads(file.read_text(encoding="utf-8"))
        found[str(file.relative_to(run))] = str(
            {k: v for k, v in result.items() if k not in ("seconds", "done", "model")}
        )
    stored = open_tensors(locate(run / "checkpoints"))
    tensors = {name: stored.read_whole(name).numpy().tobytes() for name in stored.sizes}
    return found | {f"tensor {name}": digest_of([], content.hex()) for name, content in tensors.items()}


def children_of(process: int) -> list[int]:
    """Processes that this one has started."""
    return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def step_of(stream: int) -> str:
    """The command that a stream runs; "between" if there is none."""
    with suppress(FileNotFoundError, IndexError):  # it has ended meanwhile, or there is none
        words = Path(f"/proc/{children_of(stream)[0]}/cmdline").read_bytes().decode().split("\0")
        return next((word for word in words[1:] if word.endswith(".py") or word == "hstu.entry"), "between")
    return "between"


def strike(stream: subprocess.Popen[bytes], kind: str, draw: random.Random) -> str | None:
    """Kill at a random moment. Returns the step of the stream at this moment; None if the stream has ended before."""
    moment, step = time.monotonic() + draw.uniform(0, 45), "start"
    while stream.poll() is None:
        step = step_of(stream.pid)
        if time.monotonic() >= moment and (kind != "launcher" or step == "hstu.entry"):
            if kind == "launcher":
                time.sleep(draw.uniform(0, 8))
                children = children_of(stream.pid) if stream.poll() is None else []
            for process in children[:1] if kind == "launcher" else [stream.pid]:
                os.kill(process, signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
                stream.wait()
                return Path(step).name
        time.sleep(0.02)
    return None


def kills(folder: Path, ranks: int, count: int, limit_s: float) -> None:
    """See the module. run is the stream at work, whole the one that is not killed, parts what they read."""
    end, record, whole, run = time.monotonic() + limit_s, folder / "kills.jsonl", folder / "whole", folder / "run"
    if not (folder / "parts").exists():
        (folder / "parts").mkdir(parents=True)
        draw = np.random.default_rng(0)
        for part in range(3):
            rows = events(draw, 300, BEGIN + 86_400 * part, BEGIN + 86_400 * (part + 1))
            lines = [f"{user},{film},{at}\n" for user, film, at in rows]
            (folder / f"parts/{part}.csv").write_text("".join(["user,film,at\n", *lines]), encoding="utf-8")
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    number = sum("step" in each for each in done)
    while time.monotonic() < end and not (number >= count and done and "differ" in done[-1]):
        if not whole.exists():
            remove(run)
        stream = start(folder, str(folder / "parts"), "--once", "--nproc_per_node", ranks)
        if whole.exists() and number < count:
            kind, moment = KINDS[number % 3], random.Random(f"{ranks} {number}")
            entry: dict[str, Any] = {"ranks": ranks, "kind": kind, "step": strike(stream, kind, moment)}
            number += entry["step"] is not None
        if (code := stream.wait()) == 0 and whole.exists():
            made, expected = contents(run), contents(whole)
            differ = sorted(name for name in {*made, *expected} if made.get(name) != expected.get(name))
            entry = {"ranks": ranks, "compared": len(expected), "differ": differ}
            shutil.rmtree(run)
        elif code == 0:
            run.rename(whole)
            continue
        entry["exit"] = code
        done.append(entry)
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(entry, flush=True)


class Clients:
    """Sends requests at a constant rate, whether or not answers have come, and keeps the answers."""

    def __init__(self, port: int, histories: list[list[int]]) -> None:
        self.port, self.histories, self.answers, self.lost = port, histories, list[tuple[Any, ...]](), list[str]()
        self.end = threading.Event()

    def run(self, rate: float) -> None:
        """Send until ``end`` is set."""
        begun, number = time.monotonic(), 0
        with ThreadPoolExecutor(16) as pool:
            while not self.end.wait(max(0.0, begun + number / rate - time.monotonic())):
                pool.submit(self._ask, number % len(self.histories), begun + number / rate)
                number += 1

    def _ask(self, number: int, due: float) -> None:
        body = json.dumps({"items": self.histories[number], "k": 10})
        # A new connection each: the server ends one that is silent for 30 s.
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            try:
                connection.request("POST", "/recommend", body, {"content-type": "application/json"})
                answer = connection.getresponse()
                found = json.loads(answer.read())
                if answer.status != 200:
                    raise ValueError(f"{answer.status} {found}")
                scores = [(each["item"], each["score"]) for each in found["items"]]
                self.answers.append((time.time(), time.monotonic() - due, number, found["model"], scores))
            except Exception as error:
                self.lost.append(repr(error))


def load(folder: Path, minutes: float, parts: int, events_per_s: float, rate: float, port: int) -> dict[str, Any]:
    """See the module. A part is begun every 1 / ``parts`` of the time; ``rate``: requests per second."""
    from confluent_kafka import Producer

    folder.mkdir(parents=True)
    broker = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "mock", "log_level": 0})
    hosts = ",".join(f"{each.host}:{each.port}" for each in broker.list_topics(timeout=9).brokers.values())
    draw, sent, seconds = np.random.default_rng(0), list[Event](), 60 * minutes

    def send(rows: list[Event]) -> None:
        for user, film, at in rows:
            broker.produce("events", json.dumps({"user": user, "film": film, "at": at}))
        broker.flush(30)
        sent.extend(rows)

    def results() -> list[dict[str, Any]]:
        files = sorted((folder / "run/parts").glob("*/result.json"))
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]

    send(events(draw, 3000, BEGIN - 43_200, BEGIN))
    each_s = seconds / parts
    stream = start(folder, f"kafka://{hosts}/events", "--poll_s", 1, "--every_s", each_s, "--frozen_after", 0)
    while not results():
        assert stream.poll() is None, f"see {folder / 'stream.log'}"
        time.sleep(0.5)
    with (folder / "server.log").open("wb") as log:
        words = ["scripts/serve.py", "--export", str(folder / "run/exports"), "--port", str(port), "--poll_s", "1"]
        server = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=log, stderr=log)
    while b"listening" not in (folder / "server.log").read_bytes():
        assert server.poll() is None, f"see {folder / 'server.log'}"
        time.sleep(0.5)
    clients = Clients(port, [[film for _, film, _ in sent[30 * n : 30 * n + 5 + n % 20]] for n in range(60)])
    asking, begun, begun_at = threading.Thread(target=clients.run, args=(rate,)), time.monotonic(), time.time()
    asking.start()
    memory, scale, last = list[tuple[float, float]](), 3600 * HOURS / seconds, 0.0
    while (now := time.monotonic() - begun) < seconds:
        send(events(draw, round(events_per_s * (now - last)), BEGIN + scale * last, BEGIN + scale * now))
        last = now
        pages = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1])
        memory.append((round(now, 1), pages * os.sysconf("SC_PAGE_SIZE") / 2**20))
        time.sleep(1)
    while results()[-1]["events"] < len(sent) and time.monotonic() - begun < 2 * seconds:
        time.sleep(1)
    clients.end.set()
    asking.join()
    for process in (stream, server):
        process.terminate()
        process.wait(60)
    store, parts_done = SequenceStore.open(folder / "run/store"), results()
    users = np.repeat(store.raw_ids(USER_FEATURE), np.diff(store.offsets()))
    stored = zip(users, store.raw_ids("film")[store.sequence("film")], store.sequence("at"), strict=True)
    newest = {f"{each['number']:05d}": each["newest"] for each in parts_done}
    ages, wrong, models = list[float](), 0, dict[Any, Any]()
    for at, _, number, version, scores in clients.answers:
        name = version.partition("@")[0]
        if name not in models:
            models[name] = runtime.load(folder / "run/exports" / name / "serving")
        if (name, number) not in models:
            models[name, number] = models[name].recommend(runtime.History(items=clients.histories[number]))
        expected = models[name, number]
        is_same = [item for item, _ in scores] == expected.items
        wrong += not (is_same and np.allclose([score for _, score in scores], expected.scores, atol=1e-4))
        if at - begun_at < seconds:
            ages.append((BEGIN + scale * (at - begun_at) - newest[name]) / scale / each_s)
    latencies = np.sort([latency for _, latency, *_ in clients.answers]) * 1000
    grown = [size for at, size in memory if at > each_s]
    return {
        "minutes": minutes,
        "parts": len(parts_done),
        "events": len(sent),
        "events lost or doubled": (Counter(sent) - Counter(stored)).total() + (Counter(stored) - Counter(sent)).total(),
        "answers": len(clients.answers),
        "requests lost": len(clients.lost),
        "answers wrong": wrong,
        "models that answered": len(newest.keys() & models.keys()),
        "ms, median, 99 %, most": [round(float(np.quantile(latencies, share)), 1) for share in (0.5, 0.99, 1)],
        "age of the newest event in the model, in parts: median, most": [np.median(ages), max(ages)],
        "MB of the server: after the first part, last, most": [grown[0], grown[-1], max(grown)],
        "seconds of a part": [sum(each["seconds"].values()) for each in parts_done],
        "lost": clients.lost[:10],
        "memory": memory[:: max(1, len(memory) // 60)],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=("kills", "load"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--count", type=int, default=30, help="kills (%(default)s)")
    parser.add_argument("--limit_s", type=float, default=1e9, help="end after this time, to go on later")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--parts", type=int, default=12, help="in the minutes (%(default)s)")
    parser.add_argument("--events_per_s", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=20.0, help="requests per second (%(default)s)")
    parser.add_argument("--port", type=int, default=8123)
    options = parser.parse_args()
    folder = options.folder.absolute()
    if options.trial == "kills":
        kills(folder, options.ranks, options.count, options.limit_s)
    else:
        found = load(folder, options.minutes, options.parts, options.events_per_s, options.rate, options.port)
        (folder / "load.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({name: value for name, value in found.items() if name != "memory"}, indent=1))


if __name__ == "__main__":
    main()
