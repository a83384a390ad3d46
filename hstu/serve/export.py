"""Write the folder that a service needs to use a trained model with plain PyTorch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from hstu.base.errors import ConfigError
from hstu.checkpoint.directory import describe_files
from hstu.checkpoint.export import create_safetensors
from hstu.config.args import ContextParallelArgs, DataParallelArgs, DatasetArgs, TensorModelParallelArgs
from hstu.config.run_config import RunConfig
from hstu.serve import runtime
from hstu.serve.check import check, compare
from hstu.serve.contents import Contents, check_can_be_served, collect, task_of
from hstu.serve.loaded import LoadedModel
from hstu.serve.model_card import CardFacts, Measured, TableError, model_card
from hstu.serve.program import ServingProgram, trace
from hstu.serve.runtime.files import COMPILED, FACTS, MANIFEST, PROGRAM, TABLES, VOCABULARY, WEIGHTS, checksum_of

TABLE_DTYPES = ("float32", "bfloat16", "int8")
CARD, PACKAGE = "MODEL_CARD.md", "hstu_serving"


@dataclass(frozen=True)
class ServingOptions:
    """How to write the folder."""

    table_dtype: str = "float32"
    """One of TABLE_DTYPES."""
    compiles: bool = False
    """Also compile the program for this kind of machine (AOTInductor), which needs a C++ compiler."""


def for_export(config: RunConfig, data: Path | None = None) -> RunConfig:
    """The configuration with which to load a model for export: one process, float32, PyTorch's own operators.

    ``data``: preprocessed data that has what is known of items; None: that of the run.
    """
    dataset = config.dataset
    if data is not None and isinstance(dataset, DatasetArgs):
        dataset = replace(dataset, dataset_path=str(data), eval_dataset_path=None)
    network = replace(
        config.network,
        dtype_str="float32",
        bfloat16_residual=False,
        compile=False,
        kernel_backend="pytorch",
        sequence_parallel=False,
    )
    return replace(
        config,
        dataset=dataset,
        network=network,
        data_parallel=DataParallelArgs(),
        tensor_parallel=TensorModelParallelArgs(),
        context_parallel=ContextParallelArgs(),
    )


def write_serving(trained: LoadedModel, folder: Path, options: ServingOptions, card: CardFacts) -> list[str]:
    """Write the new folder ``folder`` and compare it with the model. Returns lines that say what was measured.

    Args:
        trained: loaded with the configuration of ``for_export``, on one rank.
        folder: it and its parents are created. It is complete once it has a manifest.
        options: data type of the tables, and whether to compile.
        card: what the model card says of the checkpoint.

    Raises:
        ConfigError: requests cannot have what the model reads, or the program cannot be compiled.
        DataError: the model reads features of items and the data is not there, or the result differs from the model.
    """
    check_can_be_served(trained)
    folder.mkdir(parents=True)
    with trained.inference():
        program = ServingProgram(task_of(trained))
        exported = trace(program)
        contents = collect(trained, program)
        _write(folder, contents, exported, program.state_dict())
        model = runtime.load(folder)
        measured = Measured(check(trained, model), options.table_dtype)
    if options.table_dtype != "float32":
        errors = _write_tables(folder / TABLES, contents.tables, options.table_dtype)
        _finish(folder)
        measured = replace(measured, tables=errors, change=compare(model, runtime.load(folder)))
    if options.compiles:
        compiled = _compile(exported, folder)
        measured = replace(measured, compiled=compare(runtime.load(folder), compiled).largest)
    facts = {**contents.facts, "measured": measured.as_json()}
    (folder / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / CARD).write_text(model_card(trained, contents, measured, card), encoding="utf-8")
    _finish(folder)
    return measured.lines()


def _write(folder: Path, contents: Contents, exported: ExportedProgram, weights: Mapping[str, Tensor]) -> None:
    """A complete folder with tables in float32."""
    torch.export.save(exported, folder / PROGRAM)
    _write_tensors(folder / WEIGHTS, weights)
    _write_tables(folder / TABLES, contents.tables, "float32")
    _write_tensors(folder / VOCABULARY, contents.vocabulary)
    (folder / FACTS).write_text(json.dumps(contents.facts), encoding="utf-8")
    package = Path(runtime.__file__).parent
    (folder / PACKAGE).mkdir()
    for path in sorted(package.glob("*.py")):
        shutil.copyfile(path, folder / PACKAGE / path.name)
    _finish(folder)


def _write_tables(path: Path, tables: Mapping[str, Tensor], dtype: str) -> dict[str, TableError]:
    """Write tables in one of TABLE_DTYPES. Returns the error of each."""
    stored: dict[str, Tensor] = {}
    errors = {}
    for name, rows in tables.items():
        parts = _reduced(name, rows, dtype)
        stored |= parts
        errors[name] = TableError.of(
            rows, runtime.Table(parts[name], parts.get(f"{name}.scale")).rows(torch.arange(len(rows)))
        )
    _write_tensors(path, stored)
    return errors


def _reduced(name: str, rows: Tensor, dtype: str) -> dict[str, Tensor]:
    """A table in another data type; in int8 with the factor of each row, of which the largest number becomes 127."""
    if dtype != "int8":
        return {name: rows.to(getattr(torch, dtype))}
    scale = rows.abs().amax(dim=1) / 127
    quantised = (rows / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8)
    return {name: quantised, f"{name}.scale": scale}


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.unlink(missing_ok=True)  # a model that has mapped the earlier file keeps it
    created = create_safetensors(path, {name: (tensor.size(), tensor.dtype) for name, tensor in tensors.items()})
    for name, tensor in created.items():
        tensor.copy_(tensors[name])


def _finish(folder: Path) -> None:
    """Write the manifest, which makes the folder complete."""
    (folder / MANIFEST).unlink(missing_ok=True)
    files = describe_files(folder, sorted(path for path in folder.rglob("*") if path.is_file()))
    manifest = {"sha256": checksum_of(files), "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _compile(exported: ExportedProgram, folder: Path) -> runtime.Model:
    """Compile the program for this kind of machine. Raises ConfigError where that is impossible."""
    try:
        torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / COMPILED))
        _finish(folder)
        return runtime.load(folder, compiled=True)
    except Exception as error:  # no compiler, one that is too old, an operator that it does not have, …
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(f"the program cannot be compiled here ({reason}); export without --aot") from error
