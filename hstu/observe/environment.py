"""What comes before the import of any needed package: a missing one gives one readable line, and idle threads sleep."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from importlib import util

from hstu.base.errors import UserError
from hstu.observe.releases import installed_releases, stack_of_torch

# Import name → distribution, in the order of the error message.
PACKAGES = {
    "torch": "torch",
    "fbgemm_gpu": "fbgemm-gpu",
    "torchrec": "torchrec",
    "megatron": "megatron-core",
    "gin": "gin-config",
    "numpy": "numpy",
    "pandas": "pandas",
    "pyarrow": "pyarrow",
    "tensordict": "tensordict",
    "torchmetrics": "torchmetrics",
    "tqdm": "tqdm",
    "psutil": "psutil",
    "iopath": "iopath",
    "pyre_extensions": "pyre-extensions",
}


def missing_packages(modules: Sequence[str] = tuple(PACKAGES)) -> list[str]:
    """The ``modules`` that cannot be found. Imports none of them, so it takes milliseconds."""
    return [module for module in modules if util.find_spec(module) is None]


def check_packages(modules: Sequence[str] = tuple(PACKAGES)) -> None:
    """Raise UserError with the command to run if a needed package is missing.

    Call it before anything imports torch. TorchRec and FBGEMM are missing most often, because ``pip install -e .``
    cannot choose between their CPU and CUDA builds. hstu/observe/releases.py compares releases; FBGEMM's own check is
    silenced, because FBGEMM 1.6.0 warns 50 times that it is not in its own table.
    """
    logging.getLogger().addFilter(_not_of_fbgemms_table)
    missing = missing_packages(modules)
    if not missing:
        return
    names = ", ".join(PACKAGES.get(module, module) for module in missing)
    lines = [f"Missing packages: {names}. To install all that is needed into .venv: scripts/install.sh"]
    if set(missing) <= {"torchrec", "fbgemm_gpu"}:
        stack = stack_of_torch(installed_releases().get("torch", ""))
        torchrec, fbgemm = f"torchrec=={stack['torchrec']}.*", f"=={stack['fbgemm-gpu']}.*"
        lines.append(
            "Or, into the Python in use: with an NVIDIA GPU  "
            f"pip install -e '.[cuda]' '{torchrec}' 'fbgemm-gpu{fbgemm}'\n"
            f"on a CPU machine  pip install 'fbgemm-gpu-cpu{fbgemm}' && pip install --no-deps '{torchrec}'"
        )
    raise UserError("\n".join(lines))


def _not_of_fbgemms_table(record: logging.LogRecord) -> bool:
    return "_fbgemm_torch_compat_table" not in str(record.msg)


def let_idle_threads_sleep() -> None:
    """Threads that wait for another one sleep instead of spinning, unless the user has said how OpenMP shall wait.

    Call it before anything imports torch: OpenMP reads its environment once. A thread that spins takes the core from
    the thread that it waits for, if other work runs on the machine (docs/benchmarks/items_cpu/README.md).
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
