"""Runs on data of which some items have no events."""

from pathlib import Path

import numpy as np

from hstu.data.batches.batch import NEGATIVES
from hstu.data.preprocess import InteractionColumns, import_interactions
from hstu.data.sampling.sampler import START
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.train.evaluate import RetrievalEvaluator
from hstu.train.sources import open_source
from tests.train.tiny import ITEMS, run, tables_of, tiny_config, walks

UNSEEN = 5


def make_store(folder: Path) -> SequenceStore:
    """The walks over the items 0, 2, 4, …; the items 1, 3, … have no events."""
    events = [f"{user},{2 * item}" for user, items in enumerate(walks()["items"]) for item in items]
    (folder / "events.csv").write_text("\n".join(["who,what", *events]))
    names = [f"{item},film {item}" for item in range(2 * UNSEEN)]
    (folder / "items.csv").write_text("\n".join(["what,name", *names]))
    columns = InteractionColumns(
        interactions=folder / "events.csv", user="who", item="what", titles=folder / "items.csv", title="name"
    )
    return SequenceStore.open(import_interactions("walks", columns, output=folder / "store", all_items=True))


def test_items_without_events_are_ranked_and_drawn_as_negatives(mesh: Mesh, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    unseen = np.setdiff1d(np.arange(ITEMS + UNSEEN), store.sequence("what"))
    assert len(unseen) == UNSEEN and (store.raw_ids("what")[unseen] % 2 == 1).all()
    uniform = {"negatives": "uniform", "num_negatives": 16}
    config = tiny_config("retrieval", store, tmp_path, tables=tables_of(store, ("what",)), task_args=uniform)
    source = open_source(config, mesh)
    drawn = next(source.train_batches(START)).features[NEGATIVES].values().numpy()
    assert set(unseen) <= set(drawn)
    finished = run(config, mesh)
    evaluator = finished.trainer.evaluator
    assert isinstance(evaluator, RetrievalEvaluator)
    assert len(finished.losses) == 4 and evaluator.corpus().size == ITEMS + UNSEEN
