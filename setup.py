"""Package metadata, and the one place where the versions of the packages it needs are pinned.

``pip install -e .`` installs all but TorchRec and FBGEMM, which come in a CPU and a CUDA build:

- CUDA: ``pip install -e ".[cuda]"``.
- CPU: ``pip install -e ".[cpu]"`` and then TorchRec of the version below with ``--no-deps``: TorchRec's metadata
  asks for the CUDA build of FBGEMM, so that pip cannot resolve it beside the CPU build.

``scripts/install.sh`` does whichever fits the machine.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "hstu" / "__init__.py").read_text(encoding="utf-8"))
README = ROOT / "README.md"

# torch, torchrec and fbgemm are released together: 2.13 with 1.8.0. Change them together.
TORCH = "torch==2.13.0"
TORCHREC = "torchrec==1.8.0"
FBGEMM_CPU = "fbgemm-gpu-cpu==1.8.0"
FBGEMM_CUDA = "fbgemm-gpu==1.8.0"
# A CUDA build of torch brings its own; a CPU build none, but there kernels are still interpreted and compiled ahead.
TRITON_CPU = "triton==3.9.0"
# Compiles the CUTLASS kernels, on a machine without a GPU, too.
CUTLASS_DSL = "nvidia-cutlass-dsl==4.8.1"
# For TrainerArgs.wandb_project.
WANDB = "wandb==0.31.0"

REQUIRED = [
    TORCH,
    "megatron-core==0.16.1",
    "gin-config==0.5.0",
    "numpy==2.4.6",
    "pandas==3.1.1",
    "duckdb==2.0.0",
    "pyarrow==26.0.1",
    "matplotlib==3.11.2",
    "tensorboard==2.21.0",
    # What TorchRec imports, named here because on CPU it is installed without its dependencies.
    "tensordict==0.15.3",
    "torchmetrics==1.0.3",
    "tqdm==4.70.1",
    "pyre-extensions==0.0.32",
    "psutil==7.2.2",
    "iopath==0.1.10",
]
DEVELOPMENT = [
    CUTLASS_DSL,
    "pytest==9.2.0",
    "pytest-timeout==2.4.0",
    "pytest-xdist==3.8.0",
    "hypothesis==6.170.15",
    "safetensors==0.8.0",  # to check the exports, which are written without it
    "scikit-learn==1.9.1",
    "ruff==0.17.6",
    "mypy==2.4.1",
    "pandas-stubs==3.1.0.261029",
    "types-tqdm==4.70.0.20261106",
    "types-psutil==7.2.2.20261111",
]

setup(
    name="hstu",
    version=VERSION.group(1) if VERSION else "0",
    description="Gin-configured distributed training of HSTU models for generative recommendation",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["hstu", "hstu.*"]),
    package_data={"hstu.ops.cpu": ["csrc/*"]},  # compiled on first use, for the processor that they run on
    install_requires=REQUIRED,
    extras_require={
        "cpu": [FBGEMM_CPU, TRITON_CPU],
        "cuda": [TORCHREC, FBGEMM_CUDA, CUTLASS_DSL],
        "wandb": [WANDB],
        "dev": DEVELOPMENT,
    },
)
