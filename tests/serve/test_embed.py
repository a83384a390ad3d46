"""Vectors in files: those of the interface for notebooks."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hstu import api
from hstu.parallel.mesh import Mesh
from hstu.serve.loaded import LoadedModel
from tests.train.tiny import ITEMS, FinishedRun

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import embed

Loaded = Callable[[str], LoadedModel]


@pytest.fixture
def call(here: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``call("retrieval", "--only", "items")``: the exit code of the script, with the model of that run."""

    def run(name: str, *options: Any) -> int:
        monkeypatch.setattr(embed, "load_model", lambda cls, options: loaded(name))
        return embed.main(["--run_dir", name, "--output", str(here / "out"), *map(str, options)])

    return run


def test_vectors_are_those_of_the_interface_for_notebooks(
    here: Path,
    call: Callable[..., int],
    finished: Callable[[str], FinishedRun],
    mesh: Mesh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hstu.serve.predict.PART_USERS", 2)
    (here / "users.csv").write_text("user\n107\n103\n119\n107\n")
    assert call("retrieval", "--users_file", here / "users.csv") == 0
    users, items = (pd.read_parquet(here / "out" / f"{name}.parquet") for name in ("users", "items"))
    ids, vectors = users["user"].to_numpy(), np.stack(users["vector"])
    item_ids, of_items = items["item"].to_numpy(), np.stack(items["vector"])
    trained = api.load(finished("retrieval").path, mesh=mesh)
    assert ids.tolist() == [107, 103, 119] and item_ids.tolist() == list(range(1000, 1000 + ITEMS))
    np.testing.assert_allclose(vectors, trained.user_embeddings(ids).numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(of_items, trained.item_embeddings().numpy())


def test_mistakes_are_told(call: Callable[..., int], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("ranking") == 3 and "need a retrieval run" in capsys.readouterr().err
    (here / "out").mkdir()
    (here / "out" / "mine").touch()
    assert call("retrieval", "--only", "items") == 3 and "out exists; give another name" in capsys.readouterr().err
