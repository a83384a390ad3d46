"""Kill a stream of generated events at random moments.

    python scripts/bench/stream.py --folder /tmp/kills --ranks 2 --count 30

The stream, or the launcher of its training, gets SIGKILL or SIGTERM, and is started again. At the end, tables,
weights, evaluations, deltas and store are compared with those of a stream that was not killed, byte by byte. The same
command goes on after --limit_s. A record is written to --folder.
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
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from hstu.base.files import digest_of, remove
from hstu.checkpoint.find import locate
from hstu.checkpoint.tensors import open_tensors

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
BEGIN, KINDS = 1_700_000_000, ("SIGKILL", "SIGTERM", "launcher")
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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--count", type=int, default=30, help="kills (%(default)s)")
    parser.add_argument("--limit_s", type=float, default=1e9, help="end after this time, to go on later")
    options = parser.parse_args()
    kills(options.folder.absolute(), options.ranks, options.count, options.limit_s)


if __name__ == "__main__":
    main()
