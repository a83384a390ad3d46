"""Content of a checkpoint, under names that are independent of the number of ranks, wrappers and sharding."""

import contextlib
import dataclasses
import logging
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

import hstu
from hstu.checkpoint.phase import Phase
from hstu.checkpoint.raw_ids import RawIds
from hstu.data.batches.batch import is_of_negatives
from hstu.data.sampling.sampler import SamplerPosition
from hstu.model.embedding import TableSpec
from hstu.model.gr_model import GRModel
from hstu.optim.optimizers import Optimizers
from hstu.parallel.data_parallel import unwrap_dense
from hstu.parallel.shards import ShardedView, global_view, shard_dim, view_of
from hstu.parallel.table_kernels import Piece, pieces_of
from hstu.parallel.table_optimizer import state_shape
from hstu.parallel.tables import sharded_weights

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchrec", "megatron-core", "triton", "numpy")
_REPLICATED_PREFIX = "replicated.tables."


@dataclass
class TrainState:
    """Everything that a resumed run needs to continue as if it had never stopped."""

    model: GRModel
    optimizers: Optimizers
    operative_gin: str = ""
    run: str = ""
    """Content of run.json, which identifies the run. Empty: checkpoints get no such file."""
    iteration: int = 0
    """Number of finished optimizer steps."""
    position: SamplerPosition = field(default_factory=SamplerPosition)
    phase: Phase = field(default_factory=Phase)
    raw_ids: RawIds = field(default_factory=RawIds)
    features: dict[str, Any] = field(default_factory=dict)
    """JSON: features that the model reads, with numbers of ids, for use without the data."""
    trained_on: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, Stateful] = field(default_factory=dict)
    """Name → further state of a run: JSON, equal on all ranks."""
    carried_in_phase: dict[str, Stateful] = field(default_factory=dict)
    """The same, for what starts anew with each phase, such as metrics."""

    def tensors(self) -> dict[str, Tensor | ShardedView]:
        """Return all live tensors, to be saved or overwritten in place. Names and sizes are equal on all ranks.

        ``model.tables.<table>`` [rows, dim] and ``optimizer.tables.<table>.<state>`` are static tables, sharded or
        replicated, without padding columns. For dynamic tables see dynamic.py. ``model.task.<parameter>`` and
        ``optimizer.dense.task.<parameter>.<state>`` are the rest. ``ids.…`` (see RawIds) are saved, but not loaded.
        """
        weights = {f"model.{name}": tensor for name, tensor in self._weights().items()}
        states = {f"optimizer.{name}": tensor for name, tensor in self._optimizer_states().items()}
        return weights | states | self.raw_ids.tensors()

    def _weights(self) -> dict[str, Tensor | ShardedView]:
        parameters = unwrap_dense(self.model).state_dict().items()
        local = {name: view_of(tensor) if isinstance(tensor, DTensor) else tensor for name, tensor in parameters}
        dense = {_canonical(name): self._whole(name, tensor) for name, tensor in local.items()}
        held = {name: pieces_of(weight) for name, weight in sharded_weights(self.model).items()}
        return dense | {f"tables.{t.name}": _view(held.get(t.name, []), (t.rows, t.dim)) for t in self._sharded()}

    def _optimizer_states(self) -> dict[str, Tensor | ShardedView]:
        dense, tables = self.optimizers.dense.state_tensors(), self.optimizers.tables.state_tensors()
        states: dict[str, Tensor | ShardedView] = {}
        for name, tensor in dense.items():
            parameter, _, state = name.rpartition(".")
            if not parameter.startswith(_REPLICATED_PREFIX):
                states[f"dense.{name}"] = self._whole(parameter, tensor)
            else:
                states[f"{_canonical(parameter)}.{state}"] = tensor
        states |= {f"tables.{name}": each for name, each in self.optimizers.tables.replicated_state_tensors().items()}
        for table in self._sharded():
            for state in self.optimizers.tables.training[table.name].states:
                held = tables.get(f"{table.name}.{state}", [])
                states[f"tables.{table.name}.{state}"] = _view(held, state_shape(table, state))
        return states

    def _sharded(self) -> list[TableSpec]:
        return [spec for spec in self.model.specs if not spec.replicated and spec.dynamic is None]

    def _whole(self, name: str, tensor: Tensor | ShardedView) -> Tensor | ShardedView:
        """Return a dense parameter or its state with the size that it has without tensor parallelism."""
        parameter, group = self.optimizers.dense.parameters.get(name), self.optimizers.tp_group
        if parameter is None or group is None or tensor.size() != parameter.size():
            return tensor
        dim = shard_dim(parameter)
        return tensor if dim is None else global_view(tensor, dim, group)

    def metadata(self) -> dict[str, Any]:
        """Return progress.json: everything except tensors that is equal on all ranks."""
        return {
            "iteration": self.iteration,
            "position": dataclasses.asdict(self.position),
            "phase": dataclasses.asdict(self.phase),
            "optimizer": self.optimizers.counters(),
            "tables": {
                table.name: {
                    "rows": table.rows,
                    "dim": table.dim,
                    "features": [name for name in table.features if not is_of_negatives(name)],
                }
                for table in self.model.specs
            },
            "features": self.features,
            "trained_on": self.trained_on,
            "carried": {name: part.state_dict() for name, part in (self.carried | self.carried_in_phase).items()},
            "versions": versions(),
        }

    def load_metadata(self, stored: dict[str, Any]) -> None:
        """Restore ``metadata()`` and begin ``self.phase``, if that is a later one. Warns of other package versions."""
        begins = self.phase != Phase.of(stored)
        self.iteration = stored["iteration"]
        self.position = self.phase.start if begins else SamplerPosition(**stored["position"])
        self.optimizers.load_counters(stored["optimizer"])
        for name, part in (self.carried | ({} if begins else self.carried_in_phase)).items():
            if name in stored.get("carried", {}):
                part.load_state_dict(stored["carried"][name])
        installed = versions()
        others = {name: old for name, old in stored.get("versions", {}).items() if installed.get(name) != old}
        if others:
            log.warning("the checkpoint was saved with other versions, so results may differ in bits: %s", others)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that can change results."""
    found = {"python": platform.python_version(), "hstu": hstu.__version__}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _canonical(name: str) -> str:
    """Rename a replicated table, ``replicated.tables.<table>.weight``, like a sharded one: ``tables.<table>``."""
    if not name.startswith(_REPLICATED_PREFIX):
        return name
    return f"tables.{name.removeprefix(_REPLICATED_PREFIX).removesuffix('.weight').replace('/', '.')}"


def _view(held: Iterable[Piece], size: tuple[int, ...]) -> ShardedView:
    """Return this rank's shards, if any, as a view of a tensor of ``size``, without padding columns."""
    return ShardedView(size, [(offsets, shard[..., : size[-1] - offsets[-1]]) for offsets, shard in held])


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return this rank's generator states (dropout). Data order and negatives are counter-based and need none."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restore ``random_state``."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
