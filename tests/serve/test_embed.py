"""Vectors in files: those of the interface for notebooks, and an index that finds what an exact search finds."""

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
from hstu.serve.nearest import build_index, measure_recall
from tests.train.tiny import ITEMS, FinishedRun

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import embed

Loaded = Callable[[str], LoadedModel]


@pytest.fixture
def call(here: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``call("retrieval", "--index")``: the exit code of the script, with the model of that run."""

    def run(name: str, *options: Any) -> int:
        monkeypatch.setattr(embed, "load_model", lambda cls, options: loaded(name))
        return embed.main(["--run_dir", name, "--output", str(here / "out"), *map(str, options)])

    return run


@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_vectors_are_those_of_the_interface_for_notebooks(
    form: str,
    here: Path,
    call: Callable[..., int],
    finished: Callable[[str], FinishedRun],
    mesh: Mesh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hstu.serve.vectors.PART_USERS", 2)
    (here / "users.csv").write_text("user\n107\n103\n119\n107\n")
    assert call("retrieval", "--format", form, "--users_file", here / "users.csv") == 0
    if form == "parquet":
        users, items = (pd.read_parquet(here / "out" / f"{name}.parquet") for name in ("users", "items"))
        ids, vectors = users["user"].to_numpy(), np.stack(users["vector"])
        item_ids, of_items = items["item"].to_numpy(), np.stack(items["vector"])
    else:
        ids, vectors, item_ids, of_items = (
            np.load(here / "out" / name) for name in ("users.ids.npy", "users.npy", "items.ids.npy", "items.npy")
        )
    trained = api.load(finished("retrieval").path, mesh=mesh)
    assert ids.tolist() == [107, 103, 119] and item_ids.tolist() == list(range(1000, 1000 + ITEMS))
    np.testing.assert_allclose(vectors, trained.user_embeddings(ids).numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(of_items, trained.item_embeddings().numpy())
    assert len(list((here / "out").iterdir())) == (2 if form == "parquet" else 4)


def test_mistakes_are_told(call: Callable[..., int], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("ranking") == 3 and "need a retrieval run" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "faiss", None)
        assert call("retrieval", "--index") == 2
    assert "--index needs faiss, which is not installed: pip install faiss-cpu" in capsys.readouterr().err
    (here / "out").mkdir()
    (here / "out" / "mine").touch()
    assert call("retrieval", "--only", "items") == 3 and "out exists; give another name" in capsys.readouterr().err


class ExactIndex:
    """Finds the nearest rows, except the first ``missed`` of each."""

    def __init__(self, vectors: np.ndarray, missed: int) -> None:
        self.vectors, self.missed, self.ntotal = vectors, missed, len(vectors)

    def search(self, queries: np.ndarray, k: int) -> tuple[None, np.ndarray]:
        nearest = np.argsort(-(queries @ self.vectors.T), axis=1)
        return None, nearest[:, self.missed : self.missed + k]


def test_recall_is_the_share_of_the_nearest_that_is_found() -> None:
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(size=(50, 8)).astype(np.float32), rng.normal(size=(300, 8)).astype(np.float32)
    for missed, recall in ((0, 1.0), (1, 0.75), (4, 0.0)):
        assert measure_recall(ExactIndex(vectors, missed), vectors, queries, 4).recall == recall


def test_an_index_finds_nearest_items_and_none_without_a_vector(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss", reason="needs faiss-cpu (the extra index)")
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(500, 8)).astype(np.float32)
    vectors[::7] = 0
    build_index(vectors, tmp_path / "items.faiss", ef_search=64)
    index = faiss.read_index(str(tmp_path / "items.faiss"))
    queries = rng.normal(size=(40, 8)).astype(np.float32)
    assert measure_recall(index, vectors, queries, 10).recall > 0.95
    found = index.search(queries, 10)[1]
    assert found.min() >= 0 and (found % 7).min() > 0
