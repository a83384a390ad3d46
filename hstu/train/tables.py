"""Assigns embedding tables to features, and checks that they have a row for each id."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from hstu.base.errors import ConfigError
from hstu.config.args import DatasetArgs, DynamicEmbeddingArgs, EmbeddingArgs, NetworkArgs
from hstu.config.option import located
from hstu.config.problems import did_you_mean
from hstu.data.datasets import resolve_name
from hstu.data.features.roles import predefined_embeddings
from hstu.data.store.sequence_store import SequenceStore


def predefined_tables(args: DatasetArgs, store: SequenceStore, network: NetworkArgs) -> tuple[EmbeddingArgs, ...]:
    """Tables that gin files may omit: all tables of a built-in dataset; for other data, tables of time features."""
    tables = predefined_embeddings(store, network)
    if resolve_name(args.dataset_name) is None:
        return tuple(table for table in tables if table.table_name in store.time_features)
    return tables


def choose_tables(
    by_hand: Sequence[EmbeddingArgs],
    predefined: Sequence[EmbeddingArgs],
    features: Sequence[str],
    numbers: Collection[str] = (),
) -> tuple[EmbeddingArgs, ...]:
    """One table for each of ``features``: the configured or else the predefined one. Raises ConfigError without
    one, for unknown features and for repeated table names."""
    problems = []
    for table in by_hand:
        unknown = [name for name in table.feature_names if name not in features]
        if without := [name for name in unknown if name in numbers]:
            text = (
                f"{without[0]!r} is a number or a vector, which has no table; remove it here (see NumericFeatureArgs)"
            )
            problems.append(located(table, "feature_names", text))
        elif unknown:
            text = f"the data has no feature {', '.join(map(repr, unknown))}; it has {', '.join(features)}"
            problems.append(located(table, "feature_names", text + did_you_mean(unknown[0], features)))
    given = {name for table in by_hand for name in table.feature_names}
    tables = list(by_hand)
    for table in predefined:
        left = [name for name in table.feature_names if name in features and name not in given]
        if left:
            tables.append(replace(table, feature_names=left))
    called = Counter(table.table_name for table in tables)
    twice = "two tables are called {!r}: rename the one given by hand (EmbeddingArgs.table_name)"
    problems += [twice.format(name) for name, count in called.items() if count > 1]
    served = {name for table in tables for name in table.feature_names}
    missing = "feature {0!r} has no table: give an EmbeddingArgs with feature_names = [{0!r}]"
    problems += [missing.format(name) for name in features if name not in served]
    ConfigError.raise_if(problems)
    return tuple(tables)


def with_room(tables: Sequence[EmbeddingArgs], cardinalities: Mapping[str, int]) -> tuple[EmbeddingArgs, ...]:
    """Enlarge static tables to a row for each id of their features and at least one more."""

    def rows(table: EmbeddingArgs) -> int:
        ids = max(cardinalities[name] for name in table.feature_names)
        return max(table.item_vocab_size_or_capacity, ids + 1)

    return tuple(
        table if isinstance(table, DynamicEmbeddingArgs) else replace(table, item_vocab_size_or_capacity=rows(table))
        for table in tables
    )


def check_new_items(tables: Sequence[EmbeddingArgs], item: str) -> None:
    """Raise ConfigError if new items would start as vectors of zeros, which have no direction to be compared by."""
    for table in tables:
        if item in table.feature_names and getattr(table, "initializer", None) == "zeros":
            text = (
                f"the vectors of new items of {table.table_name!r} would be zeros, which retrieval cannot compare: set "
                "RetrievalArgs.item_tower = True, which adds their features, or choose 'normal' or 'uniform'"
            )
            raise ConfigError([located(table, "initializer", text)])


def check_rows(tables: Sequence[EmbeddingArgs], cardinalities: Mapping[str, int], raw: Collection[str] = ()) -> None:
    """Raise ConfigError for a static table without a row for every id of its features. Dynamic tables accept any id.

    ``cardinalities``: ids of a feature are in [0, cardinality), except the ``raw`` features, whose ids are any int64.
    """
    problems = []
    for table in (table for table in tables if not isinstance(table, DynamicEmbeddingArgs)):
        for name in table.feature_names:
            ids = cardinalities[name]
            if name in raw:
                text = (
                    f"the data keeps raw ids of {name!r}, which can be any number; make the table "
                    f"{table.table_name!r} a DynamicEmbeddingArgs, or preprocess the data without --raw_ids"
                )
                problems.append(located(table, "feature_names", text))
            elif ids > table.item_vocab_size_or_capacity:
                text = (
                    f"feature {name!r} of table {table.table_name!r} has {ids} ids; it must be at least {ids}, or the "
                    "table a DynamicEmbeddingArgs"
                )
                problems.append(located(table, "item_vocab_size_or_capacity", text))
    ConfigError.raise_if(problems)
