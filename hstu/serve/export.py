"""Export a trained model to a folder that a service loads with plain PyTorch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from hstu.base.errors import DataError
from hstu.checkpoint.directory import describe_files
from hstu.config.args import ContextParallelArgs, DataParallelArgs, DatasetArgs, TensorModelParallelArgs
from hstu.config.run_config import RunConfig
from hstu.serve import runtime
from hstu.serve.command import Candidates
from hstu.serve.contents import check_can_be_served, collect
from hstu.serve.loaded import LoadedModel, with_store
from hstu.serve.predict import RankingPredictor
from hstu.serve.program import ServingProgram, trace
from hstu.serve.runtime.files import FACTS, MANIFEST, PROGRAM, TABLES, VOCABULARY, WEIGHTS, checksum_of
from hstu.train.inference import StoredSource

TABLE_DTYPES = ("float32", "bfloat16", "int8")
TOLERANCE = 1e-4
"""Largest allowed difference of a logit or a vector component, relative to 1 + its absolute value."""
CARD, PACKAGE = "MODEL_CARD.md", "hstu_serving"
_CHECKED_USERS = 10


def for_export(config: RunConfig, data: Path | None = None) -> RunConfig:
    """The configuration to load a model for export: one process, float32, PyTorch operators; on other ``data``."""
    network = replace(
        config.network,
        dtype_str="float32",
        compile=False,
        kernel_backend="pytorch",
        sequence_parallel=False,
    )
    return replace(
        config if data is None else with_store(config, data),
        network=network,
        data_parallel=DataParallelArgs(),
        tensor_parallel=TensorModelParallelArgs(),
        context_parallel=ContextParallelArgs(),
    )


def write_serving(
    trained: LoadedModel,
    folder: Path,
    *,
    evaluations: Mapping[str, Mapping[str, float]] | None = None,
    table_dtype: str = "float32",
) -> float | None:
    """Write an export into a new folder. Returns its ``difference`` from the model.

    Args:
        trained: loaded with the configuration of ``for_export``, on one rank.
        folder: the folder to create, with its parents. The manifest is written last, so a folder with one is complete.
        evaluations: split → metric → value, for the model card.
        table_dtype: one of TABLE_DTYPES.

    Raises:
        ConfigError: the model reads inputs that requests cannot contain.
        DataError: the data with the item features is missing, or the export differs from the model.
    """
    check_can_be_served(trained)
    folder.mkdir(parents=True)
    with trained.inference():
        program = ServingProgram(trained.task)
        exported = trace(program)
        facts, tables, vocabulary = collect(trained, program)
        torch.export.save(exported, folder / PROGRAM)
        for name, tensors in ((WEIGHTS, program.state_dict()), (TABLES, tables), (VOCABULARY, vocabulary)):
            _write_tensors(folder / name, tensors)
        text = json.dumps(facts, indent=1, ensure_ascii=False)
        (folder / FACTS).write_text(text, encoding="utf-8")
        package = Path(runtime.__file__).parent
        shutil.copytree(package, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
        found = difference(trained, runtime.Model(folder, json.loads(text)))
    if found is not None and found > TOLERANCE:
        raise DataError(
            f"cannot export a program: it differs from the model by {found:.2g}, and {TOLERANCE:g} is allowed. "
            "This is a defect of the export for models of this configuration; please report it"
        )
    _write_tensors(folder / TABLES, _reduced(tables, table_dtype))
    (folder / CARD).write_text(_card(trained, tables, table_dtype, evaluations or {}), encoding="utf-8")
    files = describe_files(folder, sorted(path for path in folder.rglob("*") if path.is_file()))
    manifest = {"sha256": checksum_of(files), "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return found


def difference(trained: LoadedModel, model: runtime.Model) -> float | None:
    """Largest difference between outputs of model and export for users of the data, relative to 1 + absolute value.

    The model reads batches of the store, the export reads requests. None: the data is missing, or the export scores a
    candidate as the newest event, which batches of the store cannot express.
    """
    source, facts = trained.source, model.facts
    if isinstance(source, StoredSource) or (facts["task"] == "ranking" and not facts["candidates"]["apart"]):
        return None
    store, users = source.store, np.arange(min(_CHECKED_USERS, source.store.num_users))
    histories = list(trained.histories_of(users))
    if facts["task"] == "retrieval":
        expected = trained.user_vectors(source.history_batches(users)).cpu()
        return _largest(model.embed_batch(histories), expected)
    newest = np.asarray(store.offsets())[users + 1] - 1  # the newest event of each user is the candidate
    known = [name for name in model.encoder.known_before if name in store.features and name in histories[0].features]
    values = {name: store.sequence(name)[newest] for name in known}
    given = Candidates(users, np.ones_like(users), store.sequence(store.item_feature)[newest], values)
    expected = torch.from_numpy(RankingPredictor(trained, given).logits(given))
    shown = [
        runtime.Candidates(each.items[-1:], {name: each.features[name][-1:] for name in known}) for each in histories
    ]
    return _largest(torch.cat(model.predict_batch(histories, shown)), expected)


def _largest(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs() / (1 + expected.abs())).nan_to_num(torch.inf).max())


def _reduced(tables: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Convert tables to another dtype. int8 tables have one scale per row, which maps its largest value to 127."""
    if dtype != "int8":
        return {name: rows.to(getattr(torch, dtype)) for name, rows in tables.items()}
    found = {}
    for name, rows in tables.items():
        scale = rows.abs().amax(dim=1) / 127
        found[name] = (rows / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8)
        found[f"{name}.scale"] = scale
    return found


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _card(
    trained: LoadedModel, tables: Mapping[str, Tensor], table_dtype: str, evaluations: Mapping[str, Mapping[str, float]]
) -> str:
    dataset = trained.config.dataset
    assert isinstance(dataset, DatasetArgs)
    is_retrieval = trained.config.task == "retrieval"
    purpose = "recommends the next item of a user" if is_retrieval else "predicts what a user does with given items"
    metrics = [
        f"- {split}: {name} {value:.4f}" for split, values in evaluations.items() for name, value in values.items()
    ]
    sizes = [f"- {name}: {len(rows):,} × {rows.shape[1]}, {table_dtype}" for name, rows in tables.items()]
    left_out = "\nItems that the user has had are left out, here and in recommendations by default.\n"
    return f"""# HSTU model on {dataset.dataset_name}

This model {purpose}. It reads up to {trained.source.max_items:,} of the newest events of a user.

## Metrics
{chr(10).join(metrics) or "The checkpoint has no record of an evaluation."}
{left_out if trained.leaves_out_seen else ""}
## Tables
{chr(10).join(sizes)}

## Configuration
```
{trained.config.operative_gin().strip()}
```
"""
