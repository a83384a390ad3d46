"""Evaluation on a second store, which numbers its ids differently."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.base.errors import ConfigError, DataError
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.train.sources import open_source
from tests.conftest import MakeStore, write_small_store
from tests.train.conftest import OpenSource
from tests.train.tiny import ITEMS, build, ids, real_users, tiny_config, walks


def write_users(path: Path, users: list[int], *, item_order: np.ndarray, context: tuple[str, ...]) -> SequenceStore:
    """A store of these users of the walks that numbers items by ``item_order`` (code → raw id 1000, 1001, …).

    Vocabularies ascend, so codes are the places of those items that occur.
    """
    data = walks()
    rows = [item_order[data["items"][user]] for user in users]
    raw = np.unique(np.concatenate(rows))
    towns = [data["context"]["town"][user] for user in users]
    return write_small_store(
        path,
        [np.searchsorted(raw, row).tolist() for row in rows],
        actions=[data["actions"][user] for user in users],
        context={"town": towns} | dict.fromkeys(context, [0] * len(users)),
        item_ids=(1000 + raw).tolist(),
    )


def test_a_second_store_with_other_numbers_gives_the_metrics_of_one_store(
    mesh: Mesh, make_store: MakeStore, tmp_path: Path
) -> None:
    data = walks()
    one_more: dict[str, Any] = {"items": [[item + 1 for item in row] for row in data["items"]], "num_items": ITEMS + 1}
    store = make_store(**{**data, **one_more})  # its item 0, raw id 1000, is nobody's
    trainer = build(tiny_config("ranking", store, tmp_path / "out", trainer={"max_train_iters": 10}), mesh)
    trainer.train()
    first = list(trainer.source.eval_batches("valid"))
    held_out = [user for batch in first for user in real_users(batch)]
    second_store = write_users(tmp_path / "second", held_out, item_order=1 + np.arange(ITEMS), context=("planet",))
    begins = second_store.offsets()[:-1]
    assert (second_store.sequence("item_id")[begins] + 1 == [one_more["items"][user][0] for user in held_out]).all()

    config = tiny_config("ranking", store, tmp_path, dataset={"eval_dataset_path": str(second_store.path)})
    second = list(open_source(config, mesh).eval_batches("valid"))
    assert [ids(batch, "item_id") for batch in second] == [ids(batch, "item_id") for batch in first]
    assert trainer.evaluator.evaluate(second) == trainer.evaluator.evaluate(first)


def test_ids_that_only_the_second_store_has_are_refused(
    source: OpenSource, tmp_path: Path, store: SequenceStore
) -> None:
    shifted = np.arange(ITEMS) + ITEMS - 1
    second = write_users(tmp_path / "second", list(range(20)), item_order=shifted, context=())
    with pytest.raises(DataError) as caught:
        source("ranking", dataset={"eval_dataset_path": str(second.path)})
    for part in (
        "DatasetArgs.eval_dataset_path",
        str(second.path),
        "10 raw id(s)",
        "'item_id': 1011, 1012",
        "or leave",
    ):
        assert part in str(caught.value)


def test_actions_beyond_those_trained_on_are_refused(make_store: MakeStore, source: OpenSource) -> None:
    data = walks()
    second = make_store(**{**data, "num_actions": 9})
    with pytest.raises(ConfigError, match=r"eval_dataset_path: .* has 'action' up to 8, the training data below 4"):
        source("ranking", dataset={"eval_dataset_path": str(second.path)})
