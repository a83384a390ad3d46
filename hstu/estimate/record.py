"""Records operators, memory and collectives of a training step, with real tensors or torch's FakeTensorMode."""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from hstu.ops.costs import Cost

ATTENTION, PRODUCTS, OTHERS = "attention", "matrix products", "other operators"
GRADIENTS = "gradients"
_COLLECTIVES = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
}
_ONLY_ALLOCATE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "lift_fresh"}


@dataclass(frozen=True)
class Operator:
    """One call of an operator."""

    name: str
    cost: Cost
    phase: str
    needs: tuple[int, ...] = ()
    """Indices of the events whose results it reads; all are exchanges."""


@dataclass(frozen=True)
class Exchange:
    """One call of a collective. The recorder does not execute it."""

    group: str
    """Field of Mesh that has the group."""
    ranks: int
    kind: str
    payload: int
    """Bytes of this rank's input; of an uneven all-to-all, of an even one in which others get or send as much."""


@dataclass
class Recording:
    """The events of a step in order, and its memory."""

    events: list[Operator | Exchange] = field(default_factory=list)
    peak: dict[str, int] = field(default_factory=dict)
    """Kind of memory → bytes allocated by the step at its peak."""
    peak_without_gradients: dict[str, int] = field(default_factory=dict)
    """The same without the gradients of weights, which DDP and FSDP keep in their own buffers."""


class Recorder(TorchDispatchMode):
    """Records all operators inside the context. The ``group_desc`` of a process group is its field of Mesh."""

    def __init__(self) -> None:
        super().__init__()
        self.recording = Recording()
        self.phase = ""
        self._live: dict[str, int] = {}
        self._owners: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._exchanged: dict[int, int] = {}

    def begin(self, phase: str) -> None:
        """Set the kind of the memory that operators allocate."""
        self.phase = phase

    def report(self, name: str, cost: Cost, *inputs: Tensor) -> None:
        """Record an operator that reads ``inputs``."""
        needs = {self._exchanged.pop(id(each.untyped_storage()), -1) for each in inputs} - {-1}
        self.recording.events.append(Operator(name, cost, self.phase, tuple(sorted(needs))))

    def own(self, tensor: Tensor, kind: str) -> None:
        """Change the kind of the memory of ``tensor``."""
        key = id(tensor.untyped_storage())
        if key in self._owners:
            reference, before, size = self._owners[key]
            self._add(before, -size)
            self._owners[key] = reference, kind, size
            self._add(kind, size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._exchange(func, args)
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        results = [each for each in tree_iter(out) if isinstance(each, Tensor)]
        inputs = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)]
        existing = {id(each.untyped_storage()) for each in inputs}
        for tensor in results:
            if id(tensor.untyped_storage()) not in existing:
                self._allocate(tensor)
        if not func.is_view and name not in _ONLY_ALLOCATE and func.namespace in ("aten", "fbgemm"):
            count = flop_registry.get(func.overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            moved = float(sum(tensor.nbytes for tensor in (*inputs, *(results or inputs))))
            self.report(PRODUCTS if flops else OTHERS, Cost(float(flops), moved), *inputs)
        return out

    def _exchange(self, func: Any, args: Any) -> Any:
        """Record a collective without running it."""
        name = func._schema.name.partition("::")[2]
        group = next(each for each in args if isinstance(each, torch.ScriptObject) and "ProcessGroup" in str(each))
        work = FakeWork().boxed()
        written, read = args[0], args[1] if name != "allreduce_" else args[0]
        if name in _COLLECTIVES:
            payload = sum(each.nbytes for each in tree_iter(read) if isinstance(each, Tensor))
            members = ProcessGroup.unbox(group)
            if name == "alltoall_base_" and args[4]:
                row = read[:1].nbytes or written[:1].nbytes
                moved = max(sum(rows) - rows[members.rank()] for rows in (args[3], args[4]))
                payload = row * moved * members.size() // (members.size() - 1)
            self.recording.events.append(Exchange(members.group_desc, members.size(), _COLLECTIVES[name], payload))
            for tensor in tree_iter(written):
                self._exchanged[id(tensor.untyped_storage())] = len(self.recording.events) - 1
        return work if len(func._schema.returns) == 1 else (written, work)

    def _allocate(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._owners or not storage.nbytes():
            return
        kind, size = self.phase, storage.nbytes()

        def free(_: Any, key: int = key) -> None:
            _, kind, size = self._owners.pop(key)
            self._exchanged.pop(key, None)
            self._live[kind] -= size

        self._owners[key] = weakref.ref(storage, free), kind, size
        self._add(kind, size)

    def _add(self, kind: str, size: int) -> None:
        live = self._live
        live[kind] = live.get(kind, 0) + size
        found, gradients = self.recording, live.get(GRADIENTS, 0)
        total = sum(live.values())
        if total > sum(found.peak.values()):
            found.peak = dict(live)
        if total - gradients > sum(found.peak_without_gradients.values()):
            found.peak_without_gradients = {name: size for name, size in live.items() if name != GRADIENTS}
