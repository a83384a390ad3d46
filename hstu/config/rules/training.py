"""Rules about training: run length, checkpoints, batches, ranks, optimizers, schedule and precision."""
# ruff: noqa: D103

import re
from collections.abc import Iterator
from itertools import pairwise

from hstu.base.errors import ConfigError
from hstu.base.remote import url_of
from hstu.config.args import DatasetArgs, LRScheduleArgs, OptimizerArgs, PartOptimizerArgs, RankingArgs, TrainerArgs
from hstu.config.args.task import AT_LAST_EVENT, LOWER_IS_BETTER, METRICS_PER_TASK
from hstu.config.option import cited, problem
from hstu.config.problems import Problem, did_you_mean
from hstu.config.rules.data import RulesOf, length_of_items
from hstu.config.rules.task import tasks_of
from hstu.config.run_config import RunConfig, RunDraft

# --- run length, checkpoints and metrics ---------------------------------------------------------------------------


def profiled_iterations_are_a_range(run: RunConfig, trainer: TrainerArgs) -> Iterator[Problem]:
    if trainer.profile and trainer.profile_step_start >= trainer.profile_step_end:
        yield problem(trainer, "profile_step_start", f"must be below {cited(trainer, 'profile_step_end')}")


def save_interval_is_not_zero(run: RunConfig, trainer: TrainerArgs) -> Iterator[Problem]:
    if trainer.ckpt_save_interval == 0:
        yield problem(trainer, "ckpt_save_interval", "expected int, at least 1, or -1 to save no checkpoint")


def urls_are_where_they_may_be(run: RunConfig) -> Iterator[Problem]:
    parts = ((run.dataset, ("dataset_path", "eval_dataset_path", "cache_dir")),
             (run.trainer, ("ckpt_save_dir", "ckpt_load_dir", "output_dir")))  # fmt: skip
    for part, names in parts:
        for name in names:
            try:
                if url_of(getattr(part, name, None)) and name in ("output_dir", "cache_dir"):
                    yield problem(part, name, "must be a local directory, as logs and cached files are; give another")
            except ConfigError as error:
                yield Problem(f"{type(part).__name__}.{name}: {error}")  # without the value


def best_metric_is_measured(run: RunConfig, trainer: TrainerArgs) -> Iterator[Problem]:
    measured = measured_by(run)
    if trainer.best_metric is not None and trainer.best_metric not in measured:
        text = f"is not measured; choose one of {', '.join(measured)}, or add it to the metrics of the task"
        yield problem(trainer, "best_metric", text + did_you_mean(trainer.best_metric, measured))


def measured_by(run: RunConfig) -> list[str]:
    """Names of all metrics that a run reports, such as "NDCG@10", "HR@10/last_event", "AUC/task1" and "AUC/click"."""
    task = run.task_args
    if tasks := tasks_of(run):
        return [f"{metric}/{task.task_name}" for task in tasks for metric in task.metrics_in_force]
    count = task.num_tasks if isinstance(task, RankingArgs) else 1
    per_task = [name for name in task.eval_metrics if name in METRICS_PER_TASK and count > 1]
    at_last_event = [f"{name}/{AT_LAST_EVENT}" for name in task.eval_metrics if run.reads_request_time]
    return [*task.eval_metrics, *(f"{name}/task{i}" for name in per_task for i in range(count)), *at_last_event]


def best_metric_mode_fits_the_metric(run: RunConfig, trainer: TrainerArgs) -> Iterator[Problem]:
    if trainer.best_metric is None:
        return
    mode = "min" if trainer.best_metric.split("/")[0] in LOWER_IS_BETTER else "max"
    if trainer.best_metric_mode != mode:
        better = "lower" if mode == "min" else "higher"
        text = f"would keep the worst model: {cited(trainer, 'best_metric')} is better when {better}; use {mode!r}"
        yield problem(trainer, "best_metric_mode", text)


# --- batches -------------------------------------------------------------------------------------------------------


def token_limit_admits_the_longest_sequence(run: RunConfig, trainer: TrainerArgs) -> Iterator[Problem]:
    """The longest sequence according to the gin file. The store may add context and actions."""
    dataset = run.dataset
    if trainer.tokens_per_rank is not None and (items := length_of_items(run)) is not None:
        of_store = isinstance(dataset, DatasetArgs) and dataset.action_feature_name is None and run.task == "ranking"
        per_item = run.network.tokens_per_item(bool(dataset.action_feature_name) or of_store)
        tokens = items.max_sequence_length * per_item + len(dataset.contextual_feature_names or [])
        yield from token_limit_admits(run, tokens, cited(items, "max_sequence_length"))


def token_limit_admits(run: RunConfig, tokens: int, length: str) -> Iterator[Problem]:
    """``tokens``: length of the longest possible sequence. ``length``: citation of the option that limits it."""
    if run.trainer.tokens_per_rank is not None and run.trainer.tokens_per_rank < tokens:
        text = (
            f"is less than the longest possible sequence, which has {tokens} tokens; set it to at least {tokens}, or "
            f"lower {length}"
        )
        yield problem(run.trainer, "tokens_per_rank", text)


# --- ranks ---------------------------------------------------------------------------------------------------------


def heads_divide(run: RunConfig) -> Iterator[Problem]:
    if run.network.num_attention_heads % run.tensor_parallel.tensor_model_parallel_size:
        size = cited(run.tensor_parallel, "tensor_model_parallel_size")
        yield problem(run.network, "num_attention_heads", f"must be a multiple of {size}; change one of them")


def ranks_divide(run: RunDraft) -> Iterator[Problem]:
    if run.world_size % run.ranks_per_group:
        sizes = ((run.tensor_parallel, "tensor_model_parallel_size"), (run.context_parallel, "context_parallel_size"))
        *others, last = [(part, name) for part, name in sizes if getattr(part, name) > 1]
        times = "".join(f"times {cited(*other)} " for other in others)
        text = f"{times}must divide the number of ranks, which is {run.world_size}; change it, or --nproc-per-node"
        yield problem(*last, text)


# --- optimizers and schedule ---------------------------------------------------------------------------------------


def names_are_searched_by_expressions(run: RunConfig, part: PartOptimizerArgs) -> Iterator[Problem]:
    try:
        re.compile(part.regex)
    except (re.error, OverflowError, RecursionError) as error:
        yield problem(part, "regex", f"is not a Python regular expression: {error}; escape or close it")


def muon_has_whole_matrices(run: RunConfig, part: OptimizerArgs | PartOptimizerArgs) -> Iterator[Problem]:
    split = {"tensor_model_parallel_size": run.tensor_parallel, "sharding": run.data_parallel}
    for parameter, owner in split.items() if part.optimizer_str == "muon" else ():
        if getattr(owner, parameter) not in (1, "none"):
            text = f"needs whole matrices on each rank, but {cited(owner, parameter)}; remove it, or use 'adam'"
            yield problem(part, "optimizer_str", text)


def milestones_fit_the_schedule(run: RunConfig, schedule: LRScheduleArgs) -> Iterator[Problem]:
    if any(left >= right for left, right in pairwise(schedule.milestones)):
        yield problem(schedule, "milestones", "must increase; sort them and remove repetitions")
    if schedule.schedule == "step" and not schedule.milestones:
        yield problem(schedule, "schedule", "needs LRScheduleArgs.milestones; set it, for example to [1000, 2000]")


def warmup_and_decay_fit_into_the_run(run: RunConfig, schedule: LRScheduleArgs) -> Iterator[Problem]:
    if (schedule.warmup_ratio or 0) + (schedule.decay_ratio or 0) > 1 and schedule.schedule != "cosine_restarts":
        other = cited(schedule, "warmup_ratio")
        yield problem(schedule, "decay_ratio", f"and {other} together exceed 1, the whole run; lower one of them")
    if schedule.schedule == "warmup_stable_decay" and schedule.decay_iters is schedule.decay_ratio is None:
        text = "needs the length of the decay at the end of the run; set decay_ratio, for example to 0.2"
        yield problem(schedule, "schedule", text)


RULES = (urls_are_where_they_may_be, heads_divide, ranks_divide)
RULES_OF: RulesOf = {
    TrainerArgs: (
        profiled_iterations_are_a_range, save_interval_is_not_zero, best_metric_is_measured,
        best_metric_mode_fits_the_metric, token_limit_admits_the_longest_sequence,
    ),
    OptimizerArgs: (muon_has_whole_matrices,),
    PartOptimizerArgs: (names_are_searched_by_expressions, muon_has_whole_matrices),
    LRScheduleArgs: (milestones_fit_the_schedule, warmup_and_decay_fit_into_the_run),
}  # fmt: skip
