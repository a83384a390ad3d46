"""Exports of models with other settings. Slow."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.serve.export import TOLERANCE
from hstu.serve.runtime.files import read_tensors, tables_of
from tests.serve.random_requests import largest_difference
from tests.serve.served import BIAS, EVERY_FEATURE, feature_store, random_model, serve
from tests.train.tiny import ITEMS, OF_THE_ACTION

pytestmark = pytest.mark.slow

WINDOW = {"max_attention_span": 3, "min_full_attention_tokens": 2, "truncate_after_layer": 1, "truncate_to_items": 3}
ADDED = {"interleave_actions": False, "contextual_embedding_dim": 6}
SEES_ALL = {"is_causal": False, "disable_contextual_mask": False}
CANDIDATES = {"max_num_candidates": 3}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "time of the last event, raw ids": (
        "retrieval",
        {"network": BIAS, "dataset": {"query_time": "last_event"}, "dynamic": True, "raw": True},
    ),
    "averages": ("retrieval", {"optimizer": {"ema_decay": 0.5}}),
    "every feature": ("retrieval", {"network": BIAS, "dataset": EVERY_FEATURE}),
    "no actions": (
        "retrieval",
        {
            "dataset": {
                "action_feature_name": "",
                "side_feature_names": ["device", "watched"],
                "known_after": ["watched"],
            }
        },
    ),
    "window and truncation": ("retrieval", {"network": {**BIAS, **WINDOW}}),
    "raw ids, tower": (
        "retrieval",
        {
            "dynamic": True,
            "raw": True,
            "dataset": {"side_feature_names": ["colour", "tags"]},
            "task_args": {"item_tower": True},
        },
    ),
    "every event": ("ranking", {"network": BIAS, "dataset": EVERY_FEATURE}),
    "every event, window and truncation": ("ranking", {"network": {**BIAS, **WINDOW}}),
    "bit tasks": ("ranking", {"task_args": {"prediction_head_arch": [8, 2], "num_tasks": 2}}),
    "candidates, added actions": (
        "ranking",
        {
            "network": {**BIAS, **ADDED, **SEES_ALL},
            "dataset": {**EVERY_FEATURE, **CANDIDATES},
            "task_args": OF_THE_ACTION,
        },
    ),
    "candidates, window and truncation": ("ranking", {"network": {**BIAS, **WINDOW}, "dataset": CANDIDATES}),
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, SequenceStore]:
    """Whether raw ids are kept → the data."""
    root = tmp_path_factory.mktemp("stores")
    large = np.sort(np.random.default_rng(0).integers(-(2**60), 2**60, ITEMS)).tolist()
    return {False: feature_store(root / "a"), True: feature_store(root / "b", item_ids=large, raw=("item_id",))}


@pytest.mark.parametrize("name", SETTINGS)
def test_an_export_computes_what_the_model_computes(
    mesh: Mesh, stores: dict[bool, SequenceStore], tmp_path: Path, name: str
) -> None:
    task, options = SETTINGS[name]
    options = dict(options)
    trained = random_model(task, stores[options.pop("raw", False)], mesh, tmp_path, **options)
    served = serve(trained, tmp_path / "serving")
    assert largest_difference(trained, served.model) <= TOLERANCE


@pytest.mark.parametrize(("dtype", "largest"), [("bfloat16", 2**-8), ("int8", 1 / 127)])
def test_tables_of_fewer_bits_are_close(
    mesh: Mesh, stores: dict[bool, SequenceStore], tmp_path: Path, dtype: str, largest: float
) -> None:
    trained = random_model("retrieval", stores[False], mesh, tmp_path)
    served = serve(trained, tmp_path / "serving", table_dtype=dtype)
    rows = trained.model.rows_of({"item_id": torch.arange(ITEMS)})["item_id"].detach()
    places = served.model.encoder.items.rows(range(1000, 1000 + ITEMS))
    found = tables_of(read_tensors(served.folder / "tables.safetensors"))["item_id_table"].rows(places)
    assert 0 < ((found - rows).abs() / rows.abs().amax(dim=1, keepdim=True)).max() <= largest
