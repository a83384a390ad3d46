"""Plans, before a run starts, which batches its ranks compute on and how the ranks are grouped."""

from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np

from hstu.config.args import BenchmarkDatasetArgs
from hstu.config.run_config import RunConfig
from hstu.data.batches.jagged import run_offsets
from hstu.data.sampling.sampler import Loads, SamplerPosition
from hstu.model.embedding import TableSpec, table_specs
from hstu.observe.throughput import FlopCounter
from hstu.train.batch_source import BatchSource, SampleLengths
from hstu.train.sources import open_source

MOST_STEPS = 32
MOST_GROUPS = 16
"""Number of steps and of tp_cp groups whose batches are planned. More of them hardly change the means."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The samples of one step of a tp_cp group (ranks that share samples). A rank looks up an equal part of them."""

    samples: np.ndarray
    """int64 [sequences]: rows of the sample table."""
    lengths: SampleLengths

    def parts(self, count: int) -> list[np.ndarray]:
        """``count`` contiguous parts of equal size of the samples; the last one may be smaller."""
        size = -(-len(self.samples) // count)
        return [self.samples[start : start + size] for start in range(0, count * size, size)]


@dataclass(frozen=True)
class Workload:
    """A run of ``world_size`` ranks. Ranks of a host have consecutive numbers, as torchrun assigns them."""

    config: RunConfig
    world_size: int
    ranks_per_host: int
    device_type: str
    """"cpu" or "cuda"."""
    source: BatchSource
    steps: tuple[tuple[Batch, ...], ...]
    """For each of the first steps, one batch per tp_cp group, for at most MOST_GROUPS groups."""

    @cached_property
    def specs(self) -> tuple[TableSpec, ...]:
        """All embedding tables."""
        config, source = self.config, self.source
        return table_specs(source.tables, config.network, source.roles, config.looks_up_negatives, self.world_size)

    @property
    def replicated_specs(self) -> list[TableSpec]:
        """The data_parallel tables."""
        return [spec for spec in self.specs if spec.replicated]

    @property
    def tp_size(self) -> int:
        """Ranks per tensor-parallel group."""
        return self.config.tensor_parallel.tensor_model_parallel_size

    @property
    def cp_size(self) -> int:
        """Ranks per context-parallel group."""
        return self.config.context_parallel.context_parallel_size

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks."""
        return self.world_size // self.config.ranks_per_group

    @property
    def dp_cp_size(self) -> int:
        """Ranks with equal dense weights; DDP averages gradients over them."""
        return self.world_size // self.tp_size

    @property
    def shard_group_size(self) -> int:
        """Number of ranks over which DataParallelArgs.sharding spreads the dense weights; 1 if each has all."""
        return 1 if self.config.data_parallel.sharding == "none" else self.dp_cp_size

    def ranks_on_host(self, group: str, ranks: int) -> int:
        """Number of ranks per host in a ``Transfer.group`` of ``ranks`` ranks."""
        strides = {"cp_group": self.tp_size, "dp_group": self.config.ranks_per_group, "dp_cp_group": self.tp_size}
        return min(ranks, max(1, self.ranks_per_host // strides.get(group, 1)))

    def loads(self, lengths: SampleLengths) -> Loads:
        """Tokens and reported FLOPs of each sample."""
        return FlopCounter(self.config.network, self.source.roles).per_sequence(lengths.items, lengths.candidates)

    def tokens(self, batch: Batch) -> int:
        """Tokens of a batch."""
        return int(self.loads(batch.lengths).tokens.sum())

    def flops(self, batch: Batch) -> float:
        """Reported FLOPs of training on a batch, summed over the ranks of the group."""
        return float(self.loads(batch.lengths).costs.sum())

    @property
    def note(self) -> str:
        """Source of the lengths, for the report."""
        kind = "random data" if isinstance(self.config.dataset, BenchmarkDatasetArgs) else "the preprocessed data"
        return f"lengths: the first {len(self.steps)} steps of this run, planned on {kind}"

    @property
    def batches(self) -> list[Batch]:
        """All planned batches."""
        return [batch for step in self.steps for batch in step]

    @cached_property
    def typical(self) -> Batch:
        """The planned batch whose cost is nearest to the mean."""
        costs = np.array([self.flops(batch) for batch in self.batches])
        return self.batches[int(np.abs(costs - costs.mean()).argmin())]

    @cached_property
    def largest(self) -> Batch:
        """The planned batch with the most tokens."""
        return max(self.batches, key=self.tokens)

    @cached_property
    def straggling(self) -> float:
        """FLOPs of the busiest data-parallel rank divided by the mean rank, both averaged over the steps."""
        costs = [[self.flops(batch) for batch in step] for step in self.steps]
        return float(np.mean([max(step) for step in costs]) / np.mean([np.mean(step) for step in costs]))


def plan_workload(
    config: RunConfig, world_size: int, ranks_per_host: int, device_type: str, source: BatchSource | None = None
) -> Workload:
    """Plans the first steps of ``config``. Reads lengths but no samples, and starts no processes.
    ``source`` is the open source of the run, if there is one. Raises ConfigError and DataError as a run would."""
    source, size = source or open_source(config, world_size=world_size), config.ranks_per_group
    num_steps, num_groups = min(source.batches_per_epoch, MOST_STEPS), world_size // size
    chosen = np.unique(np.linspace(0, num_groups - 1, MOST_GROUPS).astype(int)).tolist()
    steps = []
    for samples, ranks in islice(source.train_sampler(SamplerPosition()).global_batches(), num_steps):
        groups = ranks // size
        in_order = samples[np.argsort(groups, kind="stable")]
        bounds = run_offsets(np.bincount(groups, minlength=num_groups))
        of_groups = [in_order[bounds[group] : bounds[group + 1]] for group in chosen]
        lengths = [SampleLengths(*(values[rows] for values in source.train_lengths)) for rows in of_groups]
        steps.append(tuple(map(Batch, of_groups, lengths)))
    return Workload(config, world_size, ranks_per_host, device_type, source, tuple(steps))
