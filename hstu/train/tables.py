"""Which embedding tables a run has: the predefined ones, those given by hand, and whether they fit the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hstu.config.args import DynamicEmbeddingArgs, EmbeddingArgs
from hstu.config.errors import ConfigError


def choose_tables(
    by_hand: Sequence[EmbeddingArgs], predefined: Sequence[EmbeddingArgs], features: Sequence[str]
) -> tuple[EmbeddingArgs, ...]:
    """One table for each of ``features``: the one given by hand or else the predefined one.

    Raises ConfigError for a feature without a table, for a table of a feature that the data does not have, and for
    two tables of one name.
    """
    problems = []
    for table in by_hand:
        unknown = [name for name in table.feature_names if name not in features]
        if unknown:
            problems.append(
                f"EmbeddingArgs of table {table.table_name!r}: the data has no feature "
                f"{', '.join(map(repr, unknown))}; it has {', '.join(features)}"
            )
    given = {name for table in by_hand for name in table.feature_names}
    tables = list(by_hand)
    for table in predefined:
        left = [name for name in table.feature_names if name in features and name not in given]
        if left:
            tables.append(replace(table, feature_names=left))
    names = [table.table_name for table in tables]
    problems += [
        f"two tables are called {name!r}: rename the one given by hand (EmbeddingArgs.table_name)"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    served = {name for table in tables for name in table.feature_names}
    for name in features:
        if name not in served:
            problems.append(f"feature {name!r} has no table: give an EmbeddingArgs with feature_names = [{name!r}]")
    if problems:
        raise ConfigError(problems)
    return tuple(tables)


def check_rows(tables: Sequence[EmbeddingArgs], cardinalities: Mapping[str, int]) -> None:
    """Raise ConfigError for a static table that cannot hold every id of its features; a dynamic one takes any.

    ``cardinalities``: ids of a feature lie in [0, cardinality).
    """
    problems = []
    for table in tables:
        rows = table.item_vocab_size_or_capacity
        for name in table.feature_names:
            ids = cardinalities[name]
            if ids > rows and not isinstance(table, DynamicEmbeddingArgs):
                problems.append(
                    f"EmbeddingArgs of table {table.table_name!r}: item_vocab_size_or_capacity = {rows}, but feature "
                    f"{name!r} has {ids} ids; it must be at least {ids}, or the table a DynamicEmbeddingArgs"
                )
    if problems:
        raise ConfigError(problems)


def is_dynamic(tables: Sequence[EmbeddingArgs], feature: str) -> bool:
    """Whether the table of ``feature`` is dynamic, so that there are ids without a row."""
    return any(isinstance(table, DynamicEmbeddingArgs) and feature in table.feature_names for table in tables)
