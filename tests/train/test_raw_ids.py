"""Ids that no vocabulary holds, in whole runs: random ids in a range of 10^12, and stores that keep raw ids."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu import api
from hstu.base.errors import ConfigError, DataError
from hstu.config.args import (
    BenchmarkDatasetArgs,
    DatasetArgs,
    DynamicEmbeddingArgs,
    FeatureArgs,
    RandomDistribution,
)
from hstu.config.run_config import RunConfig
from hstu.data.sampling.sampler import SamplerPosition
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.dynamic.slots import Policy
from hstu.parallel.mesh import Mesh
from hstu.parallel.tables import dynamic_tables
from hstu.train.sources import open_source
from tests.conftest import write_small_store
from tests.parallel.dynamic.test_slots import DictionaryTable
from tests.train.tiny import ITEMS, FinishedRun, Train, run, run_config, tables_with_dynamic, tiny_config, walks

MANY, ROWS, STEPS = 10**12, 2_500, 100


def zipf_config(output: Path, policy: Policy, **task_args: Any) -> RunConfig:
    """Retrieval on random sequences of items, whose ids follow Zipf's law on [0, 10^12)."""
    values = RandomDistribution(dist_type="zipf", alpha=1.05, high=1e12)  # type: ignore[arg-type]
    features = FeatureArgs(feature_names=["item"], max_sequence_length=40, is_jagged=True, value_dists=[values])
    table = DynamicEmbeddingArgs(
        feature_names=["item"], table_name="item_table", item_vocab_size_or_capacity=ROWS, evict_strategy=policy
    )
    dataset = BenchmarkDatasetArgs(
        feature_args=[features],
        embedding_args=[table],
        item_feature_name="item",
        contextual_feature_names=[],
        num_generated_batches=STEPS,
    )
    trainer = {"train_batch_size": 16, "max_train_iters": STEPS, "log_interval": 10, "eval_at_end": True}
    options: Any = {"trainer": trainer, "network": {"num_layers": 1}}
    task_args = {"filter_seen": False, "eval_metrics": ("HR@1000",), **task_args}
    return run_config("retrieval", dataset, (), output, task_args=task_args, **options)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_a_run_over_more_ids_than_rows_counts_what_a_dictionary_counts(
    mesh: Mesh, tmp_path: Path, policy: Policy
) -> None:
    config = zipf_config(tmp_path, policy)
    finished = run(config, mesh)
    logged = [record["tables"]["item_table"] for record in finished.records if record["kind"] == "train"]

    model, seen = DictionaryTable(ROWS, policy), set[int]()
    counted = [dict.fromkeys(("lookups", "hits", "insertions", "evictions", "rejections"), 0) for _ in logged]
    batches = open_source(config, mesh).train_batches(SamplerPosition())
    for step in range(STEPS):
        ids = next(batches).features["item"].values().tolist()
        counts, hits = counted[step // 10], sum(id_ in model.held for id_ in ids)
        result = model.assign(ids, step + 1)
        counts["lookups"] += len(ids)
        counts["hits"] += hits
        counts["insertions"] += len(result["placed"])
        counts["evictions"] += len(result["evicted"])
        rejected = set(result["rejected"])
        counts["rejections"] += sum(id_ in rejected for id_ in ids)
        seen |= set(ids)
    for report, counts in zip(logged, counted, strict=True):
        assert report["hit_rate"] == counts["hits"] / counts["lookups"]
        assert {name: report[name] for name in counts if name != "hits"} == {
            name: count for name, count in counts.items() if name != "hits"
        }
    assert len(seen) > 3 * ROWS and max(seen) > 10**11
    assert sum(counts["evictions"] for counts in counted) > ROWS
    assert 0.1 < logged[-1]["hit_rate"] < 0.9

    held = dynamic_tables(finished.trainer.state.model)["item_table"].slots.content()[0]
    assert set(held.tolist()) == model.held.keys()
    assert 0 < finished.metrics["HR@1000"] < logged[-1]["hit_rate"] + 0.1, "only ids in the table are ranked"


def test_negatives_are_not_drawn_from_more_items_than_rows(mesh: Mesh, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"draws from all 1,000,000,000,000 items.*use \"in_batch\""):
        open_source(zipf_config(tmp_path, "lru", negatives="uniform", num_negatives=4), mesh)


# --- stores that keep raw ids --------------------------------------------------------------------------------------

NAMES = np.sort(np.random.default_rng(5).integers(-(2**63) + 1, 2**63 - 1, ITEMS))
"""Raw ids of the items of the walks: any int64."""


@pytest.fixture(scope="module")
def raw_store(tmp_path_factory: pytest.TempPathFactory) -> SequenceStore:
    path = tmp_path_factory.mktemp("raw") / "store"
    return write_small_store(path, **walks(), item_ids=NAMES.tolist(), raw=["item_id"])


@pytest.mark.parametrize("negatives", ["in_batch", "uniform", "full", "mixed"])
def test_raw_ids_that_equal_the_codes_change_nothing(
    train: Train, store: SequenceStore, tmp_path: Path, negatives: str
) -> None:
    alike = write_small_store(tmp_path / "alike", **walks(), item_ids=list(range(ITEMS)), raw=["item_id"])
    tables = tables_with_dynamic(store, rows=2 * ITEMS)
    options = {"negatives": negatives} | ({"num_negatives": 4} if negatives in ("uniform", "mixed") else {})
    options |= {"logq_correction": True} if negatives == "mixed" else {}
    runs = [
        train("retrieval", store=each, tables=tables, trainer={"eval_at_end": True}, task_args=options)
        for each in (store, alike)
    ]
    assert runs[0].losses == runs[1].losses and runs[0].metrics == runs[1].metrics


def test_models_learn_and_recommend_raw_ids(train: Train, raw_store: SequenceStore, mesh: Mesh) -> None:
    finished = train(
        "retrieval",
        store=raw_store,
        tables=tables_with_dynamic(raw_store, rows=2 * ITEMS),
        trainer={"max_train_iters": 60, "eval_at_end": True, "ckpt_save_interval": 60, "data_workers": 1},
        task_args={"negatives": "full"},
    )
    held = dynamic_tables(finished.trainer.state.model)["movies"].slots.content()[0]
    assert sorted(held.tolist()) == NAMES.tolist()
    assert finished.metrics["HR@3"] > 0.8
    trained = api.load(finished.path, mesh=mesh)
    for entry, history in zip(
        trained.recommend([100, 101], top=ITEMS), api.histories(raw_store, rows=[0, 1]), strict=True
    ):
        assert set(entry.items) == set(NAMES.tolist()) - {*history.items}
        assert entry.titles == [str(item) for item in entry.items]
    assert trained.item_embeddings().norm(dim=1).tolist() == pytest.approx([1.0] * ITEMS)


def test_a_run_goes_on_after_new_data_with_new_ids(
    train: Train, raw_store: SequenceStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The new data has ids below, between and above the old ones, so every code of it is another one."""
    more = walks(num_users=30, seed=1)
    shifted = [[item + 1 for item in row] for row in more["items"]]
    shifted[0] = [0, ITEMS + 1, 0, ITEMS + 1]
    names = [-(2**62) * 2 + 1, *NAMES.tolist(), 2**63 - 1]
    more |= {"items": shifted, "num_items": ITEMS + 2, "actions": [[0] * len(row) for row in shifted]}
    newer = write_small_store(tmp_path / "newer", **more, item_ids=names, raw=["item_id"])
    options = {"tables": tables_with_dynamic(raw_store, rows=4 * ITEMS), "output": "run"}
    saving = {"ckpt_save_interval": 4, "max_train_iters": 4}
    before = train("retrieval", store=raw_store, trainer=saving, **options)
    rows_before = rows_by_id(before)
    resumed = {"ckpt_load_dir": str(tmp_path / "run" / "checkpoints"), "ckpt_load_optimizer": False}
    after = train(
        "retrieval",
        store=newer,
        trainer={"max_train_iters": 1, "ckpt_save_dir": str(tmp_path / "other"), **resumed},
        optimizer={"learning_rate": 1e-12},
        **options,
    )
    rows = rows_by_id(after)
    for id_, row in rows_before.items():
        np.testing.assert_allclose(rows[id_], row, atol=1e-9)
    assert rows.keys() <= set(names)


def rows_by_id(finished: FinishedRun) -> dict[int, Any]:
    content = dynamic_tables(finished.trainer.state.model)["movies"].content()
    return dict(zip(content.ids.tolist(), content.rows.detach().numpy().copy(), strict=True))


def test_raw_ids_need_a_dynamic_table(raw_store: SequenceStore, mesh: Mesh, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keeps raw ids of 'item_id', .* make the table '.*' a DynamicEmbeddingArgs"):
        open_source(tiny_config("retrieval", raw_store, tmp_path), mesh)


def test_codes_and_raw_ids_are_not_mixed_up(
    train: Train, store: SequenceStore, raw_store: SequenceStore, mesh: Mesh, tmp_path: Path
) -> None:
    """Neither in a checkpoint of the other kind nor in a second store of the other kind."""
    tables = tables_with_dynamic(store, rows=2 * ITEMS)
    saving = {"ckpt_save_interval": 4, "max_train_iters": 4}
    train("retrieval", output="coded", tables=tables, trainer=saving)
    loading = {"ckpt_load_dir": str(tmp_path / "coded" / "checkpoints"), "ckpt_save_dir": str(tmp_path / "other")}
    with pytest.raises(DataError, match="its ids stand for other raw ids"):
        train("retrieval", store=raw_store, tables=tables, trainer=loading)
    config = tiny_config("ranking", raw_store, tmp_path / "mixed", tables=tables)
    assert isinstance(config.dataset, DatasetArgs)
    mixed = replace(config, dataset=replace(config.dataset, eval_dataset_path=str(store.path)))
    with pytest.raises(ConfigError, match="preprocess both with the same options"):
        open_source(mixed, mesh)
