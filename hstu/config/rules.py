"""Every rule that needs more than one value, one function each.

A rule runs where the run has the classes of its signature (see rule_engine.py) and yields a problem for each
mistake: the parameter it is about, and what to do. A rule's name says what it demands.
"""
# ruff: noqa: D103

from __future__ import annotations

import re
from itertools import pairwise

from hstu.config import batch_rules, benchmark_rules, precision_rules, table_rules
from hstu.config.args import (
    BenchmarkDatasetArgs,
    DatasetArgs,
    LRScheduleArgs,
    NetworkArgs,
    OptimizerArgs,
    RankingArgs,
    RetrievalArgs,
    TensorModelParallelArgs,
    TrainerArgs,
)
from hstu.config.dataset_names import BUILT_IN_DATASETS, resolve_dataset_name
from hstu.config.problems import did_you_mean
from hstu.config.rule_engine import Problems, RuleBook, Run
from hstu.config.run_config import kind_of

rule = RuleBook(batch_rules.rule, benchmark_rules.rule, precision_rules.rule, table_rules.rule)
"""What makes a run impossible or a setting meaningless."""
advice = RuleBook(batch_rules.advice)
"""What is allowed but probably not meant."""

# --- training loop -------------------------------------------------------------------------------------------------


@rule
def one_length_of_training(run: Run, trainer: TrainerArgs) -> Problems:
    if trainer.max_train_iters is not None and trainer.num_train_epochs is not None:
        other = run.cite(trainer, "max_train_iters")
        yield run.problem(trainer, "num_train_epochs", f"exclusive with {other}; give one of them")


@rule
def profile_window(run: Run, trainer: TrainerArgs) -> Problems:
    if trainer.profile and trainer.profile_step_start >= trainer.profile_step_end:
        end = run.cite(trainer, "profile_step_end")
        yield run.problem(trainer, "profile_step_start", f"must be below {end}")


@rule
def save_interval(run: Run, trainer: TrainerArgs) -> Problems:
    if trainer.ckpt_save_interval == 0:
        yield run.problem(trainer, "ckpt_save_interval", "expected -1 (never) or at least 1")


@rule
def loading_in_part_needs_a_checkpoint_of_another_run(run: Run, trainer: TrainerArgs) -> Problems:
    if trainer.ckpt_load_dir not in ("", "auto"):
        return
    where = run.cite(trainer, "ckpt_load_dir")
    why = (
        f"has no effect with {where}"
        if not trainer.ckpt_load_dir
        else f"does not go with {where}, which is this run's own work"
    )
    if not trainer.ckpt_load_optimizer:
        yield run.problem(trainer, "ckpt_load_optimizer", f"{why}; name the checkpoint to start from, or remove it")
    if trainer.ckpt_param_map is not None:
        yield run.problem(trainer, "ckpt_param_map", f"{why}; name the checkpoint to start from, or remove it")


@rule
def best_metric_is_measured(run: Run, trainer: TrainerArgs, task: RankingArgs | RetrievalArgs) -> Problems:
    if trainer.best_metric is None:
        return
    tasks = getattr(task, "num_tasks", 1)  # retrieval has none
    by_task = [name for name in task.eval_metrics if name in ("AUC", "GAUC") and tasks > 1]
    measured = [*task.eval_metrics, *(f"{name}/task{index}" for name in by_task for index in range(tasks))]
    if trainer.best_metric not in measured:
        guess = did_you_mean(trainer.best_metric, measured)
        text = f"not measured{guess}; it must be one of {run.cite(task, 'eval_metrics')}"
        yield run.problem(trainer, "best_metric", text)


@rule
def best_metric_is_good_for_something(run: Run, trainer: TrainerArgs) -> Problems:
    if trainer.best_metric is not None and trainer.ckpt_save_interval < 1 and trainer.early_stop_patience is None:
        interval = run.cite(trainer, "ckpt_save_interval")
        text = f"has no effect: no checkpoint is kept with {interval}, and there is no early_stop_patience"
        yield run.problem(trainer, "best_metric", text)
    if trainer.early_stop_patience is not None and trainer.best_metric is None:
        text = "needs TrainerArgs.best_metric, whose evaluations it counts"
        yield run.problem(trainer, "early_stop_patience", text)


@rule
def losses_are_better_when_lower(run: Run, trainer: TrainerArgs) -> Problems:
    name = (trainer.best_metric or "").split("/")[0]
    if trainer.best_metric is not None and (name in ("LOGLOSS", "NE")) != (trainer.best_metric_mode == "min"):
        metric = run.cite(trainer, "best_metric")
        text = f"would keep the worst: {metric} is better when {'lower' if name in ('LOGLOSS', 'NE') else 'higher'}"
        yield run.problem(trainer, "best_metric_mode", text)


# --- parallelism ---------------------------------------------------------------------------------------------------


@rule
def heads_divide_over_ranks(run: Run, network: NetworkArgs, tensor: TensorModelParallelArgs) -> Problems:
    if network.num_attention_heads % tensor.tensor_model_parallel_size:
        size = run.cite(tensor, "tensor_model_parallel_size")
        yield run.problem(network, "num_attention_heads", f"must be a multiple of {size}")


@rule
def ranks_divide_into_groups(run: Run, tensor: TensorModelParallelArgs) -> Problems:
    if run.world_size % tensor.tensor_model_parallel_size:
        text = f"must divide the number of ranks, which is {run.world_size} (torchrun --nproc-per-node)"
        yield run.problem(tensor, "tensor_model_parallel_size", text)


@rule
def tokens_are_split_over_a_group(run: Run, network: NetworkArgs, tensor: TensorModelParallelArgs) -> Problems:
    if network.sequence_parallel and tensor.tensor_model_parallel_size == 1:
        size = run.cite(tensor, "tensor_model_parallel_size")
        text = f"splits tokens over the ranks of a tensor-parallel group and has no effect with {size}; remove it"
        yield run.problem(network, "sequence_parallel", text)


# --- optimizer and schedule ----------------------------------------------------------------------------------------


@rule
def momentum_is_for_sgd(run: Run, optimizer: OptimizerArgs) -> Problems:
    others = [*optimizer.part_optimizers, *(t for t in run.tables if t.sharding_type == "data_parallel")]
    kinds = {optimizer.optimizer_str, *(getattr(other, "optimizer_str", None) for other in others)}
    if optimizer.momentum > 0 and "sgd" not in kinds:
        text = f"is for sgd and has no effect with {run.cite(optimizer, 'optimizer_str')}; remove it"
        yield run.problem(optimizer, "momentum", text)


@rule
def parts_have_regular_expressions(run: Run, optimizer: OptimizerArgs) -> Problems:
    for part in optimizer.part_optimizers:
        try:
            re.compile(getattr(part, "regex", ""))
        except (re.error, OverflowError, RecursionError) as error:
            yield run.problem(part, "regex", f"not a regular expression: {error}")


@rule
def one_length_of_warmup(run: Run, schedule: LRScheduleArgs) -> Problems:
    if schedule.warmup_iters is not None and schedule.warmup_ratio is not None:
        other = run.cite(schedule, "warmup_iters")
        yield run.problem(schedule, "warmup_ratio", f"exclusive with {other}; give one of them")


@rule
def one_length_of_decay(run: Run, schedule: LRScheduleArgs) -> Problems:
    if schedule.decay_iters is not None and schedule.decay_ratio is not None:
        other = run.cite(schedule, "decay_iters")
        yield run.problem(schedule, "decay_ratio", f"exclusive with {other}; give one of them")


@rule
def warmup_and_decay_fit(run: Run, schedule: LRScheduleArgs) -> Problems:
    if (schedule.warmup_ratio or 0) + (schedule.decay_ratio or 0) > 1 and schedule.schedule != "cosine_restarts":
        other = run.cite(schedule, "warmup_ratio")
        yield run.problem(schedule, "decay_ratio", f"together with {other} this is more than the whole run")


@rule
def milestones_are_for_step(run: Run, schedule: LRScheduleArgs) -> Problems:
    if schedule.schedule == "step" and not schedule.milestones:
        yield run.problem(schedule, "schedule", "needs LRScheduleArgs.milestones, for example [1000, 2000]")
    if schedule.schedule != "step" and schedule.milestones:
        text = f"are for schedule 'step' and have no effect with {run.cite(schedule, 'schedule')}"
        yield run.problem(schedule, "milestones", text)
    if any(left >= right for left, right in pairwise(schedule.milestones)):
        yield run.problem(schedule, "milestones", "must increase")


# --- data ----------------------------------------------------------------------------------------------------------


@rule
def dataset_is_known_or_described(run: Run, dataset: DatasetArgs) -> Problems:
    if resolve_dataset_name(dataset.dataset_name) is None and not run.tables:
        guess = did_you_mean(dataset.dataset_name, BUILT_IN_DATASETS).removesuffix("?")
        text = (
            f"not a built-in dataset{guess}. Built in: "
            f"{', '.join(BUILT_IN_DATASETS)}. For your own data: make it with scripts/preprocess_dataset.py "
            f"--dataset_name {dataset.dataset_name} --interactions FILE --user COLUMN --item COLUMN, give "
            "DatasetArgs.dataset_path, and describe one table for each feature with EmbeddingArgs"
        )
        yield run.problem(dataset, "dataset_name", text)


@rule
def own_tables_are_described(run: Run, dataset: DatasetArgs) -> Problems:
    if dataset.dynamic_tables and resolve_dataset_name(dataset.dataset_name) is None:
        text = "is for built-in datasets; give the tables of your own data as DynamicEmbeddingArgs"
        yield run.problem(dataset, "dynamic_tables", text)


@rule
def own_features_have_tables(run: Run, dataset: DatasetArgs) -> Problems:
    if resolve_dataset_name(dataset.dataset_name) is not None or not run.tables:
        return
    known = run.table_features
    for parameter in ("item_feature_name", "action_feature_name", "contextual_feature_names"):
        value = getattr(dataset, parameter)
        for name in value if isinstance(value, list) else [value]:
            if name and name not in known:  # "" and None: none, the store's
                text = f"no EmbeddingArgs has the feature {name!r}{did_you_mean(name, known)}"
                yield run.problem(dataset, parameter, f"{text} (there are tables for {', '.join(known)})")


@rule
def features_have_one_role(run: Run, dataset: DatasetArgs | BenchmarkDatasetArgs) -> Problems:
    context = dataset.contextual_feature_names or []
    if len(set(context)) < len(context):
        yield run.problem(dataset, "contextual_feature_names", "names a feature twice")
    for parameter in ("item_feature_name", "action_feature_name"):
        if getattr(dataset, parameter) in context:
            text = f"also one of {run.cite(dataset, 'contextual_feature_names')}"
            yield run.problem(dataset, parameter, text)
    if dataset.item_feature_name and dataset.item_feature_name == dataset.action_feature_name:
        yield run.problem(dataset, "action_feature_name", "this is the item feature; an action is another feature")


@rule
def history_remains(run: Run, dataset: DatasetArgs) -> Problems:
    if dataset.max_num_candidates >= dataset.max_sequence_length:
        length = run.cite(dataset, "max_sequence_length")
        yield run.problem(dataset, "max_num_candidates", f"leaves no history: must be below {length}")


@rule
def splits_of_ranking(run: Run, dataset: DatasetArgs, ranking: RankingArgs) -> Problems:
    if dataset.split == "leave_one_out":
        yield run.problem(dataset, "split", "is for retrieval; ranking takes 'user_holdout' or 'time'")
    elif dataset.valid_items != 1:
        yield run.problem(dataset, "valid_items", "is for retrieval's leave_one_out and has no effect here; remove it")


@rule
def splits_of_retrieval(run: Run, dataset: DatasetArgs, retrieval: RetrievalArgs) -> Problems:
    if dataset.split in ("user_holdout", "time"):
        yield run.problem(dataset, "split", "is for ranking; retrieval takes 'leave_one_out'")
    elif dataset.train_fraction != 0.7:
        yield run.problem(dataset, "train_fraction", "has no effect with retrieval's leave_one_out split; remove it")
    if dataset.eval_dataset_path is not None:
        yield run.problem(dataset, "eval_dataset_path", "is for ranking; retrieval holds out each user's last items")


# --- ranking -------------------------------------------------------------------------------------------------------


@rule
def head_fits_the_tasks(run: Run, ranking: RankingArgs) -> Problems:
    last = ranking.prediction_head_arch[-1]
    if ranking.num_tasks not in (1, last):
        tasks = run.cite(ranking, "num_tasks")
        text = f"the last width must equal {tasks} (one sigmoid a task), or num_tasks must be 1 for {last} classes"
        yield run.problem(ranking, "prediction_head_arch", text)


@rule
def metrics_fit_the_head(run: Run, ranking: RankingArgs) -> Problems:
    multi_class = ranking.num_tasks == 1 and ranking.prediction_head_arch[-1] > 1
    for metric in ranking.eval_metrics:
        if metric.startswith("AUC>=") and not multi_class:
            text = (
                f"{metric} needs one task of several classes (star ratings): num_tasks = 1 and a last width above 1; "
                f"here {run.cite(ranking, 'num_tasks')}, {run.cite(ranking, 'prediction_head_arch')}"
            )
            yield run.problem(ranking, "eval_metrics", text)


@rule
def labels_are_not_inputs(
    run: Run, ranking: RankingArgs, network: NetworkArgs, dataset: DatasetArgs | BenchmarkDatasetArgs
) -> Problems:
    if not network.interleave_actions and dataset.max_num_candidates == 0:
        candidates = run.cite(dataset, "max_num_candidates")
        text = f"ranking with {candidates} would show each item its own label; set max_num_candidates above 0"
        yield run.problem(network, "interleave_actions", text)


@rule
def ranking_has_actions(run: Run, ranking: RankingArgs, dataset: DatasetArgs | BenchmarkDatasetArgs) -> Problems:
    absent = "" if kind_of(dataset) is DatasetArgs else None  # None: the store's
    if dataset.action_feature_name in (absent, ""):
        text = "ranking learns from actions: name the action feature"
        yield run.problem(dataset, "action_feature_name", text)


# --- retrieval -----------------------------------------------------------------------------------------------------


@rule
def retrieval_has_no_candidates(
    run: Run, retrieval: RetrievalArgs, dataset: DatasetArgs | BenchmarkDatasetArgs
) -> Problems:
    if dataset.max_num_candidates > 0:
        yield run.problem(
            dataset, "max_num_candidates", "is for ranking; retrieval scores the whole corpus: set it to 0"
        )


@rule
def retrieval_has_a_next_item(run: Run, retrieval: RetrievalArgs, dataset: DatasetArgs) -> Problems:
    if dataset.max_sequence_length < 2:
        yield run.problem(dataset, "max_sequence_length", "retrieval needs at least 2: an item and the next one")


@rule
def negatives_fit_their_number(run: Run, retrieval: RetrievalArgs) -> Problems:
    kind = run.cite(retrieval, "negatives")
    if retrieval.negatives == "uniform" and retrieval.num_negatives <= 0:
        yield run.problem(retrieval, "num_negatives", f"{kind} needs a number above 0, for example 128")
    if retrieval.negatives == "full" and retrieval.num_negatives > 0:
        yield run.problem(retrieval, "num_negatives", f"{kind} takes the whole corpus; set it to -1")
    if retrieval.shared_negatives and retrieval.negatives != "uniform":
        yield run.problem(retrieval, "shared_negatives", f"is for negatives = 'uniform', here {kind}")


# --- advice --------------------------------------------------------------------------------------------------------


@advice
def bidirectional_attention_sees_labels(
    run: Run, network: NetworkArgs, dataset: DatasetArgs | BenchmarkDatasetArgs
) -> Problems:
    if not network.is_causal and dataset.max_num_candidates == 0:
        what = "the next item, which is the target" if run.task == "retrieval" else "its own action, which is the label"
        text = f"every item sees {what}: training looks perfect and nothing is learnt"
        yield run.problem(network, "is_causal", text)
