"""A model and newer data (new users, items and values of contextual features), and a model without its data."""

import csv
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu import api
from hstu.base.errors import ConfigError, DataError
from hstu.checkpoint.export import export
from hstu.checkpoint.find import locate
from hstu.checkpoint.phase import NothingNew
from hstu.config.args import DynamicEmbeddingArgs, EmbeddingArgs
from hstu.data.preprocess import InteractionColumns, import_interactions
from hstu.data.sampling.splits import Period
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.serve.predict import evaluate_split
from tests.conftest import write_small_store
from tests.train.tiny import ITEMS, FinishedRun, Train, run, tables_of, tiny_config, walks

SAVES = {"ckpt_save_interval": 1000, "max_train_iters": 60}
TOWNS = ("Köln", "Rom", "Ulm")
CONTEXT = ("town", "who")


def item_name(item: int) -> str:
    return f"item {item:02},“x”"


def write_store(folder: Path, more: bool = False, raw_ids: bool = False) -> SequenceStore:
    """The walks of 20 users; with ``more``, two more users, two more items between the others, and one more town.

    User "a zoë" is new and knows old items only. "b new" knows new items only and is from a new town.
    """
    name: Callable[[int], Any] = (lambda item: 100 + 10 * item) if raw_ids else item_name
    events = [
        (f"u{user:02}", [name(item) for item in row], TOWNS[user % 3]) for user, row in enumerate(walks()["items"])
    ]
    if more:
        new = [name(4) + 1, name(0) - 1] if raw_ids else ["item 04,new", "another"]
        events += [("a zoë", [name(3), name(4), name(5)], "Rom"), ("b new", [*new, *new], "Bonn")]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "events.csv").open("w", newline="") as file, (folder / "people.csv").open("w", newline="") as people:
        csv.writer(file).writerows([("who", "what", "did", "when"), *(
            (user, item, place % 4, 1000 + place) for user, items, _ in events for place, item in enumerate(items)
        )])  # fmt: skip
        csv.writer(people).writerows([("who", "town"), *((user, town) for user, _, town in events)])
    roles = ("item",) if raw_ids else ()
    columns, store = columns_of(folder, "events.csv"), folder / "store"
    return SequenceStore.open(import_interactions("walks", columns, output=store, force=True, raw_ids=roles))


def columns_of(folder: Path, file: str) -> InteractionColumns:
    return InteractionColumns(
        interactions=(folder / file,), user="who", item="what", action="did", time="when",
        context=folder / "people.csv", context_columns=CONTEXT,
    )  # fmt: skip


def train(mesh: Mesh, store: SequenceStore, folder: Path, **options: Any) -> FinishedRun:
    tables = options.pop("tables", tables_of(store, sharded=("what", "user_id")))
    return run(tiny_config("retrieval", store, folder, tables=tables, trainer=SAVES | options.pop("trainer", {})), mesh)


@pytest.fixture(scope="module")
def old(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run on the old data, which is then deleted."""
    folder = tmp_path_factory.mktemp("old")
    finished = train(mesh, write_store(folder), folder)
    shutil.rmtree(folder / "store")
    return finished


def load_on(finished: FinishedRun, mesh: Mesh, more: bool) -> api.TrainedModel:
    """The model of the run on data that has been preprocessed again at the same place."""
    write_store(finished.path.parent, more)
    return api.load(finished.path, mesh=mesh)


def assert_alike(expected: Sequence[api.Recommendation], found: Sequence[api.Recommendation]) -> None:
    for one, other in zip(expected, found, strict=True):
        assert (one.user, one.items, one.titles) == (other.user, other.items, other.titles)
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4)


def test_new_data_leaves_the_recommendations_of_known_users_as_they_were(old: FinishedRun, mesh: Mesh) -> None:
    users = [f"u{user:02}" for user in range(20)]
    before, after = (load_on(old, mesh, more) for more in (False, True))
    expected, found = before.recommend(users, top=ITEMS), after.recommend(users, top=ITEMS)
    assert before.report == []
    assert_alike(expected, found)


def test_what_is_new_is_reported_and_has_rows_of_zeros(old: FinishedRun, mesh: Mesh) -> None:
    trained = load_on(old, mesh, more=True)
    assert sorted(trained.report) == [
        "table town_table: 1 of 4 ids are not in the checkpoint; their rows are zeros",
        "table user_id_table: 2 of 22 ids are not in the checkpoint; their rows are zeros",
        "table what_table: 2 of 13 ids are not in the checkpoint; their rows are zeros",
        "the model was trained on 142 events of 20 users; this data has 149 events of 22 users",
    ]
    norms = trained.item_embeddings().norm(dim=1)
    names = trained.store.raw_ids("what")
    newcomers = evaluate_split(trained, Period(until=10**6)).evaluator.newcomers
    assert set(names[newcomers["new_items"]]) == {"another", "item 04,new"}
    assert set(names[(norms == 0).numpy()]) == {"another", "item 04,new"}
    torch.testing.assert_close(norms[norms > 0], torch.ones(ITEMS))
    zoe, new = trained.recommend(["a zoë", "b new"], top=20)
    assert len(zoe.items) == ITEMS - 3 and item_name(6) in zoe.items[:3]
    assert set(new.items) == {item_name(item) for item in range(ITEMS)}


def test_new_items_are_misses_in_an_evaluation(old: FinishedRun, mesh: Mesh) -> None:
    before, after = (load_on(old, mesh, more).evaluate("test") for more in (False, True))
    # of 22 users, the new one with old items counts as the model does, the one with new items is a miss
    assert after["HR@3"] * 22 == pytest.approx(before["HR@3"] * 20 + 1)


def test_a_run_goes_on_with_changed_data_only_as_told(
    old: FinishedRun, mesh: Mesh, tmp_path: Path, warnings_of_hstu: pytest.LogCaptureFixture
) -> None:
    """The data has other histories of the same ids, then new ids, too. It has not grown: it was made anew."""
    write_store(tmp_path)
    events = (tmp_path / "events.csv").read_text().splitlines()
    reordered = sorted(events[1:], key=lambda line: line.split(",")[1])
    times = [f"{line.rpartition(',')[0]},{second}" for second, line in enumerate(reordered)]
    (tmp_path / "events.csv").write_text("\n".join([events[0], *times]))
    columns = columns_of(tmp_path, "events.csv")
    store = SequenceStore.open(import_interactions("walks", columns, output=tmp_path / "store", force=True))
    loading = {"ckpt_load_dir": str(locate(old.path)), "max_train_iters": 1, "ckpt_save_dir": str(tmp_path / "new")}
    with pytest.raises(DataError, match=r"142 events of 20 users; this data has as many, but .*: \"all\" starts a new"):
        train(mesh, store, tmp_path, trainer=loading)
    with pytest.raises(DataError, match='"new_events" needs data that has grown by appending; "all" starts'):
        train(mesh, write_store(tmp_path, more=True), tmp_path, trainer=loading | {"continue_on": "new_events"})
    store = SequenceStore.open(tmp_path / "store")
    finished = train(mesh, store, tmp_path, trainer=loading | {"continue_on": "all"})
    told = "table what_table: 2 of 13 ids are not in the checkpoint; their rows are as initialised"
    assert told in warnings_of_hstu.text
    assert finished.trainer.state.position.epoch == 20, "the epoch after those of the checkpoint"
    tables = api.load(finished.path, mesh=mesh).tables()
    norms = tables["what_table"].rows.norm(dim=1)
    assert (norms > 0.1).all() and finished.trainer.state.iteration == 61


def test_a_position_in_windows_of_shards_is_refused_for_others(mesh: Mesh, tmp_path: Path) -> None:
    stores = {count: write_small_store(tmp_path / f"in {count}", **walks(), shards=count) for count in (1, 4, 8)}

    def go_on(shards: int, windows: int, name: str, **trainer: Any) -> FinishedRun:
        dataset = {"shuffle": True, "shuffle_window_shards": windows}
        trainer = {"ckpt_save_interval": 3, "max_train_iters": 6, "ckpt_save_dir": str(tmp_path / name), **trainer}
        return run(tiny_config("retrieval", stores[shards], tmp_path, dataset=dataset, trainer=trainer), mesh)

    with pytest.raises(ConfigError, match=r"shuffle_window_shards.* needs a store in shards, and .*/in 1 has none"):
        go_on(1, 2, "none")
    loading = {"ckpt_load_dir": str(locate(go_on(4, 2, "begun").path))}
    for shards, windows, here in ((8, 2, ", shuffled in windows of 2 of 8 shards"), (4, 0, "")):
        told = rf"users, shuffled in windows of 2 of 4 shards; this data has .* of 20 users{here}\. Its position"
        with pytest.raises(DataError, match=told):
            go_on(shards, windows, "refused", **loading)
        again = go_on(shards, windows, f"all {shards}", continue_on="all", max_train_iters=1, **loading)
        assert (again.trainer.state.iteration, again.trainer.phase.first_iteration) == (7, 6)


def test_a_phase_trains_on_what_appending_has_brought(mesh: Mesh, tmp_path: Path, train: Train) -> None:
    whole = walks()
    known = [len(row) - 2 for row in whole["items"]]
    first = {
        name: [row[:number] for row, number in zip(whole[name], known, strict=True)] for name in ("items", "actions")
    }
    store = write_small_store(tmp_path / "store", **whole | first)
    segments = [[0] * number + [1, 1] for number in known]
    options: Any = {
        "dataset": {"split": "none", "shuffle": False},
        "schedule": {"schedule": "linear", "counts_from": "phase"},
    }
    saves: Any = {"max_train_iters": None, "ckpt_save_interval": 100, "ckpt_load_dir": "auto", "eval_interval": 1}

    def go_on(output: str = "run", **trainer: Any) -> FinishedRun:
        trainer = saves | {"eval_at_end": True} | trainer
        return train("retrieval", store=store, output=output, trainer=trainer, **options)

    begun = go_on()
    assert begun.evaluations == [] and begun.trainer.total_iters == 3
    assert go_on(continue_on="all").trainer.total_iters == 3, "the data is the same"
    assert go_on("stopped", max_train_iters=2).trainer.total_iters == 2
    store = write_small_store(tmp_path / "store", **whole, segments=segments, earlier=store)
    with pytest.raises(DataError, match=r'saved 4 samples before the end of the first pass .*: "all" starts'):
        go_on("stopped", continue_on="new_events")
    with pytest.raises(
        DataError, match=r"has grown since .*iteration_00000003 .*: 40 new events. .*\"new_events\" trains"
    ):
        go_on()
    for _ in range(2):  # the second one finds nothing left to do
        phase = go_on(continue_on="new_events")
        assert (phase.trainer.state.iteration, phase.trainer.phase.first_segment) == (6, 1)
    records = [record for record in phase.records if record["kind"] == "train"]
    expected = [(number / 3, 0.01 * (1 - (number - 1) % 3 / 3)) for number in range(1, 7)]
    np.testing.assert_allclose([(record["epoch"], record["lr"]) for record in records], expected)
    batch = phase.trainer.source.batch_of(np.arange(8))
    assert batch.num_labels.tolist() == [2] * 8
    assert batch.item_lengths.tolist() == [min(8, len(row)) for row in whole["items"][:8]]
    fewer = {name: whole[name][1:] for name in first} | {"context": {"town": whole["context"]["town"][1:]}}
    store = write_small_store(tmp_path / "store", **whole | fewer, segments=segments[1:], earlier=store)
    saved = phase.saved
    with pytest.raises(NothingNew, match="has 0 new events"):
        go_on(continue_on="new_events")
    assert phase.saved == saved == ["iteration_00000003", "iteration_00000006"]


def test_a_run_that_loads_in_part_is_also_applied_in_part(old: FinishedRun, mesh: Mesh, tmp_path: Path) -> None:
    """A checkpoint of another network fits in part."""
    write_store(old.path.parent)
    checkpoint = locate(old.path)
    config = replace(api.load(checkpoint, mesh=mesh).config)
    wider = replace(config, network=replace(config.network, num_layers=3))
    loads_in_part = replace(wider.trainer, ckpt_load_dir=str(checkpoint), ckpt_load_strict=False)
    with pytest.raises(DataError, match="ckpt_load_strict = False loads what fits"):
        api.TrainedModel.restore(wider, checkpoint, mesh)
    for restored in (
        api.TrainedModel.restore(wider, checkpoint, mesh, strict=False),
        api.TrainedModel.restore(replace(wider, trainer=loads_in_part), checkpoint, mesh),
    ):
        assert any("layers.2" in line and "as initialised" in line for line in restored.report)
        assert len(restored.recommend(["u00"], top=2)[0].items) == 2


# --- histories given by hand, without data -------------------------------------------------------------------------


def dynamic(tables: Sequence[EmbeddingArgs]) -> tuple[EmbeddingArgs, ...]:
    return tuple(
        DynamicEmbeddingArgs(
            feature_names=table.feature_names, table_name=table.table_name, item_vocab_size_or_capacity=40, init_std=0.3
        )
        if table.feature_names[0] in ("what", "user_id")
        else table
        for table in tables
    )


@pytest.mark.parametrize("kind", ["static", "dynamic", "raw"])
def test_a_history_given_by_hand_gets_what_the_same_user_of_the_data_gets(
    mesh: Mesh, tmp_path: Path, kind: str
) -> None:
    """With the data and without it, from a checkpoint and from an export."""
    store = write_store(tmp_path, raw_ids=kind == "raw")
    tables = tables_of(store, sharded=("what", "user_id"))
    finished = train(mesh, store, tmp_path, tables=tables if kind == "static" else dynamic(tables))
    trained = api.load(finished.path, mesh=mesh)
    expected = trained.recommend(["u00", "u07"], top=5)
    given = list(api.histories(store, rows=[0, 7]))
    exported = export(locate(finished.path), tmp_path / "exported")
    found = [trained.recommend_for(given, top=5)]
    shutil.move(store.path, tmp_path / "elsewhere")
    found += [api.load(path, mesh=mesh).recommend_for(given, top=5) for path in (finished.path, exported)]
    for answered, unknown in found:
        assert unknown == {}
        assert_alike(expected, answered)
    with pytest.raises(DataError, match="no preprocessed data at"):
        api.load(exported, mesh=mesh).recommend(["u00"])


def test_what_is_unknown_in_a_history_is_told(old: FinishedRun, mesh: Mesh) -> None:
    trained = load_on(old, mesh, more=False)
    items = [item_name(1), "no item", item_name(2)]
    (answer,), unknown = trained.recommend_for([api.History("zoe", items=items, actions=[1, 2, 3])], top=3)
    assert unknown == {"what": ["no item"], "user_id": ["zoe"]}
    assert len(answer.items) == 3 and not set(items) & set(answer.items)
