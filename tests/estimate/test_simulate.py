"""Simulated clusters: what is known of their limits."""

import json
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch

from hstu.estimate.estimate import estimate
from hstu.estimate.explore import COMPUTING, WAITING, Cluster, draw_step, simulate, simulate_steps
from hstu.estimate.machine import gpu
from hstu.estimate.workload import plan_workload
from scripts import estimate as script
from tests.estimate.runs import run_config

H100 = gpu("h100", torch.bfloat16)
EQUAL = "items/FeatureArgs.is_jagged = False"


@cache
def simulated(ranks: int, *bindings: str, tp: int = 1) -> Cluster:
    return simulate(run_config(tp=tp, bindings=list(bindings)), ranks, min(ranks, 8), H100, steps=30)


def test_with_equal_lengths_nobody_waits_and_a_step_is_that_of_the_estimate() -> None:
    found = simulated(16, EQUAL, tp=2)
    expected = estimate(plan_workload(run_config(tp=2, bindings=[EQUAL]), 16, 8, "cuda"), H100)
    assert found.parts_s[WAITING] == pytest.approx(0, abs=1e-12)
    assert found.step_s == pytest.approx(expected.step_s, rel=1e-6)
    # Batches differ in how many of their ids are distinct.
    assert found.parts_s[COMPUTING] == pytest.approx(expected.step["computing"], rel=1e-5)
    assert found.tokens_per_s == pytest.approx(expected.tokens / expected.step_s, rel=1e-6)
    assert found.tflops == pytest.approx(expected.tflops)


@pytest.mark.slow
def test_with_real_lengths_one_rank_is_the_estimate_and_more_ranks_wait_longer() -> None:
    one = simulated(1)
    expected = estimate(plan_workload(run_config(), 1, 1, "cuda"), H100)
    assert one.step_s == pytest.approx(expected.step_s, rel=0.05)
    assert one.parts_s[WAITING] == pytest.approx(0, abs=1e-12)
    waits = [simulated(ranks).parts_s[WAITING] for ranks in (1, 64)]
    assert all(few < many for few, many in pairwise(waits))
    balanced = simulated(64, "TrainerArgs.enable_balanced_shuffler = True")
    assert balanced.parts_s[WAITING] < waits[-1] / 5
    assert balanced.tokens_per_s * balanced.step_s == pytest.approx(
        simulated(64).tokens_per_s * simulated(64).step_s
    ), "who trains on a sample changes, and nothing else"


def test_the_slowest_group_decides_and_the_parts_add_up() -> None:
    workload = plan_workload(run_config(tp=2), 8, 8, "cuda")
    lines = {COMPUTING: np.array([1.0, 0.5, 0.0]), "exchange for tables": np.array([2.0, 0.0, 0.0])}
    parts, *_ = simulate_steps(workload, lines, steps=3, seed=1)
    loads = workload.loads(workload.source.train_lengths)
    tokens = []
    for step in range(3):
        samples, groups = draw_step(workload, 1, step)
        tokens.append([loads.tokens[samples[groups == group]].sum() for group in range(4)])
    assert sum(parts.values()) == pytest.approx(np.mean([3 + 0.5 * max(of_groups) for of_groups in tokens]))
    assert parts[COMPUTING] == pytest.approx(1 + 0.5 * np.mean(tokens))


RUN = ["--gin-config-file", "configs/benchmark_ranking_balanced.gin", "--device", "h100"]


@pytest.mark.slow
def test_the_table_has_a_row_per_size_and_names_the_largest_loss(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--gin-bindings", "TrainerArgs.enable_balanced_shuffler = False", "NetworkArgs.num_layers = 1"]
    assert script.main([*RUN, *more, "--simulate", "16", "8"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()[:3]]
    assert [row[0] for row in rows] == ["GPUs", "8", "16"]
    assert "none of it has been measured on GPUs" in printed
    assert script.main([*RUN, *more, "--simulate", "8", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["gpus"] for each in found] == [8, 16]
    assert found[0]["efficiency"] == 1 > found[1]["efficiency"]
    for each in found:
        assert each["parts_s"][each["limit"]] == max(s for n, s in each["parts_s"].items() if n != COMPUTING)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--simulate", "8", "--world-size", "8"], "neither --fit nor --world-size"),
        (["--simulate", "8", "--device", "cpu"], "give --device h100"),
        (["--simulate", "8", "12"], "--simulate 12 is no multiple of 8 ranks per host"),
        (["--simulate", "0"], "expected at least 1"),
        (["--fit", "--device", "cpu"], "give --device h100"),
        (["--fit", "--json"], "give --device h100"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([*RUN, *options]) == 2
    assert message in capsys.readouterr().err
