"""The compiled slots are compared with PyTorch's once a machine, before they are used: compilers have defects, too."""

from __future__ import annotations

import torch

from hstu.ops.cpu.build import KernelsUnavailable, library_file
from hstu.ops.self_check import remember
from hstu.parallel.dynamic.cpu_slots import CpuSlots
from hstu.parallel.dynamic.slots import Policy
from hstu.parallel.dynamic.torch_slots import TorchSlots

_CAPACITY, _BATCHES, _IDS = 300, 30, 200


def check_slots() -> None:
    """Compare both policies under pressure, if that was not done on this machine; some hundredths of a second.

    Raises KernelsUnavailable where there is no compiler, or where an id has another slot.
    """
    passed = library_file().with_suffix(".slots_checked")
    if passed.exists():
        return
    policies: tuple[Policy, ...] = ("lru", "lfu")
    for policy in policies:
        for threshold in (0, 2):
            _compare(policy, threshold)
    remember(passed)


def _compare(policy: Policy, threshold: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tables = CpuSlots(_CAPACITY, policy, threshold), TorchSlots(_CAPACITY, policy, threshold)
    for step in range(1, _BATCHES + 1):
        ids = torch.randn(_IDS, generator=generator).mul(_CAPACITY).long()
        compiled, expected = (table.assign(ids, step) for table in tables)
        same = all(
            torch.equal(getattr(compiled, name), getattr(expected, name))
            for name in ("slots", "new_slots", "new_ids", "evicted_ids")
        )
        if not same or compiled.counters != expected.counters:
            raise KernelsUnavailable(
                f"the C++ slots of dynamic tables ({policy}) differ from PyTorch's; please report that, with the "
                "output of `c++ --version`"
            )
