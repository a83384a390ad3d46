"""Memory per rank, communication and time of a training step, estimated before any rank is started.

    python scripts/estimate.py --gin-config-file configs/benchmark_ranking.gin --world-size 16 --tp 2 --device h100

No GPU is needed. The time on a GPU is a roofline: published peaks times assumed efficiencies. ``--set`` changes any
number: --set network_gb_s=25 --set attention_efficiency=0.5. For the CPU (``--device cpu``, the default) the peak is
measured in less than a second. docs/distributed.md explains the formulas.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from hstu.base.errors import EXIT_DONE, ConfigError
from hstu.config.cli import tool
from hstu.config.gin_io import read_and_check
from hstu.config.rules import RULES
from hstu.config.run_config import RunConfig, Task
from hstu.data.rules import DATA_RULES
from hstu.observe.environment import check_packages

DEVICES = ("cpu", "h100", "h200", "a100", "b200", "l40s", "a10")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message} (--help lists the options)")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ConfigError for what it does not allow."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--gin-config-file", dest="files", action="extend", nargs="+", default=[], metavar="FILE")
    add("--gin-bindings", dest="bindings", action="extend", nargs="+", default=[], metavar="BINDING")
    add("--world-size", type=int, default=1, help="ranks (1)")
    add("--tp", type=int, help="tensor-parallel size (default: as in the file)")
    add("--cp", type=int, help="context-parallel size (default: as in the file)")
    add("--ranks-per-host", type=int, help="ranks per host (8, or all if there are fewer; on a CPU all)")
    add("--device", choices=DEVICES, default="cpu")
    add("--set", dest="settings", action="append", default=[], metavar="NAME=NUMBER", help="a number of the machine")
    add("--task", choices=("ranking", "retrieval"), help="task of the run, if the file does not show it")
    add("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    for name in ("world_size", "tp", "cp", "ranks_per_host"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if options.ranks_per_host is None:
        options.ranks_per_host = options.world_size if options.device == "cpu" else min(8, options.world_size)
    if options.world_size % options.ranks_per_host:
        raise ConfigError(
            f"--world-size {options.world_size} is no multiple of {options.ranks_per_host} ranks per host"
        )
    return options


def read(options: argparse.Namespace) -> RunConfig:
    """The checked configuration."""
    sizes = {
        "TensorModelParallelArgs.tensor_model_parallel_size": options.tp,
        "ContextParallelArgs.context_parallel_size": options.cp,
    }
    bindings = [*options.bindings, *(f"{name} = {size}" for name, size in sizes.items() if size is not None)]
    task = options.task or _task_of(options)
    return read_and_check(options.files, bindings, task, options.world_size, (*RULES, *DATA_RULES))[0]


def _task_of(options: argparse.Namespace) -> Task:
    """The task whose arguments are bound in the files."""
    texts = [Path(file).read_text(encoding="utf-8") for file in options.files if Path(file).is_file()]
    is_retrieval = any("RetrievalArgs." in text for text in [*texts, *options.bindings])
    return "retrieval" if is_retrieval else "ranking"


def run(options: argparse.Namespace) -> str:
    """The report."""
    config = read(options)
    check_packages()

    import torch

    from hstu.estimate import machine
    from hstu.estimate.estimate import as_json, estimate, report
    from hstu.estimate.workload import plan_workload
    from hstu.observe.logging import quiet_libraries

    quiet_libraries()
    on_cpu, dtype = options.device == "cpu", getattr(torch, config.network.dtype_str)
    device = machine.this_cpu(options.ranks_per_host, dtype) if on_cpu else machine.gpu(options.device, dtype)
    device = machine.with_settings(device, dict(text.partition("=")[::2] for text in options.settings))
    workload = plan_workload(config, options.world_size, options.ranks_per_host, "cpu" if on_cpu else "cuda")
    found = estimate(workload, device)
    if options.json:
        return json.dumps(as_json(found, workload), indent=1)
    return "\n".join(report(found, workload, device))


@tool
def main(argv: Sequence[str] | None = None) -> int:
    """Print the estimate and return the exit code."""
    print(run(parse(argv)))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
