"""Models with random weights and every kind of feature, exported for serving."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from hstu import api
from hstu.api import TrainedModel
from hstu.config.args import EmbeddingArgs
from hstu.data.datasets.spec import UNKNOWN
from hstu.data.sampling.sampler import SamplerPosition
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.parallel.tables import dynamic_tables
from hstu.serve import runtime
from hstu.serve.delta import DeltaSize, read_export, write_delta
from hstu.serve.export import for_export, write_manifest, write_serving, write_tensors
from hstu.serve.runtime import History
from hstu.serve.runtime.files import checksum_of
from hstu.train.builder import build_model, build_state
from hstu.train.inference import InferenceSource, zero_spare_rows
from tests.conftest import write_small_store
from tests.train.tiny import ITEM_FEATURES, ITEMS, tables_of, tables_with_dynamic, tiny_config, walks

EVENT_CATEGORIES = ("device", "watched")
RANGES = {"watched": {f"value 00{code}": first for code, first in enumerate((0.0, 0.5, 1.0, 7.5))}}
"""The values of "watched" are ranges of numbers, or unknown."""
FEATURES = ["colour", "tags", "device", "watched", "price", "shape", "spent"]
FEATURES += ["hour_of_day", "day_of_week", "time_gap"]
EVERY_FEATURE: dict[str, Any] = {"side_feature_names": FEATURES, "known_after": ["watched", "spent"]}
"""Options of DatasetArgs."""
BIAS: dict[str, Any] = {"position_encoding": ("absolute", "relative_bias")}
PUBLISHED: dict[str, Any] = {"norm_affine": False, "uvqk_bias": False, "output_bias": True}
"""Options of NetworkArgs: the weights of the published layer."""


def feature_store(path: Path, **options: Any) -> SequenceStore:
    """The walks, with features of items (category, list, number, vector) and of events (categories, number)."""
    rng, found = np.random.default_rng(0), walks()
    rows: list[list[int]] = found["items"]
    shape = rng.normal(size=(ITEMS, 3)).astype(np.float32)
    shape[2] = np.nan
    return write_small_store(
        path,
        **found,
        item_features=ITEM_FEATURES,
        event_features={
            "device": [[i % 3 for i in row] for row in rows],
            "watched": [[i % 4 for i in r] for r in rows],
        },
        item_numbers={"price": rng.normal(size=(ITEMS, 1)).astype(np.float32), "shape": shape},
        event_numbers={"spent": [[i / 3 for i in row] for row in rows]},
        event_texts={"watched": [*RANGES["watched"], UNKNOWN]},
        ranges=RANGES,
        timestamps=[np.cumsum(rng.integers(1, 90_000, len(row))).tolist() for row in rows],
        **options,
    )


@dataclass(frozen=True)
class Served:
    """A model, and what was exported of it."""

    trained: TrainedModel
    folder: Path
    model: runtime.Model
    difference: float | None
    """What the export has found on users of the data."""


def random_model(
    task: str, store: SequenceStore, mesh: Mesh, output: Path, *, dynamic: bool = False, **options: Any
) -> TrainedModel:
    """A model whose weights are random, and large enough that each part of it matters."""
    read = options.get("dataset", {}).get("side_feature_names", [])
    unread = {*store.item_side_features, *EVENT_CATEGORIES} - {*read}
    if options.get("dataset", {}).get("action_feature_name") == "":
        unread.add("action")
    tables: Sequence[EmbeddingArgs] = tables_with_dynamic(store, 64) if dynamic else tables_of(store)
    options["tables"] = tuple(table for table in tables if not unread & {*table.feature_names})
    config = for_export(tiny_config(task, store, output, **options))
    source = InferenceSource(config, config.dataset, mesh)  # type: ignore[arg-type]
    model, optimizers = build_model(config, source, mesh)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.dense.named_parameters():
            if "replicated" not in name:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    if dynamic_tables(model):  # ids get rows when they are trained on
        model.train()
        model(next(iter(source.train_batches(SamplerPosition()))))
        model.eval()
    zero_spare_rows(build_state(config, source, model, optimizers), source)
    return TrainedModel(config, output, mesh, source, model, optimizers, [])


def serve(trained: TrainedModel, folder: Path, **options: Any) -> Served:
    """Export a model and load the result."""
    logging.getLogger("torch.export").setLevel(logging.ERROR)
    difference = write_serving(trained, folder, evaluations={"valid": {"HR@10": 0.5}}, **options)
    return Served(trained, folder, runtime.load(folder), difference)


def request(items: Sequence[Any], actions: Sequence[Any], times: Sequence[int], **fields: Any) -> History:
    return History(items=items, actions=actions, timestamps=times, **fields)


def histories(store: SequenceStore, count: int = 6) -> list[History]:
    """Those of the first users of the data, who have done something that the vocabulary does not have."""
    found = []
    for each in api.histories(store, range(count)):
        items, actions, times = (np.asarray(values).tolist() for values in (each.items, each.actions, each.timestamps))
        given = request([*items, -5], [*actions, 1], [*times, times[-1] + 9], user=each.user, context=each.context)
        found.append(given)
    return found


def rewrite(folder: Path, name: str, content: bytes | None) -> None:
    """Replace a file as an exporter would have written it. None: only list its name."""
    if content is not None:
        (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    files = manifest["files"]
    files[name] = {"bytes": len(content or b""), "sha256": hashlib.sha256(content or b"").hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"sha256": checksum_of(files), "files": files}))


Tensors = dict[str, Tensor]


def export_with(folder: Path, target: Path, change: Callable[[Tensors, Tensors], None]) -> Path:
    """A later whole export: other dense weights, and a change of the tables and the vocabulary."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("manifest.json"))
    paths = [target / f"{name}.safetensors" for name in ("weights", "tables", "vocabulary")]
    weights, tables, words = (load_file(path) for path in paths)
    change(tables, words)
    for path, tensors in zip(
        paths, ({name: each * 1.001 for name, each in weights.items()}, tables, words), strict=True
    ):
        write_tensors(path, tensors)
    (target / "MODEL_CARD.md").write_text(target.name)
    write_manifest(target)
    return target


def delta_of(whole: Path, base: Path, folder: Path, threshold: float = 0.0) -> DeltaSize:
    """Write the delta that leads from ``base``, which lies beside it, to ``whole``."""
    return write_delta(whole, read_export(base), folder, f"../{base.name}", threshold)
