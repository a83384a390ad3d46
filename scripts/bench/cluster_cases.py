"""Simulate clusters of up to 4,096 GPUs for docs/benchmarks/cluster; prints one JSON object.

python scripts/bench/cluster_cases.py published|lengths|plans|trillion [--output FILE.json]
python scripts/bench/cluster_cases.py --draw FILE.png --of lengths.json trillion.json

Each case is a command line of scripts/estimate.py, which the report holds beside its result. Tables are printed to
standard error. All of it is an estimate.
The cases with users of ML-1M need tmp_data/ml-1m.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import ROOT, command_line, publish

sys.path.insert(0, str(ROOT / "scripts"))

import estimate as script

from hstu.base.figure import COLOURS, open_figure
from hstu.estimate.cluster import COMPUTING, WAITING

SIZES, FEW = ("64", "256", "1024", "4096"), ("64", "1024")
EQUAL, UNEVEN = "configs/benchmark_ranking.gin", "configs/benchmark_ranking_balanced.gin"
TRILLION = "scripts/bench/trillion.gin"
PLAIN = "TrainerArgs.enable_balanced_shuffler = False"
ROWS = (  # 4,096 ranks do not all get rows of 1,000,000; the trainer then leaves a table whole on one rank
    *(f"{name}/EmbeddingArgs.item_vocab_size_or_capacity = {1 << 20}" for name in ("item", "user")),
    *(f"{name}/EmbeddingArgs.sharding = 'row_wise'" for name in ("item", "user")),
)
ML_1M = (  # the network of configs/benchmark_ranking.gin, on histories of up to 2,048 films, with a table of that size
    "item/EmbeddingArgs.feature_names = ['movie_id']",
    "item/EmbeddingArgs.table_name = 'item'",
    "item/EmbeddingArgs.sharding_type = 'model_parallel'",
    *(line for line in ROWS if line.startswith("item")),
    "DatasetArgs.max_sequence_length = 2048",
    "NetworkArgs.num_layers = 8",
    "NetworkArgs.hidden_size = 1024",
    "NetworkArgs.kv_channels = 256",
    "NetworkArgs.dtype_str = 'bfloat16'",
    "TrainerArgs.pipeline_type = 'native'",
)
ZIPF = (
    "lengths/RandomDistribution.dist_type = 'zipf'",
    "lengths/RandomDistribution.alpha = 0.78",
    "lengths/RandomDistribution.mean = None",
    "lengths/RandomDistribution.std = None",
)
CUTLASS, TRITON = "attention_efficiency=0.42", "attention_efficiency=0.0565"
"""Chosen so that one published number of each backend is met, as is the alpha: see docs/benchmarks/cluster."""


def case(file: str, *bindings: str, sizes: Sequence[str] = SIZES, more: Sequence[str] = ()) -> list[str]:
    """The arguments of scripts/estimate.py."""
    bound = ["--gin-bindings", *bindings] if bindings else []
    return ["--gin-config-file", file, "--device", "h100", "--simulate", *sizes, *more, *bound]


def _set(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


_16 = ("1", "16")
_LARGE = ("64", "128", "256", "1024", "4096")
CASES: dict[str, dict[str, list[str]]] = {
    "published": {
        "one length": case(EQUAL, sizes=_16[:1], more=_set(CUTLASS)),
        "Zipf lengths, balanced": case(UNEVEN, *ZIPF, sizes=_16[1:], more=_set(CUTLASS)),
        "Zipf lengths, balanced, slow attention": case(UNEVEN, *ZIPF, sizes=_16[1:], more=_set(TRITON)),
        "Zipf lengths, slow attention": case(UNEVEN, *ZIPF, PLAIN, sizes=_16[1:], more=_set(TRITON)),
        "Zipf lengths, balanced, tensor parallel 2": case(
            UNEVEN, *ZIPF, sizes=_16[1:], more=["--tp", "2", *_set(CUTLASS)]
        ),
    },
    "lengths": {
        "one length": case(EQUAL, *ROWS),
        "log-normal": case(UNEVEN, *ROWS, PLAIN),
        "log-normal, balanced": case(UNEVEN, *ROWS),
        "log-normal, balanced, 32,768 tokens per GPU": case(
            UNEVEN, *ROWS, "TrainerArgs.tokens_per_rank = 32768", "TrainerArgs.train_batch_size = 64"
        ),
        "ML-1M": case("configs/ml_1m_ranking.gin", *ML_1M),
        "ML-1M, balanced": case("configs/ml_1m_ranking.gin", *ML_1M, "TrainerArgs.enable_balanced_shuffler = True"),
    },
    "plans": {
        "as above": case(UNEVEN, *ROWS, sizes=FEW),
        "network of 100 Gb/s per GPU": case(UNEVEN, *ROWS, sizes=FEW, more=_set("network_gb_s=12.5")),
        "hosts of one GPU": case(UNEVEN, *ROWS, sizes=FEW, more=["--ranks-per-host", "1"]),
        "tensor parallel 2": case(UNEVEN, *ROWS, sizes=FEW, more=["--tp", "2"]),
        "tensor parallel 4": case(UNEVEN, *ROWS, sizes=FEW, more=["--tp", "4"]),
        "context parallel 4": case(UNEVEN, *ROWS, sizes=FEW, more=["--cp", "4"]),
        "optimizer states sharded": case(UNEVEN, *ROWS, "DataParallelArgs.sharding = 'optimizer'", sizes=FEW),
        "weights sharded": case(UNEVEN, *ROWS, "DataParallelArgs.sharding = 'weights'", sizes=FEW),
        "tables whole on a rank": case(
            UNEVEN, *ROWS, *(f"{name}/EmbeddingArgs.sharding = 'table_wise'" for name in ("item", "user")), sizes=FEW
        ),
        "a failure per 10,000 GPU hours": case(UNEVEN, *ROWS, sizes=FEW, more=_set("mtbf_hours=10000")),
    },
    "trillion": {
        "balanced": case(TRILLION, sizes=_LARGE),
        "not balanced": case(TRILLION, PLAIN, sizes=_LARGE),
        "balanced, training waits for saves": case(TRILLION, "TrainerArgs.ckpt_async = False", sizes=_LARGE),
    },
}


def simulate(arguments: list[str]) -> dict[str, Any]:
    """The command and its result."""
    clusters = json.loads(script.run(script.parse([*arguments, "--json"])))
    return {"command": shlex.join(["python", "scripts/estimate.py", *arguments]), "clusters": clusters}


def table(group: dict[str, Any]) -> str:
    """The results of a group as Markdown."""
    lines = ["| | GPUs | step, ms | waiting | exchange | tokens/s per GPU | computing | goodput | lost to |"]
    lines.append("|---|" + "---:|" * 7 + "---|")
    for name, found in group.items():
        for each in found["clusters"]:
            step, parts, limit = each["step_s"], each["parts_s"], each["limit"]
            exchanged = sum(seconds for part, seconds in parts.items() if part.startswith("exchange"))
            cells = (
                name,
                f"{each['gpus']:,}",
                f"{1e3 * step:,.1f}",
                f"{parts[WAITING] / step:.1%}",
                f"{exchanged / step:.1%}",
                f"{each['tokens_per_s'] / each['gpus']:,.0f}",
                f"{each['shares'][COMPUTING]:.1%}",
                f"{each['goodput']:.1%}",
                f"{limit} {each['shares'][limit]:.1%}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(reports: dict[str, dict[str, Any]], image: Path) -> None:
    """Draw the share of all time that computes, over the number of GPUs: a panel per report."""
    titles = {"lengths": "8 layers of width 1,024", "trillion": "1.5 trillion parameters"}
    with open_figure(image, (11, 4.2), 150) as figure:
        for axes, (group, report) in zip(figure.subplots(1, len(reports), sharey=True), reports.items(), strict=True):
            for (label, found), colour in zip(report.items(), COLOURS, strict=False):
                sizes = [each["gpus"] for each in found["clusters"]]
                shares = [100 * each["shares"][COMPUTING] for each in found["clusters"]]
                axes.plot(sizes, shares, "o-", color=colour, label=label)
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.set(title=titles[group], xlabel="GPUs (simulated, an estimate)", ylim=(0, 100))
            axes.legend(fontsize=8)
        figure.axes[0].set_ylabel("% of all time that computes")


def main() -> None:
    """Simulate a group of cases, or draw groups that have been simulated."""
    parser = command_line(__doc__, output=True)
    parser.add_argument("group", choices=tuple(CASES), nargs="?")
    parser.add_argument("--draw", type=Path, metavar="PNG", help="draw the files of --of instead of simulating")
    parser.add_argument("--of", type=Path, nargs=2, help="the reports of lengths and trillion")
    options = parser.parse_args()
    os.chdir(ROOT)
    if options.draw:
        draw({file.stem: json.loads(file.read_text()) for file in options.of}, options.draw)
        return
    if options.group is None:
        parser.error("name a group, or use --draw")
    report = {name: simulate(arguments) for name, arguments in CASES[options.group].items()}
    print(table(report), file=sys.stderr)
    publish(report, options.output)


if __name__ == "__main__":
    main()
