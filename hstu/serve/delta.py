"""Write an export as what has changed since an earlier one."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hstu.base.errors import DataError
from hstu.base.ids import codes_of
from hstu.checkpoint.directory import describe_files
from hstu.data.features.running import keys_of
from hstu.serve.export import write_manifest, write_tensors
from hstu.serve.runtime import ServingError
from hstu.serve.runtime.delta import Contents, Moves, in_rows, moved, new_rows, read_contents, rows_in, runs_of
from hstu.serve.runtime.files import (
    CHANGES,
    DELTA,
    FACTS,
    PROGRAM,
    SERVING,
    TABLES,
    VOCABULARY,
    WEIGHTS,
    Vocabulary,
    rows_at,
)
from hstu.serve.runtime.model import ITEM_VECTORS

_REMEDY = "make a whole export: leave out --delta"
_SPAN = int(keys_of(torch.tensor([1]), torch.tensor([0])))
_KEYS = {"cells": "cells", "sums": "cells", "fitted": "fitted", "factors": "fitted"}
"""Table of running statistics → the table with the keys of its rows."""


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
    except ServingError as error:
        raise DataError(str(error)) from error


def write_delta(source: Path, base: Contents, folder: Path, path: str, threshold: float = 0.0) -> DeltaSize:
    """Write what has changed from ``base`` to the whole export in ``source`` to a new folder.

    Args:
        source: a folder "serving". With a threshold above 0, its tables are replaced by those that result.
        base: the earlier export.
        folder: the folder to create. The manifest is written last.
        path: where the base is, as seen from the final place of ``folder``.
        threshold: a row of a table is in the delta if one of its numbers has changed by more. 0: all is exact.

    Raises DataError if the exports have different programs or data types of tables.
    """
    new = read_export(source)
    _check_fits(base, new, threshold)
    moves = _moves(base, new)
    rules = dict[str, dict[str, Any]]()
    changes = {f"moves/{kind}": runs for kind, runs in moves.items()}
    for file in (TABLES, VOCABULARY):
        limit = threshold if file == TABLES else 0.0
        rules[file], own, result = _compared(file, base, new, moves, limit)
        changes |= own
        if limit:
            write_tensors(source / file, result)
            files = {**new.files, **describe_files(source, [source / file])}
            new = replace(new, files=files, tensors={**new.tensors, file: result})
    folder.mkdir(parents=True)
    write_tensors(folder / CHANGES, changes)
    delta = {"base": base.digest, "path": path, "threshold": threshold, "moves": [*moves]}
    text = json.dumps({**delta, "tensors": rules, "files": new.files}, indent=1, ensure_ascii=False)
    (folder / DELTA).write_text(text, encoding="utf-8")
    for name, entry in new.files.items():
        if name in (FACTS, WEIGHTS) or (name not in (TABLES, VOCABULARY) and base.files.get(name) != entry):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
    files = write_manifest(folder)
    found = read_contents(folder, base).tensors
    if not all(_is_same(found[file].get(name), own) for file in found for name, own in new.tensors[file].items()):
        raise DataError(f"the delta does not give what it was made of, a defect; please report it, and {_REMEDY}")
    counted = [name for name, rows in new.tensors[TABLES].items() if rows.ndim == 2]
    return DeltaSize(
        changed=sum(rule["changed"] for name in counted if (rule := rules[TABLES][name])),
        rows=sum(len(new.tensors[TABLES][name]) for name in counted),
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


def _moves(base: Contents, new: Contents) -> Moves:
    """Find the rows of the base by raw id, only of kinds of rows whose places have changed.

    "ids F": places in the vocabulary of feature F; "table T": rows of table T; "running K": rows with the keys K.
    """
    found, lengths = dict[str, Tensor](), dict[str, int]()
    for name, facts in new.facts["features"].items():
        if name not in base.facts["features"] or facts["table"] not in base.tensors[TABLES]:
            continue
        own = Vocabulary.read(new.tensors[VOCABULARY], name, facts)
        theirs = Vocabulary.read(base.tensors[VOCABULARY], name, base.facts["features"][name])
        places, table = theirs.places(own.values_at(torch.arange(own.size))), f"table {facts['table']}"
        found[f"ids {name}"], lengths[f"ids {name}"] = places, theirs.size
        lengths[table] = len(base.tensors[TABLES][facts["table"]])
        of_table = found.setdefault(table, torch.full((len(new.tensors[TABLES][facts["table"]]),), -1))
        rows, before = own.rows_of(torch.arange(own.size)), theirs.rows_of(places)
        is_known = (rows >= 0) & (before >= 0)
        of_table[rows[is_known]] = before[is_known]
    for name in dict.fromkeys(_KEYS.values()):
        old, keyed = (each.tensors[VOCABULARY].get(f"running.{name}") for each in (base, new))
        if old is not None and keyed is not None:
            items = new_rows(found[f"ids {new.facts['item']}"])
            keys = items[(old // _SPAN).clamp(max=len(items) - 1)] * _SPAN + old % _SPAN
            order = keys.argsort()
            codes = torch.from_numpy(codes_of(keyed.numpy(), keys[order].numpy()))
            found[f"running {name}"] = rows_at(order, codes).masked_fill(codes < 0, -1)
            lengths[f"running {name}"] = len(old)
    return {
        kind: runs_of(rows)
        for kind, rows in found.items()
        if len(rows) != lengths[kind] or not rows.equal(torch.arange(len(rows)))
    }


def _compared(
    file: str, base: Contents, new: Contents, moves: Moves, limit: float
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Compare the tensors of a file. Returns (rules, changes, the tensors that they give)."""
    old, own, rules = base.tensors[file], new.tensors[file], dict[str, Any]()
    changes, made = dict[str, Tensor](), dict[str, Tensor]()
    for name in sorted(own, key=lambda name: not name.endswith(".offsets")):  # bounds first
        if _is_same(old.get(name), own[name]):
            rules[name], made[name] = None, old[name]
            continue
        rows, key, made[name] = in_rows(name, own[name]), f"{file}/{name}", own[name]
        rule = _rule(file, name, new) | {"length": len(rows)}
        start = moved(name, rule, old, made, moves) if name in old else None
        if start is None or (start.shape, start.dtype) != (rows.shape, rows.dtype):
            rules[name], changes[f"{key}/values"] = rule | {"changed": len(rows), "whole": True}, rows
            continue
        differs = (_as_bytes(start) != _as_bytes(rows)).any(1)
        if limit:
            is_new = rows_in(moves[rule["rows"]]) < 0 if rule["rows"] in moves else torch.tensor(False)
            differs &= is_new | ~((rows.float() - start.float()).abs().amax(1) <= limit)
        changed = differs.nonzero()[:, 0]
        rules[name] = rule | {"changed": len(changed), "whole": False}
        if len(changed):
            changes |= {f"{key}/rows": runs_of(changed), f"{key}/values": rows[changed]}
        if limit:
            made[name] = start.index_copy(0, changed, rows[changed])
    return rules, changes, made


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
