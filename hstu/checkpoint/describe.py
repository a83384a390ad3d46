"""Describes a checkpoint or an export in lines of text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hstu.checkpoint.directory import read_manifest
from hstu.checkpoint.dynamic import read_tables
from hstu.checkpoint.tensors import STATES, is_export, open_tensors, read_metadata, sizes_of_ranks


def describe(root: Path, with_optimizer: bool = False) -> Iterator[str]:
    """Describe the run, the tensors with their sizes, and the files. ``with_optimizer``: list each optimizer state."""
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


def _shape(size: torch.Size) -> str:
    return f"[{', '.join(map(str, size))}]"
