"""The rules of rules.py that are about random benchmark data."""
# ruff: noqa: D103

from __future__ import annotations

from typing import Any

from hstu.config.args import BenchmarkDatasetArgs
from hstu.config.problems import did_you_mean
from hstu.config.rule_engine import Problems, RuleBook, Run, each_once

rule = RuleBook()
"""Part of the book of rules.py."""


def _groups(dataset: BenchmarkDatasetArgs) -> dict[str, Any]:
    """Feature → its FeatureArgs, the first one."""
    return {name: group for group in reversed(dataset.feature_args) for name in group.feature_names}


@rule
def benchmark_features_are_described_once(run: Run, dataset: BenchmarkDatasetArgs) -> Problems:
    yield from each_once(run, [(group, group.feature_names) for group in dataset.feature_args], "feature_names")


@rule
def benchmark_roles_are_features(run: Run, dataset: BenchmarkDatasetArgs) -> Problems:
    known = _groups(dataset)
    for parameter in ("item_feature_name", "action_feature_name", "contextual_feature_names"):
        value = getattr(dataset, parameter)
        for name in value if isinstance(value, list) else [value]:
            if name and name not in known:
                text = f"no FeatureArgs has the feature {name!r}{did_you_mean(name, known)}"
                yield run.problem(dataset, parameter, f"{text} (there are {', '.join(known)})")


@rule
def benchmark_features_have_roles(run: Run, dataset: BenchmarkDatasetArgs) -> Problems:
    roles = {dataset.item_feature_name, dataset.action_feature_name, *dataset.contextual_feature_names}
    groups = _groups(dataset)
    if any(role and role not in groups for role in roles):  # reported: this may be the misspelt one
        return
    for name, group in groups.items():
        if name not in roles:
            text = f"{name!r} is not used: make it the item, the action or a contextual feature, or remove it"
            yield run.problem(group, "feature_names", text)


@rule
def benchmark_features_have_tables(run: Run, dataset: BenchmarkDatasetArgs) -> Problems:
    features, with_table = _groups(dataset), run.table_features
    for name, group in features.items():
        if name not in with_table:
            text = f"{name!r} has no table{did_you_mean(name, with_table)}; add EmbeddingArgs for it to embedding_args"
            yield run.problem(group, "feature_names", text)
    for table in run.tables:
        for name in table.feature_names:
            if name not in features:
                text = f"no FeatureArgs has the feature {name!r}{did_you_mean(name, features)}"
                yield run.problem(table, "feature_names", text)


@rule
def benchmark_context_is_one_token_a_feature(run: Run, dataset: BenchmarkDatasetArgs) -> Problems:
    groups = _groups(dataset)
    for group in {
        id(groups[name]): groups[name] for name in dataset.contextual_feature_names if name in groups
    }.values():
        if group.is_jagged or group.max_sequence_length != 1:
            parameter = "is_jagged" if group.is_jagged else "max_sequence_length"
            yield run.problem(group, parameter, "a contextual feature has one id: max_sequence_length = 1, not jagged")


@rule
def benchmark_items_and_actions_are_equally_long(run: Run, dataset: BenchmarkDatasetArgs) -> Problems:
    groups = _groups(dataset)
    item, action = groups.get(dataset.item_feature_name), groups.get(dataset.action_feature_name or "")
    if item is None or action is None or item is action:
        return
    if item.is_jagged or action.is_jagged or item.max_sequence_length != action.max_sequence_length:
        text = f"must have the lengths of {dataset.item_feature_name!r}: put both into one FeatureArgs"
        yield run.problem(dataset, "action_feature_name", text)


@rule
def benchmark_history_remains(run: Run, dataset: BenchmarkDatasetArgs) -> Problems:
    item = _groups(dataset).get(dataset.item_feature_name)
    if item is not None and dataset.max_num_candidates >= item.max_sequence_length:
        length = run.cite(item, "max_sequence_length")
        yield run.problem(dataset, "max_num_candidates", f"leaves no history: must be below {length}")


@rule
def benchmark_ids_have_one_distribution_each(run: Run, dataset: BenchmarkDatasetArgs) -> Problems:
    for group in dataset.feature_args:
        if group.value_dists is not None and len(group.value_dists) != len(group.feature_names):
            text = f"expected one distribution for each of {run.cite(group, 'feature_names')}"
            yield run.problem(group, "value_dists", text)
        if group.seqlen_dist is not None and not group.is_jagged:
            text = "has no effect where all sequences are equally long; set FeatureArgs.is_jagged = True"
            yield run.problem(group, "seqlen_dist", text)


@rule
def distributions_have_a_range(run: Run, dataset: BenchmarkDatasetArgs) -> Problems:
    for group in dataset.feature_args:
        for dist in filter(None, [group.seqlen_dist, *(group.value_dists or [])]):
            if dist.high is not None and dist.low >= dist.high:
                yield run.problem(dist, "low", f"must be below {run.cite(dist, 'high')}")
