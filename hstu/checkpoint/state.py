"""What a checkpoint holds, under names that depend on neither the number of ranks nor wrapping nor cutting."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import platform
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

import hstu
from hstu.checkpoint.row_ids import RowIds
from hstu.data.batch import NEGATIVES
from hstu.data.sampler import SamplerPosition
from hstu.model.embedding import TableSpec
from hstu.model.gr_model import GRModel
from hstu.optim.optimizers import Optimizers
from hstu.parallel.cut_tensor import CutTensor
from hstu.parallel.dense import unwrap_dense
from hstu.parallel.embedding import sharded_weights
from hstu.parallel.shards import as_whole, shard_dim
from hstu.parallel.table_training import is_of_rows

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchrec", "megatron-core", "triton", "numpy")
_REPLICATED_PREFIX = "replicated.tables."
_STEP = "step"


class Carried(Protocol):
    """What a run carries along besides the model, as JSON, equal on all ranks."""

    def state(self) -> Any:
        """All of it."""

    def load_state(self, state: Any) -> None:
        """Restore ``state``."""


@dataclass
class TrainState:
    """Everything that a resumed run needs to go on as if it had never stopped."""

    model: GRModel
    optimizers: Optimizers
    operative_gin: str = ""
    iteration: int = 0
    """Optimizer steps done."""
    position: SamplerPosition = field(default_factory=SamplerPosition)
    """Where the data goes on."""
    ids: RowIds = field(default_factory=RowIds)
    """Raw ids of the rows of the tables."""
    carried: dict[str, Carried] = field(default_factory=dict)
    """By name: the metrics so far, the loss since the last record."""

    def tensors(self) -> dict[str, Tensor | CutTensor]:
        """All live tensors, to be saved or overwritten in place, the same names and sizes on every rank.

        ``model.tables.<table>`` [rows, dim] and ``optimizer.tables.<table>.<state>`` for all static tables, however
        they are sharded or replicated (of dynamic ones see dynamic.py); ``model.task.<parameter>`` and
        ``optimizer.dense.task.<parameter>.<state>`` for the rest. Columns that only pad a sharded table are left out.
        ``ids.…``: see RowIds; these are not overwritten.
        """
        weights = {f"model.{name}": tensor for name, tensor in self._weights().items()}
        states = {f"optimizer.{name}": tensor for name, tensor in self._optimizer_states().items()}
        return weights | states | self.ids.tensors()

    def _weights(self) -> dict[str, Tensor | CutTensor]:
        parts = unwrap_dense(self.model).state_dict().items()
        dense = {_canonical(name): self._whole(name, part) for name, part in parts}
        sharded = sharded_weights(self.model)
        return dense | {f"tables.{t.name}": _pieces(sharded.get(t.name), (t.rows, t.dim)) for t in self._sharded()}

    def _optimizer_states(self) -> dict[str, Tensor | CutTensor]:
        dense, tables = self.optimizers.dense.state_tensors(), self.optimizers.tables.state_tensors()
        states: dict[str, Tensor | CutTensor] = {}
        for name, tensor in dense.items():
            parameter, _, state = name.rpartition(".")
            if not parameter.startswith(_REPLICATED_PREFIX):
                states[f"dense.{name}"] = self._whole(parameter, tensor)
            elif state != _STEP:  # of a table it is the number of steps taken, which load_progress restores
                states[f"{_canonical(parameter)}.{state}"] = tensor
        for table in self._sharded():
            for state in self.optimizers.tables.training[table.name].states:
                size = (table.rows,) if is_of_rows(state) else (table.rows, table.dim)
                states[f"tables.{table.name}.{state}"] = _pieces(tables.get(f"{table.name}.{state}"), size)
        return states

    def _sharded(self) -> list[TableSpec]:
        return [spec for spec in self.model.specs if not spec.replicated and spec.dynamic is None]

    def _whole(self, name: str, tensor: Tensor) -> Tensor | CutTensor:
        """A tensor of the dense parameter ``name``, itself or of its optimizer's state, as it is without cutting."""
        parameter, group = self.optimizers.dense.parameters.get(name), self.optimizers.tp_group
        if parameter is None or group is None or tensor.shape != parameter.shape:
            return tensor
        dim = shard_dim(parameter)
        return tensor if dim is None else as_whole(tensor, dim, group)

    def progress(self) -> dict[str, Any]:
        """What is no tensor and equal on all ranks, as JSON."""
        return {
            "iteration": self.iteration,
            "position": dataclasses.asdict(self.position),
            "optimizer": self.optimizers.counters(),
            "tables": {table.name: _lookup(table) for table in self.model.specs},
            "carried": {name: part.state() for name, part in self.carried.items()},
            "versions": versions(),
        }

    def load_progress(self, progress: dict[str, Any]) -> None:
        """Restore ``progress``."""
        self.iteration = progress["iteration"]
        self.position = SamplerPosition(**progress["position"])
        self.optimizers.load_counters(progress["optimizer"])
        for name, tensor in self.optimizers.dense.state_tensors().items():
            if name.startswith(_REPLICATED_PREFIX) and name.endswith(f".{_STEP}"):
                tensor.fill_(self.optimizers.tables.steps)
        for name, part in self.carried.items():
            if name in progress.get("carried", {}):
                part.load_state(progress["carried"][name])
        now = versions()
        others = {name: old for name, old in progress.get("versions", {}).items() if now.get(name) != old}
        if others:
            log.warning("the checkpoint was saved with other versions, results may differ in bits: %s", others)


def versions() -> dict[str, str]:
    """Of what bits depend on, where it is installed."""
    found = {"python": platform.python_version(), "hstu": hstu.__version__}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _canonical(name: str) -> str:
    """``replicated.tables.<table>.weight`` is called ``tables.<table>``, as a sharded table is."""
    if not name.startswith(_REPLICATED_PREFIX):
        return name
    return f"tables.{name.removeprefix(_REPLICATED_PREFIX).removesuffix('.weight').replace('/', '.')}"


def _lookup(table: TableSpec) -> dict[str, Any]:
    """What a tool that reads the table needs to know: sizes, and the features that are looked up in it."""
    features = [name for name in table.features if name != NEGATIVES]
    return {"rows": table.rows, "dim": table.dim, "features": features}


def _pieces(sharded: ShardedTensor | None, size: tuple[int, ...]) -> CutTensor:
    """This rank's shards, as pieces of a tensor of ``size``, which may be less wide; None: it has none."""
    pieces = []
    for shard in sharded.local_shards() if sharded is not None else []:
        offsets = shard.metadata.shard_offsets
        pieces.append((offsets, shard.tensor[..., : size[-1] - offsets[-1]]))
    return CutTensor(size, pieces)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """States of this rank's generators (dropout). Data order and negatives are counter-based and need none."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restore ``random_state``."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
