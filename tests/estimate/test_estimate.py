"""What the estimate reckons with, and how its parts make a step."""

import dataclasses
from typing import Any

import pytest
import torch

from hstu.base.errors import ConfigError
from hstu.config.args import DynamicEmbeddingArgs
from hstu.estimate import machine
from hstu.estimate.dry_run import dry_run
from hstu.estimate.estimate import estimate, report
from hstu.estimate.record import ATTENTION, Operator
from hstu.estimate.sharding import Transfer, plan_tables
from hstu.estimate.workload import plan_workload
from hstu.parallel.own_time import own_time
from tests.estimate.runs import run_config

H100 = machine.gpu("h100", torch.bfloat16)


def test_lengths_are_those_of_the_run_and_the_slowest_rank_is_waited_for() -> None:
    two = plan_workload(run_config(), 2, 2, "cuda")
    one = plan_workload(run_config(bindings=["TrainerArgs.train_batch_size = 32"]), 1, 1, "cuda")
    assert [sum(batch.lengths.items.sum() for batch in step) for step in two.steps] == [
        step[0].lengths.items.sum() for step in one.steps
    ]
    assert two.straggling > one.straggling == 1
    balanced = plan_workload(run_config(bindings=["TrainerArgs.enable_balanced_shuffler = True"]), 2, 2, "cuda")
    assert 1 <= balanced.straggling < two.straggling


def test_exchanges_hide_behind_computation_as_the_pipeline_allows() -> None:
    slow_links = dataclasses.replace(H100, link_gb_s=0.01)
    steps = {}
    for pipeline in ("none", "native"):
        workload = plan_workload(run_config(bindings=[f"TrainerArgs.pipeline_type = {pipeline!r}"]), 2, 2, "cuda")
        steps[pipeline] = estimate(workload, slow_links)
    assert steps["native"].step["exchange for tables"] < steps["none"].step["exchange for tables"]
    beside = dataclasses.replace(slow_links, overlaps=False)
    assert estimate(workload, beside).step_s > steps["native"].step_s
    assert estimate(workload, H100).step_s < steps["native"].step_s


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"])
def test_the_ranks_of_a_host_share_what_leaves_it(kind: Any) -> None:
    one = Transfer("", kind, "world_group", ranks=16, calls=1, payload=16)
    alone, together = one.sent(on_host=1), one.sent(on_host=16)
    assert alone[0] == together[1] == 0
    assert alone[1] == together[0], "a host of each is as one host of all, on the other links"
    within, between = one.sent(on_host=8)
    assert within + between == pytest.approx(alone[1]), "all but its own part arrives once, by whichever links"
    assert between == pytest.approx(alone[1] * (8 / 15 if kind == "all_to_all" else 1 / 15))


def test_many_hosts_cost_messages() -> None:
    def seconds(kind: Any, ranks: int) -> float:
        return H100.transfer_seconds(Transfer("", kind, "world_group", ranks, calls=1, payload=0), on_host=8)

    assert seconds("all_gather", 8) == H100.link_latency_us * 1e-6
    for kind, hops in (("all_reduce", 2 * 9), ("all_gather", 511), ("reduce_scatter", 511)):
        assert seconds(kind, 4096) == pytest.approx(1e-6 * (H100.network_latency_us + hops * H100.hop_us))
    assert seconds("all_to_all", 4096) == pytest.approx(1e-6 * (H100.network_latency_us + 4088 * H100.message_us))


def test_ranks_of_a_group_on_a_host() -> None:
    workload = plan_workload(run_config(tp=2, cp=2), 32, 8, "cuda")
    known = {"world": (32, 8), "tp": (2, 2), "cp": (2, 2), "tp_cp": (4, 4), "dp_cp": (16, 4), "dp": (8, 2)}
    for group, (ranks, on_host) in known.items():
        assert workload.ranks_on_host(f"{group}_group", ranks) == on_host
    assert dataclasses.replace(workload, ranks_per_host=1).ranks_on_host("dp_cp_group", 16) == 1


def test_recomputation_trades_memory_for_time() -> None:
    plain, again = (
        estimate(plan_workload(run_config(bindings=[f"NetworkArgs.recompute_layer = {wanted}"]), 1, 1, "cuda"), H100)
        for wanted in (False, True)
    )
    assert again.memory["activations"] < plain.memory["activations"] / 3
    assert again.memory["working memory"] > plain.memory["working memory"]
    assert again.step_s > plain.step_s


def test_each_layer_costs_what_its_span_costs() -> None:
    costs = []
    for spans in ("None", "(8, None)", "8"):
        workload = plan_workload(run_config(bindings=[f"NetworkArgs.max_attention_span = {spans}"]), 1, 1, "cuda")
        events = dry_run(workload, workload.largest).recording.events
        attention = [op for op in events if isinstance(op, Operator) and op.name == ATTENTION]
        assert len(attention) == 2 * 2, "forward and backward of two layers"
        costs.append(sum(op.cost.flops for op in attention))
    assert costs[0] > costs[1] > costs[2]
    assert costs[0] - costs[1] == pytest.approx(costs[1] - costs[2])


def test_micro_batches_take_the_activations_of_one_of_them() -> None:
    whole, parts = (
        estimate(plan_workload(run_config(bindings=bindings), 1, 1, "cuda"), H100)
        for bindings in (
            ["TrainerArgs.train_batch_size = 32"],
            ["TrainerArgs.train_batch_size = 8", "TrainerArgs.gradient_accumulation_steps = 4"],
        )
    )
    assert parts.memory["activations"] < whole.memory["activations"] / 3
    # The rows are equal to the byte; offsets of the batch, or of its first part, are counted with them.
    assert parts.memory["looked-up rows"] == pytest.approx(whole.memory["looked-up rows"], rel=0.1)
    assert parts.tokens == whole.tokens and parts.flops == whole.flops


def test_tables_that_do_not_fit_are_shown_with_what_they_need() -> None:
    config = run_config(bindings=["item/EmbeddingArgs.item_vocab_size_or_capacity = 1000000000"])
    workload = plan_workload(config, 2, 2, "cuda")
    found = estimate(workload, H100)
    assert found.memory["sharded tables"] == pytest.approx(4 * 32 * 500_000_000, rel=0.01)
    assert found.memory_total > found.memory_limit
    assert [*report(found, workload, H100)][-1] == "warning: this is more memory than a rank has"


def test_a_cpu_has_a_measured_peak_and_hides_no_exchange() -> None:
    workload = plan_workload(run_config(), 2, 2, "cpu")
    found = estimate(workload, machine.this_cpu(2, torch.float32))
    assert 1e-4 < found.step_s < 5
    assert found.step["exchange for tables"] > 0


def test_a_layer_of_any_kind_is_counted_without_a_line_here() -> None:
    """Operators that no file of the estimate names: the arithmetic of the products is what the training log counts."""
    workload = plan_workload(run_config(), 1, 1, "cuda")
    events = dry_run(workload, workload.typical).recording.events
    assert own_time.pop_s() == 0.0, "the run that follows does not count it"
    flops = sum(event.cost.flops for event in events if isinstance(event, Operator))
    assert workload.flops(workload.typical) < flops < 1.1 * workload.flops(workload.typical), "and the head's"


def test_numbers_of_a_machine_are_checked() -> None:
    assert machine.with_settings(H100, {"network_gb_s": "25"}).network_gb_s == 25
    with pytest.raises(ConfigError, match=r'dtype_str = "float32": .* b200 .* "bfloat16" .*: h200, h100, a100'):
        machine.gpu("b200", torch.float32)
    for settings, message in (({"network_gb": "25"}, "did you mean 'network_gb_s'"), ({"launch_us": "-1"}, "above 0")):
        with pytest.raises(ConfigError, match=message):
            machine.with_settings(H100, settings)


def test_a_table_in_two_memories_is_cut_as_one_that_lies_in_one() -> None:
    workload = plan_workload(run_config(), 4, 4, "cuda")
    item = next(spec for spec in workload.specs if spec.name == "item")
    table = DynamicEmbeddingArgs(feature_names=["item"], table_name="item", item_vocab_size_or_capacity=3001)
    for budget in (None, 100.0):
        dynamic = dataclasses.replace(table, item_vocab_gpu_capacity=budget)
        of_item = dataclasses.replace(item, dynamic=dynamic, rows=4 * 752)
        specs = tuple(of_item if spec is item else spec for spec in workload.specs)
        changed = dataclasses.replace(workload)
        vars(changed)["specs"] = specs
        plan = {shards.spec.name: shards for shards in plan_tables(changed)}
        assert plan.keys() == {"item", "user"}
        assert plan["item"].shards == tuple((rank, 752, 32) for rank in range(4))
