"""What is inside a checkpoint or an export, and how two of them differ, as lines of text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hstu.checkpoint.directory import read_manifest, verified_file
from hstu.checkpoint.dynamic import read_tables
from hstu.checkpoint.matching import config_differences
from hstu.checkpoint.progress import sizes_of_ranks
from hstu.checkpoint.tensors import DYNAMIC, STATES, StoredTensors, is_export, open_tensors, read_metadata
from hstu.parallel.dynamic.content import TableContent, merged
from hstu.parallel.dynamic.slots import counts_of, steps_of


def describe(root: Path, with_optimizer: bool = False) -> Iterator[str]:
    """Describe the state of the run, the tensors with their sizes, and the files.

    ``with_optimizer``: name each state of the optimizers; otherwise they are one line.
    """
    files, tensors = read_manifest(root), open_tensors(root)
    bytes_of = {name: math.prod(size) * tensors.dtypes[name].itemsize for name, size in tensors.sizes.items()}
    yield f"{'export' if is_export(root) else 'checkpoint'} {root}"
    for name, value in _facts(root).items():
        yield f"  {name:<22} {value}"
    yield f"\n{len(bytes_of)} tensors, {sum(bytes_of.values()):,} bytes"
    states = [] if with_optimizer else [name for name in bytes_of if name.startswith(STATES)]
    for name in sorted(bytes_of.keys() - states):
        dtype = str(tensors.dtypes[name]).removeprefix("torch.")
        yield f"  {bytes_of[name]:>14,}  {dtype:<9} {_shape(tensors.sizes[name]):<16} {name}"
    if states:
        total = sum(bytes_of[name] for name in states)
        yield f"  {total:>14,}  {len(states)} states of the optimizers (--optimizer lists them)"
    yield f"\n{len(files)} files, {sum(entry['bytes'] for entry in files.values()):,} bytes"
    for name, entry in files.items():
        yield f"  {entry['bytes']:>14,}  {name}"


def _facts(root: Path) -> dict[str, Any]:
    metadata = read_metadata(root)
    facts = {"iteration": metadata["iteration"]}
    if not is_export(root):
        position = metadata["position"]
        facts["data"] = f"epoch {position['epoch']}, {position['consumed']} samples consumed"
        ranks, tp, cp = sizes_of_ranks(metadata)
        facts["ranks"] = f"{ranks} in groups of {tp * cp}"
        facts["learning rate"] = f"× {metadata['optimizer']['lr_multiplier']}"
    dynamic = read_tables(root)
    for table, entry in metadata.get("tables", {}).items():
        features = ", ".join(entry["features"])
        if table in dynamic:
            ids, width = sum(len(part.ids) for part in dynamic[table]), dynamic[table][0].rows.shape[1]
            facts[f"dynamic table {table}"] = f"{ids:,} ids × {width} of {features}"
        else:
            facts[f"table {table}"] = f"{entry['rows']} × {entry['dim']} of {features}"
    return facts | {f"version of {name}": version for name, version in metadata.get("versions", {}).items()}


def diff(left: Path, right: Path) -> Iterator[str]:
    """Describe how ``right`` differs from ``left``: facts, configuration, tensors. No line if they are equal.

    Reads both, one tensor at a time.
    """
    left_facts, right_facts = _facts(left), _facts(right)
    for name in dict.fromkeys([*left_facts, *right_facts]):
        if left_facts.get(name) != right_facts.get(name):
            yield f"{name}: {left_facts.get(name, 'nothing')} | {right_facts.get(name, 'nothing')}"
    for entry in config_differences(
        *(verified_file(path, "operative.gin").read_text(encoding="utf-8") for path in (left, right))
    ):
        yield f"{entry.name}: {' | '.join(entry.values())}"
    left_tensors, right_tensors = open_tensors(left), open_tensors(right)
    for name in sorted({*left_tensors.sizes, *right_tensors.sizes}):
        if not name.startswith(DYNAMIC) and (line := _stored_difference(name, left_tensors, right_tensors)):
            yield line
    left_tables, right_tables = read_tables(left), read_tables(right)
    for name in sorted(left_tables.keys() & right_tables.keys()):
        yield from _table_differences(name, merged(left_tables[name]), merged(right_tables[name]))


def _stored_difference(name: str, left: StoredTensors, right: StoredTensors) -> str | None:
    if name not in left.sizes or name not in right.sizes:
        return f"{name}: only in the {'first' if name in left.sizes else 'second'}"
    if left.sizes[name] != right.sizes[name]:
        return f"{name}: {_shape(left.sizes[name])} | {_shape(right.sizes[name])}"
    return _difference(name, left.read_whole(name), right.read_whole(name))


def _difference(name: str, first: Tensor, second: Tensor) -> str | None:
    if first.shape != second.shape:
        return f"{name}: {_shape(first.shape)} | {_shape(second.shape)}"
    if torch.equal(first, second):
        return None
    count = int((first != second).sum())
    largest = float((first.double() - second.double()).abs().max())
    return f"{name}: {count:,} of {first.numel():,} differ, by up to {largest:.6g}"


def _table_differences(name: str, left: TableContent, right: TableContent) -> Iterator[str]:
    """Describe the ids that only one dynamic table has, and the differences in what both store for the common ids."""
    in_right, in_left = torch.isin(left.ids, right.ids), torch.isin(right.ids, left.ids)
    if not (in_right.all() and in_left.all()):
        first, second = int((~in_right).sum()), int((~in_left).sum())
        yield f"{DYNAMIC}{name}: {first:,} ids only in the first, {second:,} only in the second"
    left_values, right_values = _values(left.select(in_right)), _values(right.select(in_left))
    for part in [part for part in left_values if part in right_values]:
        if line := _difference(f"{DYNAMIC}{name}.{part}", left_values[part], right_values[part]):
            yield line


def _values(content: TableContent) -> dict[str, Tensor]:
    """Return what a dynamic table stores for its ids, in ascending order of ids."""
    content = content.select(content.ids.argsort())
    values = {"weight": content.rows, **content.states}
    if content.step:  # an export has no counts and steps
        counts, steps = (function(content.policy, content.scores) for function in (counts_of, steps_of))
        values |= {"count": counts, "step": steps, "changed": content.changed}
    return values


def _shape(size: torch.Size) -> str:
    return f"[{', '.join(map(str, size))}]"
