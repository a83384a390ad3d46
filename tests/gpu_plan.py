"""How long ``pytest -m gpu`` takes on a GPU, estimated from the kernels that each test compiles.

pytest prints the estimate when it collects these tests, and runs them in the order of COSTS. A new test needs no line
here, but is then assumed to compile as many kernels as UNKNOWN says.
"""

from collections.abc import Iterable
from dataclasses import dataclass

LIMIT_S = 580
"""Time that all of them may take: a call of 10 minutes less the start of the machine."""
PLANNED_S = 550
"""Time that the estimate may reach."""
START_S = 25.0
ATTENTION_S, KERNEL_S, CUTLASS_S = 2.0, 1.0, 15.0
"""Estimated time to compile a Triton kernel of attention, another one, and the CUTLASS kernels of one head dim and
dtype, on one core; from compiling them without a GPU."""
TIMEOUT_S = 90.0
"""Shortest time after which a test has failed. It is three times the estimate of the test where that is longer."""


@dataclass(frozen=True)
class Cost:
    """What one parametrization of a test takes: kernels that it compiles first, and the time beside."""

    attention: float = 0
    kernels: float = 0
    cutlass: float = 0
    other_s: float = 0.2

    @property
    def seconds(self) -> float:
        return ATTENTION_S * self.attention + KERNEL_S * self.kernels + CUTLASS_S * self.cutlass + self.other_s


UNKNOWN = Cost(kernels=3)
OPS, TRITON = "tests/ops/test_kernels.py::", "tests/ops/triton/"
ROWS, OTHERS = f"{TRITON}test_norm.py::", f"{TRITON}test_other_ops.py::"
SUM = "tests/ops/test_add_layer_norm.py::"
SLOTS = "tests/parallel/dynamic/test_triton_slots.py::"
COSTS = {
    # Is every kernel right?
    "tests/ops/cutlass/test_self_check.py::test_all_kernels_pass": Cost(cutlass=1, other_s=2),
    f"{TRITON}test_self_check.py::test_all_kernels_pass": Cost(attention=7, kernels=14, other_s=3),
    f"{TRITON}test_self_check.py::test_a_wrong_gradient_and_a_kernel_that_does_not_repeat_are_found": Cost(),
    # for any batch
    f"{OPS}test_one_compiled_kernel_serves_any_batch": Cost(attention=2.5, cutlass=0.125, other_s=1),
    f"{OPS}test_attention_equals_float64_on_a_long_sequence": Cost(attention=0.9, other_s=1),
    "tests/ops/test_attention_window.py::test_long_sequences_with_a_window_are_right": Cost(attention=4, other_s=1),
    # Do whole steps train what they train elsewhere?
    "tests/distributed/test_tables_by_device.py::test_rows_train_the_same_wherever_they_lie": Cost(other_s=3),
    "tests/distributed/test_tables_by_device.py::test_a_table_trains_the_same_however_it_is_sharded": Cost(other_s=2),
    "tests/distributed/test_tables_by_device.py::test_pipelines_train_what_none_trains": Cost(other_s=2),
    "tests/distributed/test_dynamic_tables.py::test_rows_are_trained_the_same_wherever_they_lie": Cost(
        kernels=4, other_s=10
    ),
    "tests/pipeline/test_pipelines.py::test_on_a_gpu_batches_are_copied_beside_the_stream_of_the_steps": Cost(
        other_s=12
    ),
    "tests/pipeline/test_host_syncs.py::test_on_a_gpu_no_step_of_ours_waits_for_the_device": Cost(other_s=10),
    # shapes and types that occur seldom
    f"{OPS}test_time_buckets_are_those_of_the_definition_at_every_edge": Cost(attention=2),
    f"{OPS}test_the_sampled_loss_equals_float64": Cost(kernels=18),
    f"{OPS}test_targets_of_any_score_have_a_finite_loss_and_exact_gradients": Cost(kernels=3),
    f"{OPS}test_the_gate_equals_float64": Cost(kernels=9),
    f"{OPS}test_the_gate_of_a_projection_equals_float64": Cost(kernels=1),
    f"{ROWS}test_dropout_keeps_the_share_and_the_mean_and_scales_what_stays": Cost(kernels=1),
    f"{ROWS}test_another_seed_drops_others_and_the_same_seed_the_same": Cost(),
    f"{ROWS}test_backward_drops_what_forward_dropped": Cost(kernels=2),
    f"{ROWS}test_checkpointing_repeats_the_dropout_bit_for_bit": Cost(),
    f"{ROWS}test_heads_on_two_ranks_give_the_norm_over_all_of_them": Cost(kernels=4),
    f"{SUM}test_sum_norm_and_gradients_equal_float64": Cost(kernels=1.5),
    f"{SUM}test_the_gradient_of_the_update_is_that_of_x_rounded_once": Cost(kernels=1),
    f"{SUM}test_recomputing_the_norm_from_the_sum_gives_the_same_bits": Cost(kernels=1),
    f"{SUM}test_without_rows_the_gradients_of_the_weights_are_zero": Cost(),
    f"{OTHERS}test_the_projection_equals_float64": Cost(kernels=2),
    f"{OTHERS}test_jagged_concat_moves_rows_and_their_gradients_exactly": Cost(kernels=2),
    f"{OTHERS}test_positions_equal_float64_and_far_ones_share_the_last": Cost(kernels=1),
    f"{OTHERS}test_the_pool_loss_equals_float64": Cost(kernels=2),
    f"{OTHERS}test_gradients_of_the_bias_have_the_same_bits_in_every_run": Cost(attention=4),
    f"{OTHERS}test_a_gradient_that_is_not_finite_stays_so_in_the_gradients_of_the_bias": Cost(attention=4),
    f"{SLOTS}test_streams_have_the_same_result_as_in_a_dictionary": Cost(kernels=3, other_s=3),
    f"{SLOTS}test_long_streams_equal_those_of_pytorch_and_go_on_from_a_checkpoint": Cost(other_s=5),
    f"{SLOTS}test_the_same_batches_give_the_same_slots_in_any_order_of_programs": Cost(other_s=2),
    f"{SLOTS}test_ids_of_equal_or_close_scores_give_way_by_score_then_by_hash": Cost(),
    f"{SLOTS}test_new_rows_have_their_initial_values_in_whichever_block_they_are_and_no_state": Cost(kernels=0.5),
    f"{SLOTS}test_ids_that_are_looked_for_at_the_same_place_are_all_found_beyond_the_last_entry_too": Cost(),
    f"{SLOTS}test_counts_stop_at_the_most_there_may_be": Cost(),
    "tests/parallel/dynamic/test_host_reads.py::test_no_batch_waits_for_a_gpu": Cost(kernels=1, other_s=2),
    # beside the kernels
    "tests/data/batches/test_batch.py::test_a_pinned_batch_is_copied_on_a_side_stream": Cost(),
    "tests/observe/test_profiler.py::test_on_a_gpu_kernels_are_traced_too": Cost(other_s=5),
    "tests/observe/test_throughput.py::test_a_gpu_reaches_a_good_part_of_its_peak_and_no_more": Cost(other_s=3),
}
"""Test → the cost of one of its parametrizations. The most valuable come first."""
_ORDER = {name: place for place, name in enumerate(COSTS)}


def cost_of(test: str) -> Cost:
    """The cost of a collected test, from its node id."""
    return COSTS.get(test.partition("[")[0], UNKNOWN)


def order_of(test: str) -> int:
    """Where the test comes; tests without a line come last."""
    return _ORDER.get(test.partition("[")[0], len(_ORDER))


def timeout_s(test: str) -> float:
    """Time after which the test has failed."""
    return max(TIMEOUT_S, 3 * cost_of(test).seconds)


def predicted_s(tests: Iterable[str]) -> float:
    """The estimate for these tests, one after the other in one process."""
    return START_S + sum(cost_of(test).seconds for test in tests)


def describe(tests: Iterable[str]) -> str:
    """The estimate in a line."""
    tests = list(tests)
    costs = [cost_of(test) for test in tests]
    return (
        f"on a GPU about {predicted_s(tests):.0f} s of {LIMIT_S} s (estimate): {len(tests)} tests compile "
        f"{sum(cost.attention + cost.kernels for cost in costs):.0f} Triton kernels and "
        f"{sum(cost.cutlass for cost in costs):.0f} sets of CUTLASS kernels"
    )
