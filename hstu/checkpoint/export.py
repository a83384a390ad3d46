"""A trained model for tools outside: one safetensors file, and what is needed to look ids up in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from hstu.checkpoint import names, safetensors_file
from hstu.checkpoint.dynamic import dynamic_sizes
from hstu.checkpoint.manifest import describe_files, file_problems, read_manifest, write_manifest
from hstu.checkpoint.tensor_files import CONSOLIDATED, TensorFiles, open_tensors, read_description
from hstu.config.errors import DataError
from hstu.parallel.cut_tensor import CutTensor

FORMAT, VERSION = "hstu-export", 1
_GIN = "operative.gin"


def export(checkpoint: Path, output: Path) -> Path:
    """Write the weights of a checkpoint, and all that names them, into the new directory ``output``.

    ``model.safetensors`` has the weights under their names in the checkpoint (their moving averages, where the run
    keeps those) and ``ids.<feature>``, the raw ids of the rows of a feature's table (see RowIds); ``operative.gin``
    the configuration, ``config.json`` the sizes and the features of each table. Memory: what one rank has written of
    one tensor. Raises DataError for a damaged checkpoint, one with dynamic tables, and where ``output`` exists.
    """
    if output.exists():
        raise DataError(f"{output} exists; give the name of a directory that is not there yet")
    if problems := file_problems(checkpoint, read_manifest(checkpoint)):
        raise DataError("\n  ".join([f"cannot export {checkpoint}:", *problems]))
    if dynamic := dynamic_sizes(checkpoint):
        raise DataError(
            f"cannot export {checkpoint}: its dynamic tables ({', '.join(dynamic)}) have no place in an export. "
            "scripts/dynamic_table.py export writes them as Parquet, and scripts/recommend.py reads the checkpoint."
        )
    aside = output.with_name(f".writing_{output.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    described = _write_tensors(open_tensors(checkpoint), aside)
    shutil.copyfile(checkpoint / _GIN, aside / _GIN)
    progress = read_description(checkpoint)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "iteration": progress["iteration"],
        "versions": progress.get("versions", {}),
        "tables": progress.get("tables", {}),
        "tensors": described,
    }
    (aside / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
    write_manifest(aside, describe_files(aside, (path for path in aside.rglob("*") if path.is_file())))
    aside.rename(output)
    return output


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
