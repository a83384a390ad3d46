"""Trained tiny models that the tests of this room share: one world of one rank, and one run of each task."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.serve.loaded import LoadedModel
from scripts import export
from tests.conftest import write_small_store
from tests.serve.http_server import Client, StubLoader, running, write_folder
from tests.serve.served import BIAS, EVERY_FEATURE, PUBLISHED, Served, feature_store, random_model, serve
from tests.train.conftest import one_rank, undisturbed  # noqa: F401
from tests.train.tiny import ITEM_FEATURES, OF_THE_ACTION, FinishedRun, run, skip_measuring_the_peak, tiny_config, walks

CONFIGS: dict[str, Any] = {
    "retrieval": {
        "task_args": {"negatives": "full"},
        "network": PUBLISHED,
        "trainer": {"max_train_iters": 15, "ckpt_save_interval": 3},
    },
    "ranking": {"trainer": {"max_train_iters": 10}},
    "tasks": {"task_args": OF_THE_ACTION, "dataset": {"max_num_candidates": 2}},
}
"""Name of a run → its options."""


@pytest.fixture(scope="package")
def mesh() -> Iterator[Mesh]:
    yield from one_rank()


@pytest.fixture(scope="package")
def store(tmp_path_factory: pytest.TempPathFactory) -> SequenceStore:
    """The walks of 20 users, whose items have features."""
    return write_small_store(tmp_path_factory.mktemp("walks") / "store", **walks(), item_features=ITEM_FEATURES)


@pytest.fixture(scope="package")
def finished(
    mesh: Mesh, store: SequenceStore, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], FinishedRun]:
    """``finished("ranking")``: a run of CONFIGS with checkpoints, trained at its first use."""
    runs: dict[str, FinishedRun] = {}

    def train(name: str) -> FinishedRun:
        if name not in runs:
            skip_measuring_the_peak()
            options = {**CONFIGS[name]}
            options["trainer"] = {"ckpt_save_interval": 1000, "eval_at_end": True, **options.get("trainer", {})}
            task = "retrieval" if name == "retrieval" else "ranking"
            runs[name] = run(tiny_config(task, store, tmp_path_factory.mktemp(name), **options), mesh)
        return runs[name]

    return train


@pytest.fixture(scope="package")
def loaded(finished: Callable[[str], FinishedRun], mesh: Mesh) -> Callable[[str], LoadedModel]:
    """``loaded("ranking")``: the model of that run."""
    models: dict[str, LoadedModel] = {}

    def load(name: str) -> LoadedModel:
        if name not in models:
            models[name] = LoadedModel.load(finished(name).path, mesh=mesh)
        return models[name]

    return load


@pytest.fixture(scope="package")
def exported(
    finished: Callable[[str], FinishedRun], mesh: Mesh, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """``exported("ranking")``: the newest checkpoint of that run, exported by the command with its program."""
    output = tmp_path_factory.mktemp("exported")

    def of_run(name: str) -> Path:
        if not (output / name).exists():
            checkpoints = finished(name).path.parent / "checkpoints"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("hstu.serve.loaded.mesh_of_this_process", lambda: mesh)
                patch.setattr(export, "mesh_of_this_process", lambda: mesh)
                assert export.main(["--ckpt", str(checkpoints), "--output", str(output / name), "--program"]) == 0
        return output / name

    return of_run


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A server of a stub; tests leave it as it is."""
    with running(write_folder(tmp_path_factory.mktemp("stub") / "first"), StubLoader()) as client:
        yield client


@pytest.fixture
def here(mesh: Mesh, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory to write to, and scripts run on the rank of this process."""
    monkeypatch.setattr("hstu.serve.loaded.mesh_of_this_process", lambda: mesh)
    return tmp_path


@pytest.fixture(scope="package")
def features(tmp_path_factory: pytest.TempPathFactory) -> SequenceStore:
    return feature_store(tmp_path_factory.mktemp("features") / "store")


@pytest.fixture(scope="package")
def retrieval(mesh: Mesh, features: SequenceStore, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Item tokens with their actions added, an item tower, a relative bias, projected rows, the published layer."""
    output = tmp_path_factory.mktemp("retrieval")
    network = {**BIAS, **PUBLISHED, "interleave_actions": False, "item_embedding_dim": 12, "num_layers": 1}
    dataset = {"side_feature_names": ["colour", "tags", "price", "time_gap"]}
    task_args = {"item_tower": True}
    trained = random_model("retrieval", features, mesh, output, network=network, dataset=dataset, task_args=task_args)
    return serve(trained, output / "serving")


@pytest.fixture(scope="package")
def ranking(mesh: Mesh, features: SequenceStore, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Action tokens, candidates, three tasks, and every kind of feature."""
    output = tmp_path_factory.mktemp("ranking")
    dataset = {**EVERY_FEATURE, "max_num_candidates": 3}
    network = {**BIAS, "num_layers": 1}
    trained = random_model("ranking", features, mesh, output, network=network, dataset=dataset, task_args=OF_THE_ACTION)
    return serve(trained, output / "serving")
