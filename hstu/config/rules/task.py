"""Rules about ranking and its tasks, retrieval, the dataset, its split and its candidates."""
# ruff: noqa: D103

import re
from collections.abc import Iterator

from hstu.config.args import (
    BenchmarkDatasetArgs,
    DatasetArgs,
    NetworkArgs,
    NumericFeatureArgs,
    RankingArgs,
    RankingTaskArgs,
    RetrievalArgs,
)
from hstu.config.args.dataset import SPLITS
from hstu.config.args.task import LOSSES, METRICS_OF_KIND, fits_kind
from hstu.config.option import cited, is_given, problem
from hstu.config.problems import Problem, literal
from hstu.config.rules.data import RulesOf, each_once, length_of_items, names_in, unknown_names
from hstu.config.run_config import RunConfig

# --- dataset -------------------------------------------------------------------------------------------------------


def features_have_one_role(run: RunConfig) -> Iterator[Problem]:
    """Each feature is named once. Only features of known_after are also side features."""
    owners: dict[str, str] = {}
    roles = ("item_feature_name", "action_feature_name", "contextual_feature_names", "side_feature_names")
    for parameter in roles:
        for name in filter(None, names_in(run.dataset, parameter)):
            if name in owners:
                text = f"{name!r} has a role in {cited(run.dataset, owners[name])}, too; remove one of them"
                yield problem(run.dataset, parameter, text)
            owners[name] = parameter


def numbers_are_described_once(run: RunConfig) -> Iterator[Problem]:
    yield from each_once(run.numbers, "feature_names")


def are_side_features(run: RunConfig, part: DatasetArgs | NumericFeatureArgs) -> Iterator[Problem]:
    """Numbers, and what is known after the event, are among the side features."""
    parameter = "known_after" if isinstance(part, DatasetArgs) else "feature_names"
    if isinstance(dataset := run.dataset, BenchmarkDatasetArgs):
        yield problem(part, parameter, "has no effect on random data, which has no numbers; remove it")
    else:
        text = f"is not one of {cited(dataset, 'side_feature_names')}; add it there, too"
        yield from unknown_names(part, parameter, dataset.side_feature_names, text)


def candidates_leave_history(run: RunConfig) -> Iterator[Problem]:
    items = length_of_items(run)
    if items is not None and run.dataset.max_num_candidates >= items.max_sequence_length:
        text = f"leaves no room for history: must be below {cited(items, 'max_sequence_length')}"
        yield problem(run.dataset, "max_num_candidates", text)


def windows_leave_no_gap(run: RunConfig, dataset: DatasetArgs) -> Iterator[Problem]:
    if isinstance(dataset.window_stride, int) and dataset.window_stride > dataset.max_sequence_length:
        text = f"leaves out items between the windows: must be at most {cited(dataset, 'max_sequence_length')}"
        yield problem(dataset, "window_stride", text)


def split_fits_the_task(run: RunConfig, dataset: DatasetArgs) -> Iterator[Problem]:
    if dataset.split not in ("auto", *SPLITS[run.task]):
        yield problem(dataset, "split", f"is not for {run.task}; use {_any_of(('auto', *SPLITS[run.task]))}")


def a_fraction_cuts_time_or_users(run: RunConfig, dataset: DatasetArgs) -> Iterator[Problem]:
    cuts = dataset.split != "none" and (run.task == "ranking" or dataset.split == "time")
    if is_given(dataset, "train_fraction") and not cuts:
        held_out = "nothing" if dataset.split == "none" else "each user's last items"
        text = f"has no effect with {cited(dataset, 'split')} in {run.task}, which holds out {held_out}"
        yield problem(dataset, "train_fraction", f'{text}; remove it, or set split to "time"', is_warning=True)


def what_is_evaluated_is_held_out(run: RunConfig, dataset: DatasetArgs) -> Iterator[Problem]:
    if dataset.split == "none" and not dataset.eval_dataset_path:
        for parameter in ("best_metric", "eval_at_start"):
            if getattr(run.trainer, parameter):
                other = ", or set DatasetArgs.eval_dataset_path" if run.task == "ranking" else ""
                text = f"needs an evaluation, but {cited(dataset, 'split')} holds nothing out; remove it{other}"
                yield problem(run.trainer, parameter, text)


# --- ranking -------------------------------------------------------------------------------------------------------


def users_are_left_for_the_test(run: RunConfig, dataset: DatasetArgs) -> Iterator[Problem]:
    if dataset.train_fraction + dataset.valid_fraction >= 1:
        text = f"leaves no users for the test beside {cited(dataset, 'train_fraction')}; their sum must be below 1"
        yield problem(dataset, "valid_fraction", text)


def head_fits_the_tasks(run: RunConfig, ranking: RankingArgs) -> Iterator[Problem]:
    if ranking.tasks is None:
        last = ranking.prediction_head_arch[-1]
        if ranking.num_tasks not in (1, last):
            text = (
                f"ends in {last}, but must end in {cited(ranking, 'num_tasks')}, one sigmoid per task; change one "
                f"of them, or set num_tasks = 1 for one task of {last} classes"
            )
            yield problem(ranking, "prediction_head_arch", text)


def metrics_fit_the_head(run: RunConfig, ranking: RankingArgs | RetrievalArgs) -> Iterator[Problem]:
    if isinstance(ranking, RankingArgs) and ranking.tasks is None:
        for metric in ranking.eval_metrics:
            if metric.startswith("AUC>=") and (ranking.num_tasks > 1 or ranking.prediction_head_arch[-1] == 1):
                text = (
                    f"{metric} needs one task of several classes (star ratings), but {cited(ranking, 'num_tasks')} "
                    f"and {cited(ranking, 'prediction_head_arch')}; set num_tasks = 1 and a last width above 1, or "
                    f"use AUC"
                )
                yield problem(ranking, "eval_metrics", text)


def labels_are_not_inputs(run: RunConfig) -> Iterator[Problem]:
    if run.task == "ranking" and not run.network.interleave_actions and not run.dataset.has_candidates:
        text = (
            f"with {cited(run.dataset, 'max_num_candidates')} would show each item its own label as an input; set "
            "max_num_candidates above 0, or interleave_actions = True"
        )
        yield problem(run.network, "interleave_actions", text)


def ranking_has_actions(run: RunConfig) -> Iterator[Problem]:
    if run.task == "ranking":
        missing = None if isinstance(run.dataset, BenchmarkDatasetArgs) else ""  # None: the action of the store
        if run.dataset.action_feature_name == missing:
            text = "ranking learns from actions; set it to the name of the action feature"
            yield problem(run.dataset, "action_feature_name", text)


# --- retrieval -----------------------------------------------------------------------------------------------------


def retrieval_has_a_next_item(run: RunConfig, dataset: DatasetArgs) -> Iterator[Problem]:
    if run.task == "retrieval" and dataset.max_sequence_length < 2:
        yield problem(dataset, "max_sequence_length", "must be at least 2 for retrieval: an item and the next one")


def number_of_negatives_fits_their_kind(run: RunConfig, retrieval: RetrievalArgs) -> Iterator[Problem]:
    kind = cited(retrieval, "negatives")
    if retrieval.negatives in ("uniform", "mixed") and retrieval.num_negatives <= 0:
        yield problem(retrieval, "num_negatives", f"must be above 0 with {kind}, for example 128")
    if retrieval.negatives == "full" and retrieval.num_negatives > 0:
        yield problem(retrieval, "num_negatives", f"must be -1 with {kind}, which takes the whole corpus")


def item_towers_have_features(run: RunConfig, dataset: DatasetArgs) -> Iterator[Problem]:
    if run.has_item_tower and set(dataset.side_feature_names) <= set(dataset.known_after):
        text = "makes the vectors of items from their features; name some in DatasetArgs.side_feature_names"
        yield problem(run.task_args, "item_tower", text)


# --- positions and masks -------------------------------------------------------------------------------------------


def position_encodings_combine(run: RunConfig) -> Iterator[Problem]:
    kinds = run.network.position_encoding
    if len(set(kinds)) < len(kinds) or ("none" in kinds and len(kinds) > 1):
        text = 'is contradictory; use one of "absolute", "relative_bias" and "none", or ("absolute", "relative_bias")'
        yield problem(run.network, "position_encoding", text)


def spans_fit_the_layers(run: RunConfig, network: NetworkArgs) -> Iterator[Problem]:
    spans = network.max_attention_span
    if isinstance(spans, tuple) and len(spans) != network.num_layers:
        text = f"has {len(spans)} spans, but must have one per layer: {cited(network, 'num_layers')}"
        yield problem(network, "max_attention_span", f"{text}; write one number for all layers, or as many")


def factors_have_classes(run: RunConfig, network: NetworkArgs) -> Iterator[Problem]:
    args = run.task_args
    if network.num_factors and not (isinstance(args, RankingArgs) and args.num_classes):
        text = (
            "is of the classes of an action, and this model predicts none: it needs ranking without tasks, and a last "
            "width of RankingArgs.prediction_head_arch that is the number of classes; remove it"
        )
        yield problem(network, "num_factors", text)


def truncation_leaves_layers(run: RunConfig, network: NetworkArgs) -> Iterator[Problem]:
    if network.truncate_after_layer is not None and network.truncate_after_layer >= network.num_layers:
        text = f"must be below {cited(network, 'num_layers')}, or no layer follows; change it or remove it"
        yield problem(network, "truncate_after_layer", text)


def masks_hide_the_labels(run: RunConfig) -> Iterator[Problem]:
    yield from label_leak(run, has_context=bool(run.dataset.contextual_feature_names))  # None: only the data shows it


def label_leak(run: RunConfig, has_context: bool) -> Iterator[Problem]:
    """Reports attention masks that show the model its own labels. ``has_context``: sequences have contextual tokens.

    Candidates hide their labels, unless the actions of candidates shown at one time are tokens. Without candidates
    every item is labelled, so an item that sees later items sees its own label.
    """
    network, dataset = run.network, run.dataset
    if dataset.has_candidates:
        is_request = isinstance(dataset, DatasetArgs) and dataset.candidates == "requests"
        if is_request and network.interleave_actions and network.target_group_size > 1:
            text = (
                "a candidate sees the actions, which are labels, of those before it in its group, although they were "
                "shown at the same time; set it to 1, or NetworkArgs.interleave_actions = False"
            )
            yield problem(network, "target_group_size", text)
        return
    label = "the next item, its target" if run.task == "retrieval" else "its own action, its label"
    remedy = "" if run.task == "retrieval" else ", or DatasetArgs.max_num_candidates above 0"
    if not network.is_causal:
        text = f"every item sees {label}: losses and metrics would look better than they are; set it to True{remedy}"
        yield problem(network, "is_causal", text)
    has_layers = getattr(network, "num_layers", 2) > 1  # a wrong num_layers is missing: assume 2
    if network.disable_contextual_mask is False and has_context and has_layers:
        text = (
            "contextual tokens see the whole history and items see them: from the second layer on, an item sees "
            f"{label}, and losses and metrics would look better than they are; remove this or set it to True{remedy}"
        )
        yield problem(network, "disable_contextual_mask", text)


# --- RankingArgs.tasks ---------------------------------------------------------------------------------------------


def tasks_of(run: RunConfig) -> list[RankingTaskArgs]:
    """RankingArgs.tasks; empty if there are none."""
    return (run.task_args.tasks or []) if isinstance(run.task_args, RankingArgs) else []


def kinds_have_their_option(run: RunConfig, task: RankingTaskArgs) -> Iterator[Problem]:
    if task.kind == "class" and task.num_classes is None:
        yield problem(task, "kind", "needs RankingTaskArgs.num_classes; bind it under the scope of this task")


def a_condition_stands_alone(run: RunConfig, task: RankingTaskArgs) -> Iterator[Problem]:
    values = task.positive_values or []
    is_valid = task.positive_from is not None or task.bit_mask is not None
    if not is_valid and any(re.fullmatch(r"(>=|&) *-?[\d.]+", value) for value in values):
        text = "a condition stands alone: >= and a number, or & and a whole number from 1 to 9999999"
        yield problem(task, "positive_values", text)


def loss_fits_the_kind(run: RunConfig, task: RankingTaskArgs) -> Iterator[Problem]:
    if task.loss is not None and task.loss not in LOSSES[task.kind]:
        yield problem(task, "loss", f"is not for {cited(task, 'kind')}; use {_any_of(LOSSES[task.kind])}")


def metrics_fit_the_kind(run: RunConfig, task: RankingTaskArgs) -> Iterator[Problem]:
    for metric in task.metrics or ():
        if not fits_kind(metric, task.kind):
            text = f"{metric} is not for {cited(task, 'kind')}; use {_any_of(METRICS_OF_KIND[task.kind])}"
            yield problem(task, "metrics", text)


def candidates_are_compared(run: RunConfig, task: RankingTaskArgs) -> Iterator[Problem]:
    if run.dataset.has_candidates:
        return
    if any(metric.startswith("NDCG") for metric in task.metrics or ()):
        text = f"NDCG compares the candidates of a request, and {cited(run.dataset, 'max_num_candidates')}"
        yield problem(task, "metrics", f"{text}; set it above 1, or DatasetArgs.candidates to requests")


def labels_are_hidden(run: RunConfig, task: RankingTaskArgs) -> Iterator[Problem]:
    dataset = run.dataset
    if isinstance(dataset, DatasetArgs) and task.label in {*dataset.side_feature_names} - {*dataset.known_after}:
        text = (
            f"is one of {cited(dataset, 'side_feature_names')}, so the prediction would see its own label; add it "
            "to DatasetArgs.known_after"
        )
        yield problem(task, "label", text)


def tasks_have_different_names(run: RunConfig) -> Iterator[Problem]:
    seen: set[str] = set()
    for task in tasks_of(run):
        if task.task_name in seen:
            text = f"another task is called {task.task_name!r}, too, in metrics; give each task a name of its own"
            yield problem(task, "name" if task.name else "label", text)
        seen.add(task.task_name)


def _any_of(values: tuple[str, ...]) -> str:
    return " or ".join(map(literal, values))


RULES = (
    features_have_one_role, numbers_are_described_once, candidates_leave_history, labels_are_not_inputs,
    ranking_has_actions, position_encodings_combine, tasks_have_different_names, masks_hide_the_labels,
)  # fmt: skip
RULES_OF: RulesOf = {
    DatasetArgs: (
        are_side_features, windows_leave_no_gap, split_fits_the_task, a_fraction_cuts_time_or_users,
        what_is_evaluated_is_held_out, users_are_left_for_the_test, retrieval_has_a_next_item,
        item_towers_have_features,
    ),
    NumericFeatureArgs: (are_side_features,),
    NetworkArgs: (spans_fit_the_layers, truncation_leaves_layers, factors_have_classes),
    RankingArgs: (head_fits_the_tasks, metrics_fit_the_head),
    RankingTaskArgs: (
        kinds_have_their_option, a_condition_stands_alone, loss_fits_the_kind, metrics_fit_the_kind,
        candidates_are_compared, labels_are_hidden,
    ),
    RetrievalArgs: (number_of_negatives_fits_their_kind,),
}  # fmt: skip
