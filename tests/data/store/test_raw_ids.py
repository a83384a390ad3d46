"""Stores that keep raw ids: what models read, and which ids can be kept."""

from pathlib import Path

import numpy as np
import pytest

from hstu.data.store.sequence_store import SequenceStore
from scripts.preprocess_dataset import main

EVENTS = "member,sku,when\n5,7,10\n-9,7,11\n5,-3,12\n-9,9223372036854775807,13\n"


def preprocess(folder: Path, events: str, *options: str) -> int:
    (folder / "events.csv").write_text(events)
    table = ["--interactions", str(folder / "events.csv"), "--user", "member", "--item", "sku", "--time", "when"]
    return main(["--dataset_name", "mine", *table, "--output", str(folder / "mine"), *options])


def test_models_read_the_raw_ids_of_a_store_that_keeps_them(tmp_path: Path) -> None:
    assert preprocess(tmp_path, EVENTS, "--context_columns", "member", "--raw_ids", "item,user") == 0
    store = SequenceStore.open(tmp_path / "mine")
    store.verify_contents()
    assert store.features["sku"].raw and store.features["user_id"].raw and not store.features["when"].raw
    assert "--raw_ids item,user" in (store.command or "")
    items = store.model_ids("sku", np.asarray(store.sequence("sku")))
    assert items.tolist() == [7, 2**63 - 1, 7, -3] and items.dtype == np.int64
    assert store.model_ids("user_id", store.context("user_id")).tolist() == [-9, 5]
    assert store.encode("sku", np.array([2**63 - 1])).tolist() == [2]


@pytest.mark.parametrize(
    ("options", "events", "told"),
    [
        (("--raw_ids", "item,movie"), EVENTS, "--raw_ids movie: expected item, user or item,user"),
        (("--raw_ids", "user"), EVENTS, "name the user column in --context_columns"),
        (("--raw_ids", "item"), EVENTS.replace("-3", "A-3"), "the ids of 'sku' are text"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    tmp_path: Path, options: tuple[str, ...], events: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preprocess(tmp_path, events, *options) in (2, 3)
    assert told in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()
