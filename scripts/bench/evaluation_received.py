"""What a rank receives and keeps in an evaluation: python measure.py KIND WORLD SIZE [QUERIES], over gloo or, with
FAKE=1, on torch's fake process group as rank 0, a middle rank and the last. KIND: ranking or retrieval."""

import json
import os
import resource
import sys
import time
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

KIND, WORLD, SIZE = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
QUERIES = int(sys.argv[4]) if len(sys.argv) > 4 else 0
FAKE, E = bool(os.environ.get("FAKE")), int(os.environ.get("WIDTH", "64"))
try:
    from hstu.parallel.exchange import ALONE, Exchange
except ImportError:  # the code before
    Exchange = None
from hstu.parallel.collectives import gather_objects
from hstu.train.corpus import Corpus, Queries, target_ranks
from hstu.train.evaluate import Evaluator, Observations
from hstu.train import evaluate
from hstu.train.task_metrics import TaskMetrics

if "GATHERED" in os.environ:
    evaluate.GATHERED_ROWS = int(os.environ["GATHERED"])

RECEIVED = {}


def counting(name, function):
    def counted(output, *args, **kwargs):
        tensors = output if isinstance(output, list) else [output]
        RECEIVED[name] = RECEIVED.get(name, 0) + sum(each.nbytes for each in tensors)
        result = function(output, *args, **kwargs)
        if FAKE and name == "all_to_all_single":
            output.copy_(args[0])
        return result

    return counted


class Rows(Evaluator):
    def __init__(self, rank, group):
        if Exchange is not None:
            self.exchange = Exchange(group, rank, WORLD) if WORLD > 1 else ALONE

    def observe(self, batches):
        raise NotImplementedError

    def metrics(self, rows, exchange=None):
        given = {} if exchange is None else {"exchange": exchange}
        metrics = TaskMetrics(["AUC", "GAUC", "LOGLOSS", "NE", "ACC"], "binary", **given)
        metrics.update(rows.results, rows.labels, rows.users, rows.requests)
        return metrics.compute()


def ranking(rank, group):
    rng = np.random.default_rng(rank)
    count = SIZE // WORLD
    users = rng.integers(0, max(1, SIZE // 100), count)
    scores, labels = rng.normal(size=count).astype(np.float32), rng.integers(0, 2, count)
    rows = Observations(users, users, users, users, scores, labels)
    evaluator = Rows(rank, group)
    if Exchange is not None:
        return evaluator.metrics_of_all(rows)
    return evaluator.metrics(rows.gathered(lambda each: np.concatenate(gather_objects(each, group))))


def retrieval(rank, group):
    rng = np.random.default_rng(rank)
    count, per = QUERIES // WORLD, -(-SIZE // WORLD)
    table = torch.randn((per, E), generator=torch.Generator().manual_seed(rank))

    def embed(ids):  # as a row-wise table does
        if WORLD == 1:
            return table[ids]
        owners, order = (ids // per).sort(stable=True)
        sent = owners.bincount(minlength=WORLD)
        got = sent.clone()
        dist.all_to_all_single(got, sent, group=group)
        wanted = ids.new_empty(int(got.sum()))
        dist.all_to_all_single(wanted, ids[order], got.tolist(), sent.tolist(), group=group)
        rows = table.new_empty((len(ids), E))
        dist.all_to_all_single(rows, table[wanted % per], sent.tolist(), got.tolist(), group=group)
        return rows[order.argsort()]

    vectors = torch.nn.functional.normalize(torch.randn((count, E), generator=torch.Generator().manual_seed(rank)))
    seen = rng.integers(0, SIZE, 100 * count)
    queries = Queries(vectors, np.arange(count), rng.integers(0, SIZE, count), seen, np.full(count, 100))
    corpus = Corpus(embed, torch.arange(SIZE), 1e-6)
    given = () if Exchange is None or WORLD == 1 else (Exchange(group, rank, WORLD),)
    ranks = target_ranks(queries, corpus, *given)[0]
    return {"mean of 1 / rank": float((1 / ranks).mean())}


def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1e3


def one(rank):
    torch.set_num_threads(1)
    if FAKE:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
    else:
        store = dist.TCPStore("127.0.0.1", int(os.environ["PORT"]), WORLD, rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    names = ("all_gather_into_tensor", "all_to_all_single", "reduce_scatter_tensor", "all_reduce")
    with mock.patch.multiple(dist, **{name: counting(name, getattr(dist, name)) for name in names}):
        with mock.patch.object(distributed_c10d, "all_gather", counting("pickled", distributed_c10d.all_gather)):
            open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here on
            before, begun, cpu = peak(), time.monotonic(), time.process_time()
            found = {"ranking": ranking, "retrieval": retrieval}[KIND](rank, dist.group.WORLD)
    line = {
        "kind": KIND, "code": "before" if Exchange is None else "after", "ranks": WORLD, "size": SIZE, "queries": QUERIES,
        "rank": rank, "fake": FAKE, "received_mb": round(sum(RECEIVED.values()) / 1e6, 3), "by": RECEIVED,
        "peak_mb": round(peak() - before, 1), "s": round(time.monotonic() - begun, 2),
        "cpu_s": round(time.process_time() - cpu, 2), "found": found,
    }
    if FAKE or rank == 0:
        print(json.dumps(line), flush=True)
    if not FAKE:
        dist.barrier()
    os._exit(0)


ranks = (0, WORLD // 2, WORLD - 1) if FAKE else range(WORLD)
children = []
for rank in ranks:
    if (child := os.fork()) == 0:
        one(rank)
    children.append(child)
    if FAKE:
        os.waitpid(child, 0)
if not FAKE:
    for child in children:
        os.waitpid(child, 0)
