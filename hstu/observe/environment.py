"""Are the packages that the trainer needs installed? Asked first, so that a missing one is one readable line."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata, util

from hstu.config.errors import UserError

# Import name → distribution, in the order in which a user would miss them.
PACKAGES = {
    "torch": "torch",
    "fbgemm_gpu": "fbgemm-gpu",
    "torchrec": "torchrec",
    "megatron": "megatron-core",
    "gin": "gin-config",
    "numpy": "numpy",
    "pandas": "pandas",
    "duckdb": "duckdb",
    "pyarrow": "pyarrow",
    "tensordict": "tensordict",
    "torchmetrics": "torchmetrics",
    "tqdm": "tqdm",
    "psutil": "psutil",
    "iopath": "iopath",
    "pyre_extensions": "pyre-extensions",
}


def missing_packages(modules: Sequence[str] = tuple(PACKAGES)) -> list[str]:
    """Those of ``modules`` that cannot be found; imports none of them, so it takes milliseconds."""
    return [module for module in modules if util.find_spec(module) is None]


def check_packages(modules: Sequence[str] = tuple(PACKAGES)) -> None:
    """Raise UserError with the command to run if any needed package is missing.

    For the entry scripts to call before anything imports torch. TorchRec and FBGEMM are the usual suspects:
    ``pip install -e .`` cannot choose between their CPU and CUDA builds.
    """
    missing = missing_packages(modules)
    if not missing:
        return
    names = ", ".join(PACKAGES.get(module, module) for module in missing)
    lines = [f"Missing packages: {names}. To install all that is needed into .venv: scripts/install.sh"]
    if set(missing) <= {"torchrec", "fbgemm_gpu"}:
        torchrec, cpu_build = _pin("torchrec"), _pin("fbgemm-gpu-cpu")
        lines.append(
            "Or, into the Python in use: with an NVIDIA GPU  pip install -e '.[cuda]'\n"
            f"on a CPU machine  pip install {cpu_build} && pip install --no-deps {torchrec}"
        )
    raise UserError("\n".join(lines))


def _pin(distribution: str) -> str:
    """``name==version`` as setup.py pins it, or the bare name where this package is used without being installed."""
    try:
        requirements = metadata.requires("hstu") or []
    except metadata.PackageNotFoundError:
        return distribution
    pins = (requirement.split(";")[0].strip() for requirement in requirements)
    return next((pin for pin in pins if pin.split("==")[0] == distribution), distribution)
