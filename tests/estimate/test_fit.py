"""The search for the fastest plan within the memory."""

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch

from hstu.config.run_config import RunConfig
from hstu.estimate.explore import Plan, plans_as_text, search
from hstu.estimate.machine import gpu, with_settings
from scripts import estimate as script
from tests.estimate.runs import run_config

RUN = ["--gin-config-file", "configs/benchmark_ranking.gin", "--world-size", "2", "--device", "h100"]


@cache
def plans_of(memory_gb: str) -> tuple[RunConfig, list[Plan]]:
    bindings = ["NetworkArgs.dtype_str = 'bfloat16'", "TrainerArgs.train_batch_size = 2"]
    config = run_config(bindings=[*bindings, "NetworkArgs.num_attention_heads = 2", "NetworkArgs.num_layers = 1"])
    machine = with_settings(gpu("h100", torch.bfloat16), {"memory_gb": memory_gb})
    return config, search(config, world_size=4, ranks_per_host=2, machine=machine)


@pytest.mark.slow
def test_the_first_plan_is_the_fastest_that_fits_and_others_are_smaller() -> None:
    config, plans = plans_of("80")
    assert all(plan.fits for plan in plans)
    assert plans[0].found.step_s == min(plan.found.step_s for plan in plans)
    tried = {
        (plan.config.tensor_parallel.tensor_model_parallel_size, plan.config.data_parallel.sharding) for plan in plans
    }
    assert tried >= {(1, "none"), (1, "weights"), (2, "optimizer")}
    assert {plan.config.context_parallel.context_parallel_size for plan in plans} == {1, 2}, "a host has two ranks"
    table = plans_as_text(plans, config).split("\n\n")[1].splitlines()[1:]
    rows = [line.split() for line in table]
    assert all(float(row[1]) <= float(other[1]) and float(row[3]) >= float(other[3]) for row, other in pairwise(rows))


@pytest.mark.slow
def test_with_little_memory_a_batch_is_divided_and_the_global_batch_stays() -> None:
    config, plans = plans_of("80")
    least = min(plan.found.memory_total for plan in plans)
    most = max(plan.found.memory_total for plan in plans)
    config, plans = plans_of(str((least + most) / 2 / 1e9 / 0.9))
    assert plans[0].fits
    assert any(plan.config.trainer.gradient_accumulation_steps > 1 for plan in plans if plan.fits)
    for plan in plans:
        assert plan.config.trainer.sequences_per_iteration == config.trainer.sequences_per_iteration
    none_fits = [replace(plan, found=replace(plan.found, memory_limit=1.0)) for plan in plans]
    assert "no plan fits" in plans_as_text(none_fits, config)


@pytest.mark.slow
def test_the_lines_that_are_printed_make_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([*RUN, "--gin-bindings", "NetworkArgs.recompute_layer = True", "--fit"]) == 0
    printed = capsys.readouterr().out
    lines = printed.partition("# the fastest:\n")[2].splitlines()
    assert "NetworkArgs.recompute_layer = False" in lines, "there is memory enough"
    assert script.main([*RUN, "--gin-bindings", *lines, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert f"{1e3 * found['step_s']:.1f} ms" in printed
