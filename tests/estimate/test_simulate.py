"""Simulated clusters: what is known of their limits."""

import json
import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import estimate as script

from hstu.estimate.cluster import (
    COMPUTING,
    WAITING,
    Cluster,
    best_interval,
    checkpoint_times,
    goodput,
    simulate,
    simulate_steps,
)
from hstu.estimate.dry_run import dry_run
from hstu.estimate.estimate import estimate
from hstu.estimate.machine import gpu
from hstu.estimate.plan import plan_cluster, plan_workload
from hstu.estimate.tables import plan_tables
from tests.estimate.runs import run_config

H100 = gpu("h100", torch.bfloat16)
EQUAL = ["items/FeatureArgs.is_jagged = False"]
SAVES = (60.0, 0.0, 60.0)
"""Seconds of the stall, of the writing beside training, and of the loading."""
HOUR = 3600.0


@cache
def simulated(ranks: int, *bindings: str, tp: int = 1) -> Cluster:
    return simulate(
        *plan_cluster(run_config(tp=tp, bindings=list(bindings)), ranks, min(ranks, 8), "cuda"), H100, steps=30
    )


@pytest.mark.parametrize(("ranks", "tp"), [(1, 1), (2, 1), (16, 2)])
def test_with_equal_lengths_nobody_waits_and_a_step_is_that_of_the_estimate(ranks: int, tp: int) -> None:
    config = run_config(tp=tp, bindings=EQUAL)
    found = simulated(ranks, *EQUAL, tp=tp)
    expected = estimate(plan_workload(config, ranks, min(ranks, 8), "cuda"), H100)
    assert found.parts_s[WAITING] == pytest.approx(0, abs=1e-12)
    assert (found.step_s, found.step_s_95) == pytest.approx((expected.step_s, expected.step_s), rel=1e-6)
    assert found.parts_s[COMPUTING] == pytest.approx(expected.step["computing"], rel=1e-6)
    assert found.tokens_per_s == pytest.approx(expected.tokens / expected.step_s, rel=1e-6)
    assert found.tflops == pytest.approx(expected.tflops)


def test_with_real_lengths_one_rank_is_the_estimate_and_more_ranks_wait_longer() -> None:
    one = simulated(1)
    expected = estimate(plan_workload(run_config(), 1, 1, "cuda"), H100)
    assert one.step_s == pytest.approx(expected.step_s, rel=0.05)
    assert one.parts_s[WAITING] == pytest.approx(0, abs=1e-12)
    waits = [simulated(ranks).parts_s[WAITING] for ranks in (1, 2, 8, 64)]
    assert all(few < many for few, many in pairwise(waits))
    balanced = simulated(64, "TrainerArgs.enable_balanced_shuffler = True")
    assert balanced.parts_s[WAITING] < waits[-1] / 5
    assert balanced.tokens_per_s * balanced.step_s == pytest.approx(
        simulated(64).tokens_per_s * simulated(64).step_s
    ), "who trains on a sample changes, and nothing else"


def test_a_simulation_is_repeated_by_its_seed() -> None:
    planned = plan_cluster(run_config(), 4, 4, "cuda")
    runs = [simulate(*planned, H100, steps=5, seed=seed) for seed in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert runs[0].step_s != runs[2].step_s and runs[0].goodput != runs[2].goodput


def test_the_slowest_group_decides_and_the_parts_add_up() -> None:
    workload, draws = plan_cluster(run_config(tp=2), 8, 8, "cuda")
    lines = {COMPUTING: np.array([1.0, 0.5, 0.0]), "exchange for tables": np.array([2.0, 0.0, 0.0])}
    seconds, parts, *_ = simulate_steps(workload, draws, lines, steps=3, seed=1)
    tokens = []
    for step in range(3):
        lengths, groups = draws.global_batch(1, step)
        loads = workload.loads(lengths.items, lengths.candidates)
        tokens.append([loads.tokens[groups == group].sum() for group in range(4)])
    assert seconds.tolist() == [3 + 0.5 * max(of_groups) for of_groups in tokens]
    assert sum(parts.values()) == pytest.approx(seconds.mean())
    assert parts[COMPUTING] == pytest.approx(1 + 0.5 * np.mean(tokens))


def test_without_failures_all_time_but_that_of_saves_is_kept() -> None:
    kept, saving = goodput(600.0, SAVES, float("inf"), restart_s=300.0)
    assert (kept, saving) == (600 / 660, 60 / 660)
    assert goodput(600.0, SAVES, 1e9, restart_s=300.0)[0] == pytest.approx(kept, abs=1e-3)


def test_more_failures_keep_less_until_nothing_is_kept() -> None:
    kept = [goodput(600.0, SAVES, hours * HOUR, restart_s=300.0)[0] for hours in (1000, 100, 10, 1, 0.01)]
    assert all(rare > often for rare, often in pairwise(kept)) and kept[-1] < 1e-3


def test_the_goodput_of_many_failures_is_what_probability_says() -> None:
    interval, mtbf, restart, (stall, _, load) = 600.0, HOUR, 300.0, SAVES
    survive = np.exp(-(interval + stall) / mtbf)  # of one period; the first follows restart and loading
    periods = np.exp(-(restart + load) / mtbf) * survive / (1 - survive)
    assert goodput(interval, SAVES, mtbf, restart)[0] == pytest.approx(periods * interval / mtbf, rel=0.02)


@pytest.mark.parametrize("hours", [2, 24, 240])
@pytest.mark.parametrize("stall", [5.0, 120.0])
def test_the_interval_of_young_and_daly_is_as_good_as_the_best_simulated_one(hours: float, stall: float) -> None:
    saves = stall, 0.0, 60.0
    mtbf = hours * HOUR
    interval = best_interval(stall, 0.0, mtbf)
    assert interval == pytest.approx((2 * stall * mtbf) ** 0.5, rel=0.15), "Young's first term"
    tried = [goodput(interval * factor, saves, mtbf, restart_s=300.0)[0] for factor in np.geomspace(0.2, 5, 21)]
    assert goodput(interval, saves, mtbf, restart_s=300.0)[0] > max(tried) - 0.003
    assert tried[0] < max(tried) - 0.003 and tried[-1] < max(tried) - 0.003


def test_saves_in_the_background_stall_less_and_do_not_overlap() -> None:
    config = run_config()
    workload, _ = plan_cluster(config, 4, 2, "cuda")
    plan, run = plan_tables(workload), dry_run(workload, workload.typical)
    waiting = checkpoint_times(workload, plan, run, H100)[1:]
    trainer = replace(config.trainer, ckpt_async=True)
    beside = checkpoint_times(replace(workload, config=replace(config, trainer=trainer)), plan, run, H100)[1:]
    assert waiting[:2] == (beside[1], 0.0) and beside[0] < waiting[0]
    assert best_interval(*beside[:2], HOUR) >= beside[1]
    mtbf = 24 * HOUR
    kept = [goodput(best_interval(*each[:2], mtbf), each, mtbf, restart_s=300.0)[0] for each in (waiting, beside)]
    assert kept[0] < kept[1]


def test_a_checkpoint_has_every_weight_once_whatever_the_plan() -> None:
    sizes = set()
    for ranks, tp, sharding in ((1, 1, "none"), (4, 1, "none"), (4, 2, "none"), (4, 1, "optimizer"), (4, 1, "weights")):
        workload, _ = plan_cluster(
            run_config(tp=tp, bindings=[f"DataParallelArgs.sharding = {sharding!r}"]), ranks, 4, "cuda"
        )
        sizes.add(checkpoint_times(workload, plan_tables(workload), dry_run(workload, workload.typical), H100)[0])
    assert len(sizes) == 1
    tables = sum(spec.rows * spec.dim for spec in workload.specs)
    assert sizes.pop() > 4 * 3 * tables, "rows and two states of adam"


RUN = ["--gin-config-file", "configs/benchmark_ranking_balanced.gin", "--device", "h100"]


def test_the_table_has_a_row_per_size_and_names_the_largest_loss(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--gin-bindings", "TrainerArgs.enable_balanced_shuffler = False", "--set", "mtbf_hours=40"]
    assert script.main([*RUN, *more, "--simulate", "16", "8"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()[:3]]
    assert [row[0] for row in rows] == ["GPUs", "8", "16"]
    assert "none of it has been measured on GPUs" in printed
    assert script.main([*RUN, *more, "--simulate", "8", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["gpus"] for each in found] == [8, 16]
    assert found[0]["efficiency"] == 1 > found[1]["efficiency"]
    assert all(sum(each["shares"].values()) == pytest.approx(1) for each in found)
    assert all(
        each["shares"][each["limit"]] == max(s for n, s in each["shares"].items() if n != COMPUTING) for each in found
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--simulate", "8", "--world-size", "8"], "neither --fit nor --world-size"),
        (["--simulate", "8", "--device", "cpu"], "give --device h100"),
        (["--simulate", "8", "12"], "--simulate 12 is no multiple of 8 ranks per host"),
        (["--simulate", "0"], "expected at least 1"),
    ],
)
def test_sizes_that_cannot_be_simulated(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([*RUN, *options]) == 2
    assert message in capsys.readouterr().err
