"""What is inside a checkpoint or an export, and how two of them differ, as lines to print."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hstu.checkpoint.architecture import differences
from hstu.checkpoint.dynamic import dynamic_sizes, read_tables
from hstu.checkpoint.manifest import read_manifest
from hstu.checkpoint.names import DYNAMIC
from hstu.checkpoint.store import find
from hstu.checkpoint.tensor_files import CONSOLIDATED, TensorFiles, open_tensors, read_description
from hstu.parallel.dynamic.content import TableContent, merged
from hstu.parallel.dynamic.slots import counts_of, steps_of


def locate(name: str) -> Path:
    """The checkpoint or export of that name, or the newest checkpoint in it. Raises DataError where there is none."""
    found = find(f"{Path(name)}/", "")  # a directory, whatever its name means to a run
    assert found is not None
    return found


def describe(root: Path) -> Iterator[str]:
    """Where its run stood, its tensors with their sizes, and its files."""
    files, tensors = read_manifest(root), open_tensors(root)
    yield f"{'export' if (root / CONSOLIDATED).is_file() else 'checkpoint'} {root}"
    for name, value in _facts(root).items():
        yield f"  {name:<22} {value}"
    yield f"\n{len(tensors.sizes)} tensors, {sum(map(_bytes_of(tensors), tensors.sizes)):,} bytes"
    for name in sorted(tensors.sizes):
        yield f"  {_bytes_of(tensors)(name):>14,}  {_dtype(tensors, name):<9} {_shape(tensors.sizes[name]):<16} {name}"
    yield f"\n{len(files)} files, {sum(entry['bytes'] for entry in files.values()):,} bytes"
    for name, entry in files.items():
        yield f"  {entry['bytes']:>14,}  {name}"


def diff(left: Path, right: Path) -> Iterator[str]:
    """How ``right`` differs from ``left``: facts, lines of the configuration, tensors. Nothing where they are equal.

    Reads both, one tensor at a time.
    """
    ours, theirs = _facts(left), _facts(right)
    for name in dict.fromkeys([*ours, *theirs]):
        if ours.get(name) != theirs.get(name):
            yield f"{name}: {ours.get(name, 'nothing')} | {theirs.get(name, 'nothing')}"
    texts = [(path / "operative.gin").read_text() for path in (left, right)]
    for entry in differences(*texts):
        first, second = ("nothing" if value is None else value for value in (entry.stored, entry.own))
        yield f"{entry.name}: {first} | {second}"
    mine, other = open_tensors(left), open_tensors(right)
    for name in sorted({*mine.sizes, *other.sizes}):
        if not name.startswith(DYNAMIC) and (line := _tensor_difference(name, mine, other)):
            yield line
    tables, others = read_tables(left), read_tables(right)
    for name in sorted(tables.keys() & others.keys()):
        yield from _table_differences(name, merged(tables[name]), merged(others[name]))


def _tensor_difference(name: str, left: TensorFiles, right: TensorFiles) -> str | None:
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
    differing = first != second
    largest = float((first.double() - second.double()).abs().max())
    return f"{name}: {int(differing.sum()):,} of {first.numel():,} differ, by up to {largest:.6g}"


def _table_differences(name: str, left: TableContent, right: TableContent) -> Iterator[str]:
    """Of a dynamic table: ids that one alone has, and what belongs to the ids of both, wherever it lies."""
    first, second = (torch.isin(one.ids, other.ids) for one, other in ((left, right), (right, left)))
    if not (first.all() and second.all()):
        counts = [int((~common).sum()) for common in (first, second)]
        yield f"{DYNAMIC}{name}: {counts[0]:,} ids only in the first, {counts[1]:,} only in the second"
    ours, theirs = (_values(content.chosen(common)) for content, common in ((left, first), (right, second)))
    for part in [part for part in ours if part in theirs]:
        if line := _difference(f"{DYNAMIC}{name}.{part}", ours[part], theirs[part]):
            yield line


def _values(content: TableContent) -> dict[str, Tensor]:
    """What belongs to the ids of a dynamic table, in their order."""
    content = content.chosen(content.ids.argsort())
    values = {"weight": content.rows, **content.states}
    if content.step:  # an export tells no more of them
        counts, steps = (part(content.policy, content.scores) for part in (counts_of, steps_of))
        values |= {"count": counts, "step": steps, "changed": content.changed}
    return values


def _facts(root: Path) -> dict[str, Any]:
    """What progress.json (config.json of an export) tells of the run."""
    exported = (root / CONSOLIDATED).is_file()
    told = read_description(root)
    facts = {"iteration": told["iteration"]}
    if not exported:
        position = told["position"]
        facts["data"] = f"epoch {position['epoch']}, {position['consumed']} samples consumed"
        facts["ranks"] = f"{told['world_size']} in groups of {told.get('tensor_parallel_size', 1)}"
        facts["learning rate"] = f"× {told['optimizer']['lr_multiplier']}"
    dynamic = dynamic_sizes(root)
    for table, entry in told.get("tables", {}).items():
        if table in dynamic:
            ids, width = dynamic[table]
            facts[f"dynamic table {table}"] = f"{ids:,} ids × {width} of {', '.join(entry['features'])}"
            continue
        facts[f"table {table}"] = f"{entry['rows']} × {entry['dim']} of {', '.join(entry['features'])}"
    return facts | {f"version of {name}": version for name, version in told.get("versions", {}).items()}


def _bytes_of(tensors: TensorFiles) -> Any:
    return lambda name: math.prod(tensors.sizes[name]) * tensors.dtypes[name].itemsize


def _dtype(tensors: TensorFiles, name: str) -> str:
    return str(tensors.dtypes[name]).removeprefix("torch.")


def _shape(size: torch.Size) -> str:
    return f"[{', '.join(map(str, size))}]"
