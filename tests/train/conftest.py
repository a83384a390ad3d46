"""A world of one in the test's own process, and runs without what only real ones need."""

import gc
import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu.data.store.sequence_store import SequenceStore
from hstu.observe.logging import quiet_libraries
from hstu.parallel import mesh as meshes
from hstu.parallel.mesh import Mesh
from hstu.train.sources import StoreSource, open_source
from tests.conftest import write_small_store
from tests.train.tiny import FinishedRun, Train, run, tiny_config, walks

OpenSource = Callable[..., StoreSource]
"""Opens the source of a task and of TinyOptions."""


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield from one_rank()


def one_rank() -> Iterator[Mesh]:
    """One rank without launcher."""
    threads = torch.get_num_threads()
    quiet_libraries()
    world = meshes.start(timeout_s=60)
    torch.set_num_threads(1)  # tensors are too small to be worth a second one
    yield world
    meshes.finish()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No measuring of the CPU's peak, which takes longer than a tiny run; nothing of a run outlives its test."""
    monkeypatch.setattr("hstu.train.builder.peak_tflops", lambda *_: (1.0, "assumed"))
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    gc.enable()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> SequenceStore:
    """The walks of 20 users."""
    return write_small_store(tmp_path_factory.mktemp("walks") / "store", **walks())


@pytest.fixture
def source(mesh: Mesh, store: SequenceStore, tmp_path: Path) -> OpenSource:
    """``source("retrieval", dataset={...})`` over the walks, or ``store=``."""

    def open_it(task: str, *, store: SequenceStore = store, **options: Any) -> StoreSource:
        opened = open_source(tiny_config(task, store, tmp_path, **options), mesh)
        assert isinstance(opened, StoreSource)
        return opened

    return open_it


@pytest.fixture
def train(mesh: Mesh, store: SequenceStore, tmp_path: Path) -> Train:
    """``train("ranking", trainer={...})``: a run on the walks (or ``store=``), each in a directory of its own.

    ``output``: name of the directory, to go on in that of an earlier run.
    """
    names = iter(range(1000))

    def train_on(task: str, *, store: SequenceStore = store, output: str | None = None, **options: Any) -> FinishedRun:
        return run(tiny_config(task, store, tmp_path / (output or f"run{next(names)}"), **options), mesh)

    return train_on


@pytest.fixture
def warnings_of_hstu(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """caplog, also for runs, whose logger does not hand its records on."""
    monkeypatch.setattr("hstu.train.builder.set_up_logging", lambda *_: logging.getLogger("hstu"))
    caplog.set_level(logging.INFO, logger="hstu")
    return caplog
