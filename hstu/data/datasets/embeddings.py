"""The embedding tables of a built-in dataset, which gin files need not spell out."""

from __future__ import annotations

from hstu.config.args import DynamicEmbeddingArgs, EmbeddingArgs, NetworkArgs
from hstu.data.datasets.spec import USER_FEATURE
from hstu.data.store.sequence_store import SequenceStore

_REPLICATED_TABLE_BYTES = 4 << 20
"""A larger predefined table (float32) is sharded: replicas cost an all-reduce of the whole table per step."""


def predefined_embeddings(
    store: SequenceStore, network: NetworkArgs, *, dynamic: bool = False
) -> tuple[EmbeddingArgs, ...]:
    """One table per feature of the store that is looked up, named after the feature, with a row per code.

    The tables of the items and the users, and any table above 4 MiB, are model_parallel; the others, which are small,
    are data_parallel. ``dynamic`` makes the tables of the items and the users dynamic; those of raw ids always are.
    """
    tables: list[EmbeddingArgs] = []
    widths = {"context": network.contextual_width, "item": network.item_width, "action": network.item_width}
    for name, feature in (store.features | store.time_features).items():
        if feature.cardinality is None:
            continue
        width = widths.get(feature.role, network.side_embedding_dim)
        is_main = feature.role == "item" or name == USER_FEATURE
        is_large = feature.cardinality * width * 4 > _REPLICATED_TABLE_BYTES
        names = {"feature_names": [name], "table_name": name, "item_vocab_size_or_capacity": feature.cardinality}
        if feature.raw or (is_main and dynamic):
            tables.append(DynamicEmbeddingArgs(**names))
        else:
            sharding_type = "model_parallel" if is_main or is_large else "data_parallel"
            tables.append(EmbeddingArgs(**names, sharding_type=sharding_type))
    return tuple(tables)
