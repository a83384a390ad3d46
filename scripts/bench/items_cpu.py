"""Time a training step against the number of items, for both kinds of tables; prints one JSON object.

    python scripts/bench/items_cpu.py [--output docs/benchmarks/items_cpu/items.json]

Each case is a process of its own on one thread. Times are processor time, which other processes affect less than the
clock, of steps on batches that are made before. Rounds run all cases in turn.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from harness import Row, command_line, publish
from training import prepare

from hstu.data.batches.batch import NEGATIVES
from hstu.observe.logging import quiet_libraries
from hstu.parallel import mesh as meshes

GIN_FILE = Path(__file__).with_name("items.gin")
STEPS, WARM_UP, BATCHES = 8, 3, 4


@dataclass(frozen=True)
class Case:
    """One size and kind of the table."""

    items: int
    negatives: int
    """Per position."""
    table: str
    """EmbeddingArgs.sharding_type."""


CASES = [
    Case(items, negatives, table)
    for negatives in (4, 128)
    for items in (3_900, 100_000, 1_000_000)
    for table in ("data_parallel", "model_parallel")
]


def measure(case: Case) -> Row:
    """Milliseconds of processor time per step of one case, in this process."""
    quiet_libraries()
    mesh = meshes.start()
    torch.set_num_threads(1)
    bindings = [
        f"item/EmbeddingArgs.item_vocab_size_or_capacity = {case.items}",
        f"item/EmbeddingArgs.sharding_type = {case.table!r}",
        f"RetrievalArgs.num_negatives = {case.negatives}",
    ]
    run = prepare(str(GIN_FILE), bindings, "retrieval", mesh)
    batches = list(islice(run.batches(), BATCHES))
    times = []
    for number in range(WARM_UP + STEPS):
        begun = time.process_time()
        run.pipeline.progress(iter([batches[number % BATCHES]]))
        times.append((time.process_time() - begun) * 1e3)
    rows = [batch.features.values() for batch in batches]
    return {
        "ms": times[WARM_UP:],
        "rows": int(statistics.mean(len(ids.unique()) for ids in rows)),
        "negatives": int(statistics.mean(len(batch.features[NEGATIVES].values()) for batch in batches)),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def measure_in_process(case: Case) -> Row:
    """The same in a new process."""
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: Row = json.loads(result.stdout.splitlines()[-1])
    return row


def main() -> None:
    """Measure and print."""
    parser = command_line(__doc__, rounds=2, output=True)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(Case(**json.loads(options.case)))))
        return
    results: list[list[Row]] = [[measure_in_process(case) for case in CASES] for _ in range(options.rounds)]
    rows = []
    for case, found in zip(CASES, zip(*results, strict=True), strict=True):
        times = [ms for result in found for ms in result["ms"]]
        rows.append(
            {
                **asdict(case),
                "rows_looked_up": found[0]["rows"],
                "ms_median": round(statistics.median(times), 1),
                "ms_fastest": round(min(times), 1),
                "peak_mb": max(result["peak_mb"] for result in found),
            }
        )
    publish({"torch": torch.__version__, "steps": STEPS * options.rounds, "cases": rows}, options.output)


if __name__ == "__main__":
    main()
