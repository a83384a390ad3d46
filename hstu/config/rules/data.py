"""Rules about embedding tables in gin files, and about random benchmark data."""
# ruff: noqa: D103

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from hstu.config.args import (
    Args,
    BenchmarkDatasetArgs,
    DatasetArgs,
    DynamicEmbeddingArgs,
    EmbeddingArgs,
    FeatureArgs,
    RandomDistribution,
)
from hstu.config.args.optimizer import OF_MATRICES, ROWWISE
from hstu.config.option import cited, problem
from hstu.config.problems import Problem, did_you_mean
from hstu.config.run_config import RunConfig

RulesOf = Mapping[type[Args], tuple[Callable[..., Iterator[Problem]], ...]]
"""Argument class → rules on the run and each object of the class."""

# --- tables of the gin files ----------------------------------------------------------------------------------------


def names_of_tables_and_features_are_unique(run: RunConfig) -> Iterator[Problem]:
    yield from each_once(run.embeddings, "table_name")
    yield from each_once(run.embeddings, "feature_names")


def each_once(parts: Iterable[Args], parameter: str) -> Iterator[Problem]:
    """Reports names that occur twice in this parameter of the parts."""
    owners: dict[str, Args] = {}
    for part in parts:
        for name in names_in(part, parameter):
            if name in owners:
                text = f"{name!r} is given twice, also by {cited(owners[name], parameter)}; remove or rename one"
                yield problem(part, parameter, text)
            owners.setdefault(name, part)


def names_in(part: Args, parameter: str) -> list[str]:
    """The names that a parameter gives: one, a list or None. Empty if its value is wrong."""
    value = getattr(part, parameter, None)
    return [value] if isinstance(value, str) else value or []


def unknown_names(part: Args, parameter: str, known: Collection[str], text: str) -> Iterator[Problem]:
    """Reports names in this parameter of ``part`` that are not ``known``. ``text`` says so after the name."""
    for name in names_in(part, parameter):
        if name not in known:
            yield problem(part, parameter, f"{name!r} {text}{did_you_mean(name, known)}")


def rowwise_states_forbid_column_wise(run: RunConfig, table: EmbeddingArgs) -> Iterator[Problem]:
    if table.sharding == "column_wise" and _may_be_sharded(table):
        owner, parameter = _optimizer_of(run, table)
        if (optimizer := getattr(owner, parameter)) in ROWWISE:
            text = (
                f"cannot be combined with {cited(owner, parameter)}: each rank would keep its own state for its "
                "columns of a row, so that the result would depend on the number of ranks; use 'row_wise', "
                f"'table_wise' or 'auto', or the optimizer {ROWWISE[optimizer]!r}"
            )
            yield problem(table, "sharding", text)


def rowwise_adagrad_is_for_sharded_tables(run: RunConfig, table: EmbeddingArgs) -> Iterator[Problem]:
    if table.optimizer_str == "rowwise_adagrad" and table.sharding_type == "data_parallel":
        text = f"is for model_parallel tables, but {cited(table, 'sharding_type')}; use 'adagrad'"
        yield problem(table, "optimizer_str", text)


def dynamic_tables_choose_their_kernel(run: RunConfig, table: DynamicEmbeddingArgs) -> Iterator[Problem]:
    if table.compute_kernel is not None:
        text = "is not for dynamic tables, whose kernel follows from caching and their GPU memory; remove it"
        yield problem(table, "compute_kernel", text)
    if table.sharding not in ("auto", "row_wise"):
        yield problem(table, "sharding", "is not for dynamic tables, which are always row_wise; remove it")


def dense_kernel_has_adam(run: RunConfig, table: EmbeddingArgs) -> Iterator[Problem]:
    if table.compute_kernel == "dense" and _may_be_sharded(table):
        owner, parameter = _optimizer_of(run, table)
        optimizer = getattr(owner, parameter)
        if OF_MATRICES.get(optimizer, optimizer) not in ("adam", "adamw", "partial_rowwise_adam"):
            text = f"is for adam, adamw and partial_rowwise_adam, but {cited(owner, parameter)}; use 'fused'"
            yield problem(table, "compute_kernel", text)


def _may_be_sharded(table: EmbeddingArgs) -> bool:
    """Whether the table is model_parallel, or its sharding_type is missing because it is wrong."""
    return getattr(table, "sharding_type", "model_parallel") == "model_parallel"


def _optimizer_of(run: RunConfig, table: EmbeddingArgs) -> tuple[Args, str]:
    """(part, parameter) that set the optimizer of a model_parallel table."""
    if table.optimizer_str is not None:
        return table, "optimizer_str"
    by_default = run.optimizer.sparse_optimizer_str is None
    return run.optimizer, "optimizer_str" if by_default else "sparse_optimizer_str"


# --- random benchmark data -------------------------------------------------------------------------------------------


def length_of_items(run: RunConfig) -> DatasetArgs | FeatureArgs | None:
    """The part whose max_sequence_length limits the items; None if a benchmark lacks its item feature."""
    if isinstance(run.dataset, DatasetArgs):
        return run.dataset
    return _groups(run.dataset).get(run.dataset.item_feature_name)


def _groups(dataset: BenchmarkDatasetArgs) -> dict[str, FeatureArgs]:
    return {name: group for group in reversed(dataset.feature_args) for name in group.feature_names}


def features_are_described_once(run: RunConfig, dataset: BenchmarkDatasetArgs) -> Iterator[Problem]:
    yield from each_once(dataset.feature_args, "feature_names")


def roles_are_features(run: RunConfig, dataset: BenchmarkDatasetArgs) -> Iterator[Problem]:
    known = _groups(dataset)
    for parameter in ("item_feature_name", "action_feature_name", "contextual_feature_names"):
        yield from unknown_names(dataset, parameter, known, f"is in no FeatureArgs; choose one of {', '.join(known)}")


def features_have_tables(run: RunConfig, dataset: BenchmarkDatasetArgs) -> Iterator[Problem]:
    features, served = _groups(dataset), [name for table in dataset.embedding_args for name in table.feature_names]
    for group in dataset.feature_args:
        yield from unknown_names(group, "feature_names", served, "has no table; add EmbeddingArgs to embedding_args")
    for table in dataset.embedding_args:
        yield from unknown_names(table, "feature_names", features, "is in no FeatureArgs; add one, or remove it here")


def lengths_fit_the_roles(run: RunConfig, dataset: BenchmarkDatasetArgs) -> Iterator[Problem]:
    groups = _groups(dataset)
    for group in dataset.feature_args:
        if not set(group.feature_names) & set(dataset.contextual_feature_names):
            continue
        if group.is_jagged or group.max_sequence_length != 1:
            parameter = "is_jagged" if group.is_jagged else "max_sequence_length"
            text = "a feature of contextual_feature_names has one id; set max_sequence_length = 1 and is_jagged = False"
            yield problem(group, parameter, text)
    item, action = groups.get(dataset.item_feature_name), groups.get(dataset.action_feature_name or "")
    if item is None or action is None or item is action:
        return
    if item.is_jagged or action.is_jagged or item.max_sequence_length != action.max_sequence_length:
        text = f"must have the lengths of {dataset.item_feature_name!r}; put both into one FeatureArgs"
        yield problem(dataset, "action_feature_name", text)


def ids_have_one_distribution_each(run: RunConfig, group: FeatureArgs) -> Iterator[Problem]:
    if isinstance(group.value_dists, dict):
        text = f"is not one of {cited(group, 'feature_names')}; correct or remove it"
        yield from unknown_names(group, "value_dists", group.feature_names, text)
    elif group.value_dists is not None and len(group.value_dists) != len(group.feature_names):
        text = f"must have one distribution per feature of {cited(group, 'feature_names')}"
        yield problem(group, "value_dists", text)


def distributions_have_a_range(run: RunConfig, group: FeatureArgs) -> Iterator[Problem]:
    tables = {name: table for table in run.embeddings for name in table.feature_names}
    limited: list[tuple[RandomDistribution, Args, str]] = [
        (dist, tables[name], "item_vocab_size_or_capacity")
        for name, dist in group.distributions().items()
        if name in tables
    ]
    if group.seqlen_dist is not None and group.is_jagged:
        limited.append((group.seqlen_dist, group, "max_sequence_length"))
    for dist, owner, parameter in limited:
        owner, parameter = (owner, parameter) if dist.high is None else (dist, "high")
        if dist.low >= getattr(owner, parameter) + (owner is group):  # the longest length is allowed
            yield problem(dist, "low", f"must be below {cited(owner, parameter)}; lower it")
        if dist.dist_type == "lognormal" and dist.mean is not None and dist.mean <= 0:
            yield problem(dist, "mean", f"must be above 0 with {cited(dist, 'dist_type')}; raise it")


RULES = (names_of_tables_and_features_are_unique,)
RULES_OF: RulesOf = {
    EmbeddingArgs: (
        rowwise_states_forbid_column_wise, rowwise_adagrad_is_for_sharded_tables, dense_kernel_has_adam,
    ),
    DynamicEmbeddingArgs: (dynamic_tables_choose_their_kernel,),
    BenchmarkDatasetArgs: (
        features_are_described_once, roles_are_features, features_have_tables, lengths_fit_the_roles,
    ),
    FeatureArgs: (ids_have_one_distribution_each, distributions_have_a_range),
}  # fmt: skip
