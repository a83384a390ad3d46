"""Export a trained model to a folder that a service loads with plain PyTorch, whole or as what has changed."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from hstu.base.errors import ConfigError, DataError
from hstu.base.ids import codes_of
from hstu.checkpoint.directory import Files, describe_files
from hstu.config.args import ContextParallelArgs, DataParallelArgs, TensorModelParallelArgs
from hstu.config.run_config import RunConfig
from hstu.data.features import running
from hstu.data.sampling.samples import build_samples
from hstu.data.store.reader import SampleItems
from hstu.model.program import ServingProgram, trace
from hstu.serve import runtime
from hstu.serve.contents import check_can_be_served, collect
from hstu.serve.loaded import LoadedModel, with_store
from hstu.serve.runtime.files import (
    CHANGES,
    COMPILED,
    DELTA,
    FACTS,
    MANIFEST,
    PROGRAM,
    SERVING,
    TABLES,
    VOCABULARY,
    WEIGHTS,
    Contents,
    Vocabulary,
    checksum_of,
    in_rows,
    moved,
    new_rows,
    read_contents,
    rows_at,
    rows_in,
    runs_of,
)
from hstu.serve.runtime.model import ITEM_VECTORS, machine
from hstu.train.inference import InferenceSource, StoredSource

TABLE_DTYPES = ("float32", "bfloat16", "int8")
TOLERANCE = 1e-4
"""Largest allowed difference of a logit or a vector component, relative to 1 + its absolute value."""
PACKAGE = "hstu_serving"
_CHECKED_USERS = 10
_REMEDY = "make a whole export: leave out --delta"
_SPAN = int(running.keys_of(torch.tensor([1]), torch.tensor([0])))
_KEYS = {"cells": "cells", "sums": "cells", "fitted": "fitted", "factors": "fitted"}
"""Table of running statistics → the table with the keys of its rows."""


def for_export(config: RunConfig, data: Path | None = None) -> RunConfig:
    """The configuration to load a model for export: one process, float32, PyTorch operators; on other ``data``."""
    network = replace(
        config.network, dtype_str="float32", compile=False, kernel_backend="pytorch", sequence_parallel=False
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
    table_dtype: str = "float32",
    base: Contents | None = None,
    compiles: bool = False,
) -> float | None:
    """Write an export into a new folder. Returns its ``difference`` from the model.

    ``trained`` is loaded with the configuration of ``for_export``, on one rank. The manifest is written last, so a
    folder with one is complete. ``base``: an earlier export, whose program is used if a new one would be equal.
    Raises ConfigError if the model reads inputs that requests cannot contain, or cannot be compiled here; DataError if
    the data with the item features is missing, or the export differs from the model.
    """
    check_can_be_served(trained)
    folder.mkdir(parents=True)
    with trained.inference():
        program = ServingProgram(trained.task)
        facts, tables, vocabulary = collect(trained, program)
        if base is not None and base.facts.get("program") == facts["program"]:
            for path in filter(Path.is_file, map(base.path_of, (PROGRAM, COMPILED))):
                shutil.copyfile(path, folder / path.name)
        else:
            torch.export.save(trace(program), folder / PROGRAM)
        if compiles and not (folder / COMPILED).is_file():
            compile_program(folder)
        for name, tensors in ((WEIGHTS, program.state_dict()), (TABLES, tables), (VOCABULARY, vocabulary)):
            write_tensors(folder / name, tensors)
        (folder / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
        package = Path(runtime.__file__).parent
        shutil.copytree(package, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(str(running.__file__), folder / PACKAGE)  # in the place of the module that imports it
    model = runtime.Model(Contents.read(folder))
    found = difference(trained, model)  # which enters ``inference`` itself: nested, it would undo the averages
    if found is not None and found > TOLERANCE:
        raise DataError(
            f"cannot export a program: it differs from the model by {found:.2g}, and {TOLERANCE:g} is allowed. "
            "This is a defect of the export for models of this configuration; please report it"
        )
    write_tensors(folder / TABLES, _reduced(tables, table_dtype))
    write_manifest(folder)
    return found


def compile_program(folder: Path) -> None:
    """Compile the program in a folder with AOTInductor, for x86-64 with AVX2. Raises ConfigError where that fails."""
    if shutil.which("g++") is None or not machine().startswith("x86_64 with AVX2"):
        raise ConfigError(f"--compile needs g++ and an x86_64 processor with AVX2; this is {machine()}. Leave it out")
    options = {
        "aot_inductor.metadata": {"for": machine()},
        "assert_indirect_indexing": False,  # the runtime makes the indices
        "cpp.march": "x86-64-v3",
        "cpp.simdlen": 256,
    }
    program = torch.export.load(folder / PROGRAM)
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / COMPILED), inductor_configs=options)


def write_manifest(folder: Path) -> Files:
    """Write the manifest of an export with all files of its folder, and return them, with sizes and checksums."""
    files = describe_files(folder, sorted(path for path in folder.rglob("*") if path.is_file()))
    manifest = {"sha256": checksum_of(files), "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return files


def difference(trained: LoadedModel, model: runtime.Model) -> float | None:
    """Largest difference between outputs of model and export for users of the data, relative to 1 + absolute value.

    The model reads the batches of an evaluation, the export reads requests: in ranking, for each sample with more
    candidates than fit into a sequence. Half of the users have the longest histories. None: the data is missing.
    """
    source = trained.source
    if isinstance(source, StoredSource):
        return None
    lengths, half = np.diff(source.store.offsets()), _CHECKED_USERS // 2
    if trained.config.task == "ranking":
        return _difference_of_samples(trained, source, model)
    users = np.union1d(np.arange(len(lengths))[:half], np.argsort(-lengths)[:half])
    expected = trained.user_vectors(source.history_batches(users)).cpu()
    return _largest(model.embed_batch([*trained.histories_of(users)]), expected)


def _difference_of_samples(trained: LoadedModel, source: InferenceSource, model: runtime.Model) -> float | None:
    """As ``difference``, of ranking: of the last candidate of each sample, which is its newest event where training has
    no candidates."""
    store, rule = source.store, model.facts["candidates"]
    samples = build_samples(store, trained.dataset, "ranking", "all", seed=0)
    counts = samples.num_candidates if rule["trained"] else np.ones_like(samples.start)
    ends = samples.start + samples.lengths - counts
    usable = np.flatnonzero(ends > samples.history_begin)
    longest = usable[np.argsort((samples.history_begin - ends)[usable])]
    rows = np.union1d(usable[: _CHECKED_USERS // 2], longest[: _CHECKED_USERS // 2])
    if not len(rows):
        return None
    batch = source.sample_batch(samples, rows)
    logits = trained.forward(batch).logits
    assert logits is not None, "a ranking model has logits"
    of_sample = logits.cpu().split(batch.num_labels.tolist())
    shown = SampleItems.of(store, samples.take(rows), ends[rows], counts[rows])
    times = shown.times() if model.reads_request_time else None
    histories, worst = [*trained.histories_of(samples.user[rows])], 0.0
    known = [name for name in model.encoder.known_before if name in histories[0].features]
    raw = {name: shown.values(name) for name in (store.item_feature, *known)}
    raw |= {name: store.raw_ids(name)[codes] for name, codes in raw.items() if store.feature(name).has_vocab}
    others = np.resize(np.arange(len(raw[store.item_feature])), rule["most"])  # beside them, nothing may change
    lengths, lasts = (ends - samples.history_begin)[rows], np.cumsum(counts[rows]) - 1
    for whole, length, last, expected in zip(histories, lengths.tolist(), lasts.tolist(), of_sample, strict=True):
        values = {name: each[[last, *others]].tolist() for name, each in raw.items()}
        shown_to = [runtime.Candidates(values.pop(store.item_feature), values)]
        at = None if times is None else int(times[last])
        (found,) = model.predict_batch([whole.cut(slice(length))], shown_to, at)
        worst = max(worst, _largest(found[0], expected[-1]))
    return worst


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


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file. Equal tensors give equal bytes."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


class DeltaSize(NamedTuple):
    """The rows of tables that a delta has, those of all tables; the bytes of the delta, and of the whole export."""

    changed: int
    rows: int
    num_bytes: int
    whole_bytes: int


def read_export(path: Path) -> Contents:
    """Read an export, or its folder "serving"; for a delta, with what it is based on. Raises DataError."""
    folder = path / SERVING if (path / SERVING).is_dir() else path
    if not (folder / FACTS).is_file():
        raise DataError(f"{path} is no export for serving; give what export.py has written with --program or --delta")
    try:
        return read_contents(folder)
    except runtime.ServingError as error:
        raise DataError(str(error)) from error


def write_delta(source: Path, base: Contents, folder: Path, path: str, threshold: float = 0.0) -> DeltaSize:
    """Write what has changed from ``base`` to the whole export in ``source`` to a new folder.

    ``path``: where the base is, as seen from the final place of ``folder``. ``threshold``: a row of a table is in the
    delta if one of its numbers has changed by more; above 0, the tables in ``source`` are replaced by those that
    result. Raises DataError if the exports have different programs or data types of tables.
    """
    new = read_export(source)
    _check_fits(base, new, threshold)
    changes, rules = _moves(base, new), dict[str, dict[str, Any]]()
    for file in (TABLES, VOCABULARY):
        limit = threshold if file == TABLES else 0.0
        rules[file], result = _compared(file, base, new, changes, limit)
        if limit:
            write_tensors(source / file, result)
            files = {**new.files, **describe_files(source, [source / file])}
            new = replace(new, files=files, tensors={**new.tensors, file: result})
    folder.mkdir(parents=True)
    write_tensors(folder / CHANGES, changes)
    delta = {"base": base.digest, "path": path, "threshold": threshold, "tensors": rules, "files": new.files}
    (folder / DELTA).write_text(json.dumps(delta, indent=1, ensure_ascii=False), encoding="utf-8")
    for name, entry in new.files.items():
        if name in (FACTS, WEIGHTS) or (name not in (TABLES, VOCABULARY) and base.files.get(name) != entry):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
    files = write_manifest(folder)
    found = read_contents(folder, base).tensors
    if not all(_is_same(found[file].get(name), own) for file in found for name, own in new.tensors[file].items()):
        raise DataError(f"the delta does not give what it was made of, a defect; please report it, and {_REMEDY}")
    tables = {name: rows for name, rows in new.tensors[TABLES].items() if rows.ndim == 2}
    return DeltaSize(
        changed=sum(len(changes.get(f"{TABLES}/{name}/values", ())) for name in tables),
        rows=sum(map(len, tables.values())),
        num_bytes=sum(entry["bytes"] for entry in files.values()),
        whole_bytes=sum(entry["bytes"] for entry in new.files.values()),
    )


def _check_fits(base: Contents, new: Contents, threshold: float) -> None:
    where = f"cannot write a delta from {base.folders[0]}"
    programs = [each.files[PROGRAM]["sha256"][:12] for each in (base, new)]
    if programs[0] != programs[1]:
        raise DataError(
            f"{where}: its {PROGRAM} has the sha256 {programs[0]}, and that of this model {programs[1]}, as another "
            f"configuration or another version of torch makes it; {_REMEDY}"
        )
    for name, rows in new.tensors[TABLES].items():
        before, own = (str(each.dtype)[6:] for each in (base.tensors[TABLES].get(name, rows), rows))
        if before != own:
            raise DataError(f"{where}: its table {name} has {before}, not {own}; give --table_dtype {before}")
        if own == "int8" and threshold:
            raise DataError(f"{where}: rows of int8 tables have a factor each; leave out --delta_threshold")


def _moves(base: Contents, new: Contents) -> dict[str, Tensor]:
    """Find the rows of the base by raw id. Returns "moves/<kind>" → runs, see ``Changes``.

    "ids F": places in the vocabulary of feature F; "table T": rows of table T; "running K": rows with the keys K.
    """
    found = dict[str, Tensor]()
    for name, facts in new.facts["features"].items():
        if name not in base.facts["features"] or facts["table"] not in base.tensors[TABLES]:
            continue
        own = Vocabulary.read(new.tensors[VOCABULARY], name, facts)
        theirs = Vocabulary.read(base.tensors[VOCABULARY], name, base.facts["features"][name])
        places = found[f"ids {name}"] = theirs.places(own.values_at(torch.arange(own.size)))
        nothing = torch.full((len(new.tensors[TABLES][facts["table"]]),), -1)
        rows, before = own.rows_of(torch.arange(own.size)), theirs.rows_of(places)
        is_known = (rows >= 0) & (before >= 0)
        found.setdefault(f"table {facts['table']}", nothing)[rows[is_known]] = before[is_known]
    for name in dict.fromkeys(_KEYS.values()):
        old, keyed = (each.tensors[VOCABULARY].get(f"running.{name}") for each in (base, new))
        if old is not None and keyed is not None:
            items = new_rows(found[f"ids {new.facts['item']}"])
            keys = items[(old // _SPAN).clamp(max=len(items) - 1)] * _SPAN + old % _SPAN
            order = keys.argsort()
            codes = torch.from_numpy(codes_of(keyed.numpy(), keys[order].numpy()))
            found[f"running {name}"] = rows_at(order, codes).masked_fill(codes < 0, -1)
    return {f"moves/{kind}": runs_of(rows) for kind, rows in found.items()}


def _compared(
    file: str, base: Contents, new: Contents, changes: dict[str, Tensor], limit: float
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Add what has changed in the tensors of a file to ``changes``. Returns (rules, the tensors that they give)."""
    old, own, rules, made = base.tensors[file], new.tensors[file], dict[str, Any](), dict[str, Tensor]()
    for name in sorted(own, key=lambda name: not name.endswith(".offsets")):  # bounds first
        if _is_same(old.get(name), own[name]):
            rules[name], made[name] = None, old[name]
            continue
        rows, key, made[name], rule = in_rows(name, own[name]), f"{file}/{name}", own[name], _rule(file, name, new)
        is_movable = name in old and all(
            f"moves/{rule[each]}" in changes for each in ("rows", "values") if each in rule
        )
        start = moved(name, rule, old, made, changes) if is_movable else None
        if start is None or (start.shape, start.dtype) != (rows.shape, rows.dtype):
            rules[name], changes[f"{key}/values"] = {}, rows
            continue
        differs = (_as_bytes(start) != _as_bytes(rows)).any(1)
        if limit:
            is_new = rows_in(changes[f"moves/{rule['rows']}"]) < 0
            differs &= is_new | ~((rows.float() - start.float()).abs().amax(1) <= limit)
        changed, rules[name] = differs.nonzero()[:, 0], rule
        if len(changed):
            changes |= {f"{key}/rows": runs_of(changed), f"{key}/values": rows[changed]}
        if limit:
            made[name] = start.index_copy(0, changed, rows[changed])
    return rules, made


def _is_same(left: Tensor | None, right: Tensor) -> bool:
    if left is None or (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    return _as_bytes(left).equal(_as_bytes(right))


def _as_bytes(rows: Tensor) -> Tensor:
    """uint8 [rows, bytes of a row], which also tells -0.0 from 0.0 and one NaN from another."""
    return rows.contiguous().view(len(rows), math.prod(rows.shape[1:])).view(torch.uint8)


def _rule(file: str, name: str, new: Contents) -> dict[str, Any]:
    """What the rows and numbers of a tensor are, see docs/export.md."""
    features, of_items = new.facts["features"], f"ids {new.facts['item']}"
    if file == TABLES:
        table = name.removesuffix(".scale")
        return {"rows": of_items if table == ITEM_VECTORS else f"table {table}"}
    kind, _, feature = name.removesuffix(".offsets").removesuffix(".utf8").partition(".")
    rule: dict[str, Any] = {"rows": f"ids {feature}" if kind in ("ids", "rows") else of_items}
    if kind == "running":
        keys = _KEYS.get(feature)
        return {"rows": f"running {keys}"} | ({"values": of_items, "span": _SPAN} if keys == feature else {})
    if kind in ("rows", "item") and feature in features and not name.endswith(".offsets"):
        rule |= {"values": f"table {features[feature]['table']}", "span": 1}
    bounds = name.removesuffix(".utf8") + ".offsets"
    return rule | ({"offsets": bounds} if bounds in new.tensors[VOCABULARY] else {})
