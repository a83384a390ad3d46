"""A trained model for tools outside: one safetensors file, and what is needed to look ids up in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from hstu.checkpoint import names, safetensors_file
from hstu.checkpoint.dynamic import read_tables
from hstu.checkpoint.dynamic_export import exported_sizes, fill_exported
from hstu.checkpoint.manifest import describe_files, file_problems, read_manifest, write_manifest
from hstu.checkpoint.tensor_files import CONSOLIDATED, TensorFiles, open_tensors, read_description
from hstu.config.errors import DataError
from hstu.parallel.cut_tensor import CutTensor
from hstu.parallel.dynamic.content import TableContent

FORMAT, VERSION = "hstu-export", 1
_GIN = "operative.gin"


def export(checkpoint: Path, output: Path) -> Path:
    """Write the weights of a checkpoint, and all that names them, into the new directory ``output``.

    ``model.safetensors`` has the weights under their names in the checkpoint (their moving averages, where the run
    keeps those), ``ids.<feature>``, the raw ids of the rows of a feature's table (see RowIds), and dynamic tables (see
    dynamic_export.py); ``operative.gin`` the configuration, ``config.json`` the sizes and the features of each table.
    Memory: what one rank has written of one tensor. Raises DataError for a damaged checkpoint, and where ``output``
    exists.
    """
    if output.exists():
        raise DataError(f"{output} exists; give the name of a directory that is not there yet")
    if problems := file_problems(checkpoint, read_manifest(checkpoint)):
        raise DataError("\n  ".join([f"cannot export {checkpoint}:", *problems]))
    aside = output.with_name(f".writing_{output.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    dynamic = read_tables(checkpoint)
    described = _write_tensors(open_tensors(checkpoint), dynamic, aside)
    shutil.copyfile(checkpoint / _GIN, aside / _GIN)
    progress = read_description(checkpoint)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "iteration": progress["iteration"],
        "versions": progress.get("versions", {}),
        "tables": {name: _table(entry, dynamic.get(name)) for name, entry in progress.get("tables", {}).items()},
        "tensors": described,
    }
    (aside / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
    write_manifest(aside, describe_files(aside, (path for path in aside.rglob("*") if path.is_file())))
    aside.rename(output)
    return output


def _table(entry: dict[str, Any], parts: list[TableContent] | None) -> dict[str, Any]:
    """What is told of a table; ``parts``: of a dynamic one, of which the rows are that are in use."""
    return entry if parts is None else entry | {"rows": sum(len(part.ids) for part in parts), "dynamic": True}


def _write_tensors(files: TensorFiles, dynamic: dict[str, list[TableContent]], directory: Path) -> dict[str, Any]:
    weights = [name for name in files.sizes if not names.split(name)[1]]
    sources = {name: names.join(name, names.AVERAGE) for name in weights}
    sources = {name: average if average in files.sizes else name for name, average in sources.items()}
    sizes = {name: (files.sizes[name], files.dtypes[name]) for name in weights}
    sizes |= exported_sizes(dynamic)
    tensors = safetensors_file.create_file(directory / CONSOLIDATED, sizes, {"format": "pt"})
    files.read({source: CutTensor.whole(tensors[name]) for name, source in sources.items()})
    fill_exported(tensors, dynamic)
    return {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "is_average": sources.get(name, name) != name,
        }
        for name, tensor in tensors.items()
    }
