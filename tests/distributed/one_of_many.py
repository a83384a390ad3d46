"""Runs one rank of a large world alone, over process groups in which every other rank sends what this rank sends.

    python -m tests.distributed.one_of_many --world-size 4096 --task retrieval

Start, building, ten steps, an evaluation and a checkpoint are those of a real run; only the other processes are
missing. What the groups take to invent what others send is not counted: CPU seconds are those of the rank's own work.
Number, bytes and group of collectives are exact. What is received has the right size but not the values of other
ranks, so losses and metrics mean nothing here. What rank 0 sends to all is given to the ranks that run after it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._shard.sharded_tensor.api as sharded_tensors
import torch.distributed.checkpoint.default_planner as save_plans
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata

from hstu.checkpoint import directory as folder
from hstu.config.args import Task
from hstu.config.gin_io import read_and_check
from hstu.observe.logging import quiet_libraries
from hstu.parallel.mesh import start
from hstu.train.builder import build_trainer
from hstu.train.main import run_facts
from tests.config.gin_files import table, text
from tests.train.tiny import skip_measuring_the_peak

LOCAL_WORLD_SIZE = 8
STEPS = 10
NAME = "one_of_many"
_COMMON = f"""
TrainerArgs.train_batch_size = 4
TrainerArgs.eval_batch_size = 4
TrainerArgs.max_train_iters = {STEPS}
TrainerArgs.log_interval = 5
TrainerArgs.eval_at_end = False
TrainerArgs.max_eval_iters = 2
TrainerArgs.ckpt_save_interval = 1000
TrainerArgs.save_at_end = False
TrainerArgs.tensorboard = False
TrainerArgs.progress_bar = "off"
context/FeatureArgs.feature_names = ["user_id"]
context/FeatureArgs.max_sequence_length = 1
items/FeatureArgs.feature_names = ["item_id", "action"]
items/FeatureArgs.max_sequence_length = 64
BenchmarkDatasetArgs.feature_args = [@context/FeatureArgs(), @items/FeatureArgs()]
BenchmarkDatasetArgs.embedding_args = [@item/EmbeddingArgs(), @user/EmbeddingArgs(), @action/EmbeddingArgs()]
BenchmarkDatasetArgs.item_feature_name = "item_id"
BenchmarkDatasetArgs.contextual_feature_names = ["user_id"]
BenchmarkDatasetArgs.action_feature_name = "action"
BenchmarkDatasetArgs.num_generated_batches = {STEPS}
NetworkArgs.num_layers = 2
NetworkArgs.hidden_size = 32
NetworkArgs.num_attention_heads = 2
NetworkArgs.kv_channels = 16
NetworkArgs.dtype_str = "float32"
OptimizerArgs.optimizer_str = "adam"
OptimizerArgs.learning_rate = 1e-3
OptimizerArgs.sparse_optimizer_str = "rowwise_adagrad"
""" + text(
    [
        *table("item", 2**20, feature_names=["item_id"], sharding_type="model_parallel"),
        *table("user", 2**24, feature_names=["user_id"], sharding_type="model_parallel"),
        *table("action", 256, sharding_type="data_parallel"),
    ]
)
GIN: dict[Task, str] = {
    "ranking": _COMMON
    + """
RankingArgs.prediction_head_arch = [32, 8]
RankingArgs.num_tasks = 8
RankingArgs.eval_metrics = ("AUC", "GAUC")
""",
    "retrieval": _COMMON
    + """
RetrievalArgs.eval_metrics = ("HR@10", "NDCG@10")
RetrievalArgs.negatives = "in_batch"
""",
}


@dataclass
class Phase:
    """What a rank did between two points of a run."""

    cpu_s: float = 0.0
    """CPU seconds of all threads of the rank."""
    memory_bytes: int = 0
    """Growth of the process's peak memory."""
    groups: int = 0
    """Process groups of more than one rank that were created."""
    store_operations: int = 0
    pickled_bytes: int = 0
    """Bytes of pickled objects that were received."""
    collectives: dict[str, int] = field(default_factory=dict)
    received_bytes: int = 0


class Ledger:
    """The phases of the run. ``missing_s``: CPU seconds that the groups took to invent what others send."""

    def __init__(self) -> None:
        self.phases: dict[str, Phase] = {}
        self.now = Phase()
        self.missing_s = 0.0
        self.main = threading.get_ident()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begun, missing, peak = time.process_time(), self.missing_s, peak_bytes()
        self.now = self.phases.setdefault(name, Phase())
        yield
        self.now.cpu_s += time.process_time() - begun - (self.missing_s - missing)
        self.now.memory_bytes += peak_bytes() - peak
        self.now = Phase()

    @contextmanager
    def invented(self, name: str, size: int, received: int) -> Iterator[None]:
        begun = time.process_time()
        yield
        if threading.get_ident() == self.main:
            self.missing_s += time.process_time() - begun
        if size > 1:
            self.now.collectives[name] = self.now.collectives.get(name, 0) + 1
            self.now.received_bytes += received


LEDGER = Ledger()
RECORDED: list[Tensor] = []
"""What rank 0 sent to all ranks, in order."""


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


_ProcessGroup: Any = dist.ProcessGroup  # its methods have overloads that torch calls by no other form than these


class _Done(dist.Work):
    """Work that has ended."""

    def __init__(self, tensors: Any) -> None:
        super().__init__()
        self._tensors = tensors

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def result(self) -> Any:
        return self._tensors

    def get_future(self) -> Any:
        found: torch.futures.Future[Any] = torch.futures.Future()
        found.set_result(self._tensors)
        return found


class AloneGroup(_ProcessGroup):
    """A group whose other ranks send what this rank sends."""

    def __init__(self, _: dist.Store, rank: int, size: int, __: timedelta) -> None:
        super().__init__(rank, size)
        self._rank, self._size = rank, size
        LEDGER.now.groups += size > 1

    def getBackendName(self) -> str:
        return NAME

    @property
    def group_name(self) -> str:
        name: str = dist.distributed_c10d._world.pg_names[self]
        return name

    pg_name = group_name
    _device_types = (torch.device("cpu"),)

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    def _others(self, name: str, received: int) -> Any:
        return LEDGER.invented(name, self._size, received)

    def allreduce(self, tensors: Any, opts: Any = None) -> dist.Work:
        with self._others("all_reduce", sum(each.nbytes for each in tensors)):
            if opts is None or opts.reduceOp == dist.ReduceOp.SUM:
                for each in tensors:
                    each.mul_(self._size)
        return _Done(tensors)

    allreduce_coalesced = allreduce

    def barrier(self, _: Any = None) -> dist.Work:
        with self._others("barrier", 0):
            return _Done([])

    def allgather(self, outputs: Any, inputs: Any, _: Any = None) -> dist.Work:
        with self._others("all_gather", sum(each.nbytes for each in outputs[0])):
            for each in outputs[0]:
                each.copy_(inputs[0])
        return _Done(outputs)

    def _allgather_base(self, output: Tensor, own: Tensor, _: Any = None) -> dist.Work:
        with self._others("all_gather", output.nbytes):
            output.view(self._size, -1).copy_(own.reshape(1, -1).expand(self._size, -1))
        return _Done(output)

    all_gather_single = _allgather_base

    def broadcast(self, tensors: Any, opts: Any) -> dist.Work:
        is_root = self._rank == opts.rootRank
        with self._others("broadcast", 0 if is_root else sum(each.nbytes for each in tensors)):
            for each in tensors:
                self._from_root(each, is_root)
        return _Done(tensors)

    def _from_root(self, tensor: Tensor, is_root: bool) -> None:
        if self._size < dist.get_world_size():  # nobody was recorded: the root of a smaller group sends what we have
            return
        if is_root:
            RECORDED.append(tensor.detach().clone())
        else:
            sent = RECORDED.pop(0)
            assert sent.shape == tensor.shape, f"rank 0 sent {sent.shape}, this rank waits for {tensor.shape}"
            tensor.copy_(sent)

    def alltoall_base(
        self, output: Tensor, own: Tensor, output_splits: list[int], splits: list[int], _: Any = None
    ) -> dist.Work:
        with self._others("all_to_all", output.nbytes):
            parts = own.split(splits) if splits else own.chunk(self._size)
            counts = output_splits or [len(output) // self._size] * self._size
            fill(output, parts[self._rank] if parts else own, counts)
        return _Done(output)

    all_to_all_single = alltoall_base

    def alltoall(self, outputs: Any, inputs: Any, _: Any = None) -> dist.Work:
        with self._others("all_to_all", sum(each.nbytes for each in outputs)):
            for each in outputs:
                fill(each, inputs[self._rank], [len(each)])
        return _Done(outputs)

    def _reduce_scatter_base(self, output: Tensor, whole: Tensor, opts: Any = None) -> dist.Work:
        with self._others("reduce_scatter", output.nbytes):
            output.copy_(whole.reshape(self._size, -1)[self._rank].view_as(output))
            if opts is None or opts.reduceOp == dist.ReduceOp.SUM:
                output.mul_(self._size)
        return _Done(output)

    reduce_scatter_single = _reduce_scatter_base

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        with self._others("reduce_scatter", sum(each.nbytes for each in outputs)):
            for output, parts in zip(outputs, inputs, strict=True):
                output.copy_(parts[self._rank] * self._size)
        return _Done(outputs)

    def gather(self, outputs: Any, inputs: Any, opts: Any) -> dist.Work:
        is_root = self._rank == opts.rootRank
        with self._others("gather", sum(each.nbytes for each in outputs[0]) if is_root else 0):
            for each in outputs[0] if is_root else []:
                each.copy_(inputs[0])
        return _Done(outputs)

    def scatter(self, outputs: Any, inputs: Any, opts: Any) -> dist.Work:
        with self._others("scatter", outputs[0].nbytes):
            if self._rank == opts.rootRank:
                outputs[0].copy_(inputs[0][self._rank])
                RECORDED.append(torch.stack(list(inputs[0])) if self._size <= 8 else inputs[0][-1].clone())
            else:
                outputs[0].copy_(RECORDED.pop(0).view(-1, *outputs[0].shape)[-1])
        return _Done(outputs)


def fill(output: Tensor, part: Tensor, counts: Sequence[int]) -> None:
    """Write ``part``, repeated or cut, as the part of every sender."""
    if len(part) and all(count == len(part) for count in counts):
        output.view(len(counts), *part.shape).copy_(part.unsqueeze(0).expand(len(counts), *part.shape))
    elif len(part):
        output.copy_(part[torch.arange(len(output)) % len(part)])
    else:
        output.zero_()


class CountingStore(dist.HashStore):
    """A store in this process that counts what is asked of it; waiting ends at once."""

    def set(self, key: str, value: str) -> None:
        LEDGER.now.store_operations += 1
        super().set(key, value)

    def get(self, key: str) -> bytes:
        LEDGER.now.store_operations += 1
        return super().get(key)

    def add(self, key: str, amount: int) -> int:
        LEDGER.now.store_operations += 1
        return super().add(key, amount)

    def clone(self) -> dist.Store:
        return self


def row_wise_metadata(build: Any, gathered: list[Any], **options: Any) -> Any:
    """torch's metadata of a row-wise table, with the rows that each of the other ranks has."""
    own, others = gathered[0], []
    rows, columns = own.size
    block = math.ceil(rows / len(gathered))
    for rank in range(len(gathered)):
        first = min(rank * block, rows)
        shard = ShardMetadata([first, 0], [min(block, rows - first), columns], f"rank:{rank}/cpu")
        others.append(dataclasses.replace(own, shards_metadata=[shard]))
    return build(others, **options)


def stand_alone(rank: int, world_size: int) -> None:
    """Make torch's process groups those of one rank among many, and set torchrun's environment."""
    c10d: Any = dist.distributed_c10d
    public: Any = dist
    dist.Backend.register_backend(NAME, AloneGroup, devices=["cpu"])
    init, new_group, to_object = dist.init_process_group, c10d.new_group, c10d._tensor_to_object

    def init_alone(*_: Any, **__: Any) -> None:
        init(NAME, store=CountingStore(), rank=rank, world_size=world_size)

    def new_alone(ranks: Any = None, timeout: Any = None, backend: Any = None, **options: Any) -> Any:
        return new_group(ranks, timeout, NAME, **options)

    def counted(tensor: Tensor, size: int, *group: Any) -> Any:
        LEDGER.now.pickled_bytes += int(size)
        return to_object(tensor, size, *group)

    public.init_process_group = init_alone
    public.rendezvous = lambda *_, **__: iter([(CountingStore(), rank, world_size)])
    public.new_group = c10d.new_group = new_alone
    c10d._tensor_to_object = counted
    folder.becomes_visible = lambda *_: True  # rank 0 was here before, and is gone
    plans: Any = save_plans
    valid: Any = True if plans._validate_global_plan.__annotations__["return"] is bool else []  # by torch's version
    plans._validate_global_plan = lambda *_: valid  # the others' plans lack their own rows
    sharded_tensors.build_global_metadata = partial(row_wise_metadata, sharded_tensors.build_global_metadata)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank % LOCAL_WORLD_SIZE),
        "LOCAL_WORLD_SIZE": str(LOCAL_WORLD_SIZE),
    }


def run_alone(task: Task, rank: int, world_size: int, root: Path, bindings: Sequence[str]) -> dict[str, Phase]:
    """A run of one rank in ``root``, which the ranks before it have used."""
    recorded = root / "from_rank_0.pt"
    if rank:
        RECORDED.extend(torch.load(recorded))
    stand_alone(rank, world_size)
    quiet_libraries()
    skip_measuring_the_peak()
    (root / "run.gin").write_text(GIN[task])
    directory = root / f"rank{rank}"
    own = [f"TrainerArgs.output_dir = '{directory}'", f"TrainerArgs.ckpt_save_dir = '{directory}/checkpoints'"]
    config, _ = read_and_check([str(root / "run.gin")], [*bindings, *own], task, world_size)
    trainer = config.trainer
    with LEDGER.phase("start"):
        mesh = start(
            config.tensor_parallel.tensor_model_parallel_size,
            config.context_parallel.context_parallel_size,
            trainer.collective_timeout_s,
            must_agree=run_facts(config),
        )
    with LEDGER.phase("build, with the plan of the tables"):
        built = build_trainer(config, mesh)
    with LEDGER.phase(f"{STEPS} steps"):
        built._restore()
        built._train_loop()
    with LEDGER.phase("evaluation"):
        built.evaluate(built.source.eval_splits)
    if rank:  # rank 0 would have made it
        folder.begin(folder.checkpoint_path(built.checkpoints.save_dir, built.state.iteration))
    with LEDGER.phase("checkpoint"):
        built._save()
    if not rank:
        torch.save(RECORDED, recorded)
    return LEDGER.phases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=GIN, default="ranking")
    parser.add_argument("--world-size", type=int, default=4096)
    parser.add_argument("--rank", type=int, help="one rank, in this process (default: rank 0, a middle one, the last)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--gin-bindings", nargs="*", default=[])
    options = parser.parse_args()
    if options.rank is not None:
        with tempfile.TemporaryDirectory() as temporary:
            root = options.folder or Path(temporary)
            phases = run_alone(options.task, options.rank, options.world_size, root, options.gin_bindings)
        print(json.dumps({"rank": options.rank, "phases": {name: asdict(phase) for name, phase in phases.items()}}))
        return
    with tempfile.TemporaryDirectory() as temporary:
        for rank in (0, options.world_size // 2, options.world_size - 1):
            command = [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--rank", str(rank), "--folder", temporary]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
