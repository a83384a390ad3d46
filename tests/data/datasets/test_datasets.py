import pytest

from hstu.config.args import NetworkArgs
from hstu.data.datasets import DATASETS, resolve_name
from hstu.data.features.roles import predefined_embeddings
from hstu.data.store.sequence_store import SequenceStore


def test_the_registry_holds_every_built_in_dataset() -> None:
    kuairand = {"kuairand-pure", "kuairand-1k", "kuairand-27k"}
    assert set(DATASETS) == {"ml-100k", "ml-1m", "ml-20m", "amazon-books", "amazon-beauty", "amazon-toys"} | kuairand
    assert all(resolve_name(name) == name for name in DATASETS)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("ml-1m", "ml-1m"),
        ("movielens-1m", "ml-1m"),
        ("MovieLens_100K", "ml-100k"),
        ("KuaiRand-1K", "kuairand-1k"),
        ("kuairand_27k", "kuairand-27k"),
        ("MovieLens_20M", "ml-20m"),
        ("ML100K", "ml-100k"),
        ("KuaiRand-Pure", "kuairand-pure"),
        ("amzn_books", "amazon-books"),
        ("Amazon_Beauty", "amazon-beauty"),
        ("ml-2m", None),
        ("criteo", None),
        ("ml", None),
        ("", None),
    ],
)
def test_spellings_resolve_to_one_name(spelling: str, name: str | None) -> None:
    assert resolve_name(spelling) == name


def test_every_looked_up_feature_has_one_table_of_its_size(ml_100k_store: SequenceStore) -> None:
    network = NetworkArgs(num_layers=1, hidden_size=64, num_attention_heads=1, kv_channels=64)
    tables = {table.table_name: table for table in predefined_embeddings(ml_100k_store, network)}
    assert {name: (table.item_vocab_size_or_capacity, table.sharding_type) for name, table in tables.items()} == {
        "user_id": (943, "model_parallel"),
        "age_group": (7, "data_parallel"),
        "sex": (2, "data_parallel"),
        "occupation": (21, "data_parallel"),
        "zip_code": (795, "data_parallel"),
        "movie_id": (1682, "model_parallel"),
        "rating": (6, "data_parallel"),
        "year": (72, "data_parallel"),
        "genres": (19, "data_parallel"),
        "hour_of_day": (24, "data_parallel"),
        "day_of_week": (7, "data_parallel"),
        "time_gap": (41, "data_parallel"),
    }
    assert all(table.feature_names == [name] for name, table in tables.items())


def test_a_context_table_is_sharded_once_replicas_would_be_large(ml_100k_store: SequenceStore) -> None:
    wide = NetworkArgs(
        num_layers=1, hidden_size=64, num_attention_heads=1, kv_channels=64, contextual_embedding_dim=2048
    )
    sharding = {t.table_name: t.sharding_type for t in predefined_embeddings(ml_100k_store, wide)}
    assert sharding["zip_code"] == "model_parallel", "795 × 2048 × 4 bytes are more than 4 MiB"
    assert sharding["occupation"] == "data_parallel"
