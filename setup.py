"""Package metadata, and the versions of all dependencies that work.

The tests run with the newest versions that were there at the last ``scripts/lock.sh`` (requirements/cpu.txt, what
``scripts/install.sh`` installs) and with the oldest (requirements/oldest.txt, ``scripts/install.sh oldest``).

``pip install .`` installs everything except TorchRec and FBGEMM, which come in a CPU and a CUDA build:

- CUDA: ``pip install ".[cuda]"``. Beside an older torch, name what belongs to it: ``"torchrec==1.6.*"
  "fbgemm-gpu==1.6.*"`` for torch 2.11.
- CPU: ``pip install ".[cpu]"``, then TorchRec of the same release as FBGEMM with ``--no-deps``. TorchRec's metadata
  requires the CUDA build of FBGEMM, so pip cannot resolve it beside the CPU build.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "hstu" / "__init__.py").read_text(encoding="utf-8"))
README = ROOT / "README.md"

# torch, torchrec and fbgemm are released together. hstu/observe/releases.py has which belong to which.
TORCH = "torch>=2.11,<2.14"
TORCHREC = "torchrec>=1.6,<1.9"
FBGEMM_CPU = "fbgemm-gpu-cpu>=1.6,<1.9"
FBGEMM_CUDA = "fbgemm-gpu>=1.6,<1.9"
# CUDA builds of torch depend on Triton, CPU builds do not. The tests interpret and compile the kernels without a GPU.
TRITON_CPU = "triton>=3.6,<3.10"
# Compiles the CUTLASS kernels. Works without a GPU. Its interfaces change from release to release.
CUTLASS_DSL = "nvidia-cutlass-dsl>=4.8,<4.9"
# The CUDA build of torch is for CUDA 13. Without the extra, only the libraries for CUDA 12 come with the DSL.
CUTLASS_DSL_CUDA = "nvidia-cutlass-dsl[cu13]>=4.8,<4.9"
# Needed only for TrainerArgs.wandb_project.
WANDB = "wandb>=0.19,<1"
# Needed only for scripts/factorize.py and scripts/quality.
SCIPY = "scipy>=1.17,<2"
# Needed only for scripts/embed.py --index. It has wheels; hnswlib has to be compiled.
FAISS = "faiss-cpu>=1.10,<2"
# Needed only for scripts/quality/ranking_peers.py.
QUALITY = [SCIPY, "lightgbm>=4.5,<5"]
# Needed only for scripts/serve.py.
SERVE = ["fastapi>=0.165,<1", "uvicorn>=0.54,<1", "prometheus-client>=0.26,<1"]

REQUIRED = [
    TORCH,
    "megatron-core>=0.16,<0.17",
    "gin-config>=0.5,<0.6",
    "numpy>=2.2,<3",
    "pandas>=2.3,<4",
    "duckdb>=2,<3",  # 1.5 takes Europe/Berlin in a text for another hour
    "pyarrow>=20,<27",
    "matplotlib>=3.10,<4",
    "tensorboard>=2.19,<3",
    "safetensors>=0.5,<1",
    # TorchRec imports these. They are listed here because on CPU TorchRec is installed without its dependencies.
    "tensordict>=0.12",
    "torchmetrics==1.0.3",
    "tqdm>=4.67",
    "pyre-extensions>=0.0.32",
    "psutil>=7",
    "iopath>=0.1.10",
]
DEVELOPMENT = [
    CUTLASS_DSL,
    "pytest>=9",
    "pytest-timeout>=2.4",
    "pytest-xdist>=3.8",
    "hypothesis>=6.150",
    "scikit-learn>=1.7",
    SCIPY,
    *SERVE,
    "ruff>=0.15",
    "mypy>=2",
    "pandas-stubs>=3",
    "types-tqdm>=4.67",
    "types-psutil>=7",
]
# The console commands are names of the functions that the scripts call.
COMMANDS = {
    "hstu-train-ranking": "pretrain_gr_ranking:main",
    "hstu-train-retrieval": "pretrain_gr_retrieval:main",
    "hstu-preprocess": "hstu_scripts.preprocess_dataset:main",
    "hstu-recommend": "hstu_scripts.recommend:main",
    "hstu-evaluate": "hstu_scripts.evaluate:main",
    "hstu-predict": "hstu_scripts.predict:main",
    "hstu-embed": "hstu_scripts.embed:main",
    "hstu-inspect-checkpoint": "hstu_scripts.inspect_checkpoint:main",
    "hstu-export": "hstu_scripts.export:main",
    "hstu-serve": "hstu_scripts.serve:main",
    "hstu-dynamic-table": "hstu_scripts.dynamic_table:main",
    "hstu-estimate": "hstu_scripts.estimate:main",
    "hstu-factorize": "hstu_scripts.factorize:main",
}

setup(
    name="hstu",
    version=VERSION.group(1) if VERSION else "0",
    description="Gin-configured distributed training of HSTU models for generative recommendation",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The HSTU trainer contributors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["recommender systems", "generative recommendation", "HSTU", "TorchRec", "Megatron", "Triton", "CUTLASS"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    project_urls={"Paper": "https://arxiv.org/abs/2402.17152"},
    python_requires=">=3.11",
    packages=[*find_packages(include=["hstu", "hstu.*"]), "hstu_scripts"],
    package_dir={"hstu_scripts": "scripts"},
    py_modules=["pretrain_gr_ranking", "pretrain_gr_retrieval"],
    entry_points={"console_scripts": [f"{command} = {function}" for command, function in COMMANDS.items()]},
    package_data={
        "hstu": ["py.typed"],
        "hstu.ops.cpu": ["csrc/*"],  # compiled on first use, for the processor of the machine
        "hstu.serve.server": ["*.html"],
    },
    install_requires=REQUIRED,
    extras_require={
        "cpu": [FBGEMM_CPU, TRITON_CPU],
        "cuda": [TORCHREC, FBGEMM_CUDA, CUTLASS_DSL_CUDA],
        "wandb": [WANDB],
        "factorize": [SCIPY],
        "index": [FAISS],
        "quality": QUALITY,
        "serve": SERVE,
        "dev": DEVELOPMENT,
    },
)
