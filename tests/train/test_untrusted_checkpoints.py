"""Checkpoints that somebody has made in order to run code here, or to have other files read. Their manifests fit."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu import api
from hstu.base.errors import DataError
from hstu.checkpoint.directory import MANIFEST, DamagedCheckpoint, describe_files, read_manifest, write_manifest
from hstu.checkpoint.export import describe, export
from hstu.checkpoint.load import load
from hstu.config.run_config import RunConfig
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from tests.train.tiny import build, run, tables_with_dynamic, tiny_config

FIRST, LAST = "iteration_00000001", "iteration_00000002"
SAVING: dict[str, Any] = {"ckpt_save_interval": 1, "max_train_iters": 2}


@pytest.fixture(scope="module")
def saved(mesh: Mesh, store: SequenceStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run with a dynamic table and two checkpoints."""
    place = tmp_path_factory.mktemp("saved")
    run(config_of(store, place, **SAVING), mesh)
    return place


def config_of(store: SequenceStore, output: Path, **trainer: Any) -> RunConfig:
    return tiny_config("retrieval", store, output, trainer=trainer, tables=tables_with_dynamic(store, 11))


@pytest.fixture
def output(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "output", symlinks=True))


@pytest.fixture
def checkpoint(output: Path) -> Path:
    return output / "checkpoints" / LAST


def replace(checkpoint: Path, name: str, content: bytes) -> None:
    """Replace a file, and its entry in the manifest."""
    (checkpoint / name).write_bytes(content)
    write_manifest(checkpoint, read_manifest(checkpoint) | describe_files(checkpoint, [checkpoint / name]))


class Attack:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def attempts(checkpoint: Path, output: Path, store: SequenceStore, mesh: Mesh) -> dict[str, Callable[[], Any]]:
    """What users do with a checkpoint."""
    loading = {"ckpt_load_dir": str(checkpoint), "ckpt_save_interval": -1, "output_dir": str(output / "new")}
    config = config_of(store, output, **loading)
    return {
        "inspect": lambda: list(describe(checkpoint)),
        "export": lambda: export(checkpoint, output / "exported"),
        "recommend": lambda: api.load(checkpoint, mesh=mesh).recommend([100]),
        "resume": lambda: build(config, mesh).train(),
    }


@pytest.mark.parametrize("name", ["tensors/.metadata", "dynamic_rank0.pt", "rng_rank0.pt"])
def test_no_file_of_a_checkpoint_runs_code(
    checkpoint: Path, output: Path, store: SequenceStore, mesh: Mesh, name: str
) -> None:
    trap = output / "trap"
    if name.endswith(".pt"):
        torch.save(Attack(trap), output / "attack")
        replace(checkpoint, name, (output / "attack").read_bytes())
    else:
        replace(checkpoint, name, pickle.dumps(Attack(trap)))
    refused = []
    for action, attempt in attempts(checkpoint, output, store, mesh).items():
        try:
            attempt()
        except DamagedCheckpoint as error:
            refused.append(action)
            assert f"{name} is damaged" in str(error)
        assert not trap.exists(), action
    assert refused == (["resume"] if name == "rng_rank0.pt" else ["inspect", "export", "recommend", "resume"])


@pytest.mark.parametrize(
    "line",
    [
        "import attacking_module",
        'include "/etc/passwd"',
        "TrainerArgs.seed = @gin.singleton()",
        'gin.singleton.constructor = "x"',
    ],
)
def test_the_configuration_of_a_checkpoint_is_data(
    checkpoint: Path, tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    (tmp_path / "attacking_module.py").write_text(f"open({str(tmp_path / 'trap')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    gin = (checkpoint / "operative.gin").read_text()
    kept = "\n".join(row for row in gin.splitlines() if not row.startswith(line.partition("=")[0] + "="))
    replace(checkpoint, "operative.gin", f"{line}\n{kept}\n".encode())
    with pytest.raises(DataError, match=r"operative\.gin is not a configuration that this program has written"):
        api.load(checkpoint, mesh=mesh)
    assert not (tmp_path / "trap").exists() and "attacking_module" not in sys.modules


def test_a_changed_configuration_is_noticed_before_it_is_read(checkpoint: Path, mesh: Mesh) -> None:
    with (checkpoint / "operative.gin").open("a") as file:
        file.write("import attacking_module\n")
    with pytest.raises(DamagedCheckpoint, match=r"operative\.gin has \d+ bytes instead of"):
        api.load(checkpoint, mesh=mesh)


def test_the_index_of_tensors_cannot_refer_to_other_files(checkpoint: Path, output: Path) -> None:
    index = pickle.loads((checkpoint / "tensors" / ".metadata").read_bytes())
    for info in index.storage_data.values():
        info.relative_path = f"../../{FIRST}/tensors/{info.relative_path}"
    replace(checkpoint, "tensors/.metadata", pickle.dumps(index))
    with pytest.raises(DamagedCheckpoint, match=r"refers to .*, which is no file of the checkpoint"):
        export(checkpoint, output / "exported")


def test_an_index_that_python_3_13_wrote_is_read_by_every_python(checkpoint: Path, output: Path) -> None:
    index = pickle.loads((checkpoint / "tensors" / ".metadata").read_bytes())
    written = pickle.dumps(index, protocol=2).replace(b"cpathlib\n", b"cpathlib._local\n")
    assert b"cpathlib._local\n" in written
    replace(checkpoint, "tensors/.metadata", written)
    export(checkpoint, output / "exported")


def test_files_that_the_manifest_does_not_list_are_ignored(
    checkpoint: Path, output: Path, store: SequenceStore, mesh: Mesh
) -> None:
    expected = list(describe(checkpoint))
    shutil.copyfile(checkpoint / "dynamic_rank0.pt", checkpoint / "dynamic_rank1.pt")
    (checkpoint / "model.safetensors").write_bytes(b"stale")  # of an export
    (checkpoint / "tensors" / "__1_0.distcp").write_bytes(b"stale")
    assert list(describe(checkpoint)) == expected
    for attempt in attempts(checkpoint, output, store, mesh).values():
        attempt()


def test_auto_does_not_fall_back_from_a_checkpoint_of_a_newer_program(
    checkpoint: Path, output: Path, store: SequenceStore, mesh: Mesh
) -> None:
    (checkpoint / MANIFEST).write_text('{"version": 3}')
    with pytest.raises(DataError, match="newer version of this program"):
        run(config_of(store, output, **SAVING, ckpt_load_dir="auto"), mesh)


def test_a_progress_file_without_a_part_of_the_state_is_refused(
    checkpoint: Path, output: Path, store: SequenceStore, mesh: Mesh
) -> None:
    trainer = build(config_of(store, output / "new"), mesh)
    progress = json.loads((checkpoint / "progress.json").read_text())
    lacking = [
        json.dumps({key: progress[key] for key in progress if key != name}) for name in ("iteration", "position")
    ]
    for text in (*lacking, "", "[]", "null", "[" * 10**5):
        replace(checkpoint, "progress.json", text.encode())
        with pytest.raises(DamagedCheckpoint, match=r"progress\.json is damaged"):
            load(checkpoint, trainer.state, mesh)


def test_an_export_of_a_newer_program_is_not_damaged(checkpoint: Path, output: Path) -> None:
    exported = export(checkpoint, output / "exported")
    replace(exported, "config.json", b'{"version": 2}')
    with pytest.raises(DataError, match="exported by a newer version"):
        list(describe(exported))
