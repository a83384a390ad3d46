"""Which features of the data a model reads, in which roles, and with which codes and tables."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from hstu.base.errors import ConfigError, DataError
from hstu.config.args import (
    BenchmarkDatasetArgs,
    DatasetArgs,
    DynamicEmbeddingArgs,
    EmbeddingArgs,
    NetworkArgs,
    NumericFeatureArgs,
    RankingTaskArgs,
)
from hstu.config.args.network import SIDE_WIDTH
from hstu.config.option import located
from hstu.config.problems import did_you_mean
from hstu.data.datasets.spec import USER_FEATURE
from hstu.data.features.values import label_columns
from hstu.data.store.layout import NUMBER_ROLES, TIME_FEATURES
from hstu.data.store.sequence_store import SequenceStore


@dataclass(frozen=True)
class FeatureRoles:
    """The features that a model reads, by role; contextual features in the order of their tokens."""

    item: str
    action: str | None
    contextual: tuple[str, ...]
    side: tuple[str, ...] = ()
    """Features of items and of events that are part of an item's tokens."""
    lists: tuple[str, ...] = ()
    """Features of ``side`` of which an item has several values."""
    known_after: tuple[str, ...] = ()
    """Features of ``side`` that are known only after the event, as is the action."""
    labels: tuple[str, ...] = field(default=(), kw_only=True)
    """Features of events, or the action, that RankingArgs.tasks read of labelled items as labels, bounds or weights."""
    numbers: tuple[str, ...] = ()
    """Features of ``side`` that are numbers or vectors, in the order of their columns in a batch."""
    number_widths: tuple[int, ...] = ()
    """Columns per feature of ``numbers``: 1, or the width of a vector."""
    tower: tuple[str, ...] = ()
    """Features of ``side`` that form the vectors of items (RetrievalArgs.item_tower)."""

    @property
    def names(self) -> tuple[str, ...]:
        """All features with ids, in the order of the keys of a batch."""
        return (*self.contextual, self.item, *([self.action] if self.action else []), *self.categories)

    @property
    def categories(self) -> tuple[str, ...]:
        """Features of ``side`` that have ids, and therefore tables."""
        return tuple(name for name in self.side if name not in self.numbers)

    @property
    def tower_lists(self) -> tuple[str, ...]:
        """Features of ``tower`` of which an item has several values, in the order of ``lists``."""
        return tuple(name for name in self.lists if name in self.tower)

    def width(self, feature: str, network: NetworkArgs) -> int:
        """Width of the table rows of a feature."""
        if feature in self.contextual:
            return network.contextual_width
        return SIDE_WIDTH if feature in self.side else network.item_width


def benchmark_roles(args: BenchmarkDatasetArgs) -> FeatureRoles:
    """The features of random data, by role."""
    return FeatureRoles(args.item_feature_name, args.action_feature_name, tuple(args.contextual_feature_names))


def resolve_roles(
    store: SequenceStore, args: DatasetArgs, tasks: Sequence[RankingTaskArgs] | None = None, item_tower: bool = False
) -> FeatureRoles:
    """The features that ``args`` and ``tasks`` name, or the store's. With ``item_tower``, features of items also form
    item vectors. Raises ConfigError, which lists the features that the store lacks."""
    side = tuple(args.side_feature_names)
    known = {name: store.features[name] for name in side if name in store.features}
    numbers = tuple(name for name, feature in known.items() if feature.role in NUMBER_ROLES)
    contextual, action = args.contextual_feature_names, args.action_feature_name
    chosen = FeatureRoles(
        item=args.item_feature_name or store.item_feature,
        action=store.action_feature if action is None else action or None,
        contextual=store.contextual_features if contextual is None else tuple(contextual),
        side=side,
        lists=tuple(name for name, feature in known.items() if feature.is_list),
        known_after=tuple(args.known_after),
        tower=tuple(name for name in side if item_tower and name in store.item_side_features),
        labels=label_columns(tasks),
        numbers=numbers,
        number_widths=tuple(known[name].width for name in numbers),
    )
    problems = [*_missing_features(store, args, tasks or (), chosen)]
    seen = [name for name in side if name in store.running_statistics and name not in args.known_after]
    if seen and args.has_candidates and args.candidates != "requests":
        text = f"{seen[0]!r} counts all earlier events, so of these candidates each would show the actions on others"
        problems.append(located(args, "side_feature_names", f"{text}; set DatasetArgs.max_num_candidates = 0"))
    if item_tower and not chosen.tower and not problems:
        allowed = store.item_side_features
        text = "has no feature of items, from which RetrievalArgs.item_tower = True makes their vectors; "
        text += f"{store} has {', '.join(allowed)}" if allowed else f"{store} has none; set it to False"
        problems.append(located(args, "side_feature_names", text))
    ConfigError.raise_if(problems)
    return chosen


def _missing_features(
    store: SequenceStore, args: DatasetArgs, tasks: Sequence[RankingTaskArgs], chosen: FeatureRoles
) -> Iterator[str]:
    """A problem for each name that the store has not in its role."""
    of_items = (*store.item_side_features, *store.item_number_features)
    stored = (*store.event_features, *store.event_number_features)
    of_events = (*stored, *store.time_features)
    actions, acted = ((name,) if name else () for name in (store.action_feature, chosen.action))
    named = (
        ("item", args, "item_feature_name", (chosen.item,), (store.item_feature,)),
        ("action", args, "action_feature_name", acted, actions),
        ("context", args, "contextual_feature_names", chosen.contextual, store.contextual_features),
        ("side", args, "side_feature_names", chosen.side, (*of_items, *of_events)),
        ("event", args, "known_after", [name for name in args.known_after if name in of_items], of_events),
        *(("label", task, "label", (task.label,), (*acted, *stored)) for task in tasks),
    )
    for role, owner, parameter, names, allowed in named:
        for name in names:
            if name not in allowed:
                text = f"{name!r} is no {role} feature of {store}; allowed: {', '.join(allowed) or 'none'}"
                if name in TIME_FEATURES and store.timestamp_feature is None:
                    text += ". It is computed from times, and the data has none: preprocess it again with --time"
                elif role == "side" and not of_items:
                    text += f". Data preprocessed without them has none. {store.remedy()}"
                yield located(owner, parameter, text + did_you_mean(name, allowed))


def check_numbers(roles: FeatureRoles, args: Iterable[NumericFeatureArgs]) -> None:
    """Raises ConfigError for transforms of features that are no numbers or that vectors lack."""
    widths = dict(zip(roles.numbers, roles.number_widths, strict=True))
    problems = []
    for each in args:
        for name in each.feature_names:
            if name not in widths:
                shown = ", ".join(roles.numbers) or "none"
                text = f"{name!r} is no number of the data (--numbers, --vectors of preprocessing); it has {shown}"
                problems.append(located(each, "feature_names", text + did_you_mean(name, widths)))
            elif widths[name] > 1 and each.transform not in ("standardize", "none"):
                text = f"is for numbers, and {name!r} is a vector; use 'standardize' or 'none'"
                problems.append(located(each, "transform", text))
    ConfigError.raise_if(problems)


def recoding_of(theirs: SequenceStore, ours: SequenceStore, roles: FeatureRoles) -> dict[str, np.ndarray]:
    """Feature → codes in ``ours``, indexed by the codes in ``theirs``: each store numbers its own raw ids."""
    recoding, problems = {}, []
    for name in (*roles.names, *roles.numbers):
        mine, other = ours.feature(name), (theirs.features | theirs.time_features).get(name)
        if other is None or (mine.role, mine.raw, mine.width) != (other.role, other.raw, other.width):
            problems.append(f"has no {name!r} like that of the training data; preprocess both with the same options")
        elif mine.has_vocab and not mine.raw:
            try:
                recoding[name] = ours.encode(name, theirs.raw_ids(name))
            except DataError as error:
                raise DataError(
                    f"DatasetArgs.eval_dataset_path: {theirs} has ids that the training data lacks. "
                    f"{error}. Preprocess the training data so that it has them, or leave the feature out"
                ) from error
        elif (other.cardinality or 0) > (mine.cardinality or 0) and not mine.raw:
            problems.append(
                f"has {name!r} up to {theirs.cardinality(name) - 1}, the training data below {mine.cardinality}"
            )
    ConfigError.raise_if([f"DatasetArgs.eval_dataset_path: {theirs} {problem}" for problem in problems])
    return recoding


_REPLICATED_TABLE_BYTES = 4 << 20
"""Larger predefined tables (float32) are sharded: replicas cost an all-reduce of the whole table per step."""


def predefined_embeddings(store: SequenceStore, network: NetworkArgs) -> tuple[EmbeddingArgs, ...]:
    """One table per feature of the store that is looked up, named after the feature, with a row per code. The tables of
    items and users, and tables above 4 MiB, are model_parallel; smaller tables are data_parallel. Tables
    of raw ids are dynamic."""
    tables: list[EmbeddingArgs] = []
    widths = {"context": network.contextual_width, "item": network.item_width, "action": network.item_width}
    for name, feature in (store.features | store.time_features).items():
        if feature.cardinality is None:
            continue
        width = widths.get(feature.role, SIDE_WIDTH)
        is_main = feature.role == "item" or name == USER_FEATURE
        is_large = feature.cardinality * width * 4 > _REPLICATED_TABLE_BYTES
        names = {"feature_names": [name], "table_name": name, "item_vocab_size_or_capacity": feature.cardinality}
        if feature.raw:
            tables.append(DynamicEmbeddingArgs(**names))
        else:
            sharding_type = "model_parallel" if is_main or is_large else "data_parallel"
            tables.append(EmbeddingArgs(**names, sharding_type=sharding_type))
    return tuple(tables)
