"""A trained model for tools outside: one safetensors file, and what is needed to look ids up in it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from hstu.checkpoint import names, safetensors_file
from hstu.checkpoint.manifest import describe_files, file_problems, read_manifest, write_manifest
from hstu.checkpoint.tensor_files import CONSOLIDATED, TensorFiles, open_tensors
from hstu.config.args import DatasetArgs
from hstu.config.errors import DataError
from hstu.config.gin_io import load
from hstu.config.gin_scan import scan
from hstu.config.run_config import RunConfig, Task
from hstu.data.store import SequenceStore, strings_files, vocabulary_stem
from hstu.parallel.cut_tensor import CutTensor
from hstu.train.sources import open_store

log = logging.getLogger(__name__)

FORMAT, VERSION = "hstu-export", 1
_IDS = "ids"
_GIN = "operative.gin"


def export(checkpoint: Path, output: Path) -> Path:
    """Write the weights of a checkpoint, and all that names them, into the new directory ``output``.

    ``model.safetensors`` has the weights under their names in the checkpoint (their moving averages, where the run
    keeps those), ``operative.gin`` the configuration, ``config.json`` the sizes, the features of each table and the
    files in ``ids/`` that tell the raw id of each row. Memory: one file's part of one tensor. Raises DataError for a
    damaged checkpoint, one without weights, and where ``output`` exists.
    """
    if output.exists():
        raise DataError(f"{output} exists; give the name of a directory that is not there yet")
    if problems := file_problems(checkpoint, read_manifest(checkpoint)):
        raise DataError("\n  ".join([f"cannot export {checkpoint}:", *problems]))
    aside = output.with_name(f".writing_{output.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    described = _write_tensors(open_tensors(checkpoint), aside)
    shutil.copyfile(checkpoint / _GIN, aside / _GIN)
    progress = json.loads((checkpoint / "progress.json").read_text())
    config = {
        "format": FORMAT,
        "version": VERSION,
        "iteration": progress["iteration"],
        "versions": progress.get("versions", {}),
        "tables": progress["tables"],
        "tensors": described,
        "ids": _write_ids(run_config(checkpoint), aside),
    }
    (aside / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
    write_manifest(aside, describe_files(aside, (path for path in aside.rglob("*") if path.is_file())))
    aside.rename(output)
    return output


def run_config(directory: Path) -> RunConfig:
    """The configuration that lies in a checkpoint or an export."""
    file = str(directory / _GIN)
    retrieval = any(binding.selector == "RetrievalArgs" for binding in scan([file], []).bindings)
    task: Task = "retrieval" if retrieval else "ranking"
    return load([file], [], task)


def _write_tensors(files: TensorFiles, directory: Path) -> dict[str, Any]:
    weights = [name for name in files.sizes if not names.split(name)[1]]
    sources = {name: names.join(name, names.AVERAGE) for name in weights}
    sources = {name: average if average in files.sizes else name for name, average in sources.items()}
    sizes = {name: (files.sizes[name], files.dtypes[name]) for name in weights}
    tensors = safetensors_file.create_file(directory / CONSOLIDATED, sizes, {"format": "pt"})
    files.read({sources[name]: CutTensor.whole(tensor) for name, tensor in tensors.items()})
    return {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "is_average": sources[name] != name,
        }
        for name, tensor in tensors.items()
    }


def _write_ids(config: RunConfig, directory: Path) -> dict[str, Any]:
    """Copy the store's vocabularies; feature → its files and how to read them. Nothing where there is no store."""
    if not isinstance(config.dataset, DatasetArgs):
        return {}
    try:
        store = open_store(config.dataset)
    except DataError as error:
        log.warning("the export goes without the raw ids of the tables' rows: %s", error)
        return {}
    (directory / _IDS).mkdir()
    return {
        name: _copy_vocabulary(store, name, directory) for name, feature in store.features.items() if feature.has_vocab
    }


def _copy_vocabulary(store: SequenceStore, feature: str, directory: Path) -> dict[str, Any]:
    """Row i of a feature's table has the raw id i of the file: int64, or strings as offsets into UTF-8 bytes."""
    stem = vocabulary_stem(feature)
    numbers = f"{stem}.npy"
    files = [numbers] if (store.path / numbers).is_file() else list(strings_files(stem))
    for name in files:
        shutil.copyfile(store.path / name, directory / _IDS / name)
    return {"kind": "int64" if files == [numbers] else "strings", "files": [f"{_IDS}/{name}" for name in files]}
