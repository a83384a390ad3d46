"""Models with random weights and every kind of feature, exported for serving; random requests and their answers."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from hstu import api
from hstu.api import TrainedModel
from hstu.config.args import EmbeddingArgs
from hstu.data.batches.batch import HSTUBatch
from hstu.data.datasets.spec import UNKNOWN
from hstu.data.sampling.sampler import SamplerPosition
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.parallel.tables import dynamic_tables
from hstu.serve import runtime
from hstu.serve.export import (
    DeltaSize,
    for_export,
    read_export,
    write_delta,
    write_manifest,
    write_serving,
    write_tensors,
)
from hstu.serve.loaded import LoadedModel
from hstu.serve.runtime import History
from hstu.serve.runtime.encode import Events
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
    difference = write_serving(trained, folder, **options)
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
    (target / "note.txt").write_text(target.name)
    write_manifest(target)
    return target


def delta_of(whole: Path, base: Path, folder: Path, threshold: float = 0.0) -> DeltaSize:
    """Write the delta that leads from ``base``, which lies beside it, to ``whole``."""
    return write_delta(whole, read_export(base), folder, f"../{base.name}", threshold)


_DAY_S, _UNKNOWN = 86_400, -7


@dataclass(frozen=True)
class Requests:
    """Requests of several users at one time."""

    histories: list[runtime.History]
    candidates: list[runtime.Candidates]
    """Items to score, one or more per user; read by ranking alone."""
    at: int | None


def random_requests(model: runtime.Model, count: int = 10) -> list[Requests]:
    """Requests with known and unknown ids and missing values of everything that a model reads, of all lengths."""
    draw, facts = random.Random(0), model.facts
    longest, rule = facts["max_items"], facts["candidates"]
    lengths = [1, 2, longest + 3, *(draw.randint(1, longest) for _ in range(count - 3))]
    histories = [_history(model, user, length, draw) for user, length in enumerate(lengths)]
    most = min(3, rule["most"] or 3) if rule["trained"] else 3
    shown = [_candidates(model, history, draw.randint(1, most), draw) for history in histories]
    found = [Requests(histories, shown, None)]
    if model.reads_request_time:
        newest = max(int(time) for history in histories for time in history.timestamps or ())
        found.append(Requests(histories, shown, newest + draw.randrange(1, _DAY_S)))
        if facts["task"] == "ranking":  # a user who has done nothing yet
            empty = runtime.History(items=[], context=histories[0].context, user=histories[0].user)
            found[-1] = Requests([empty, *histories], [shown[0], *shown], found[-1].at)
    return found


def largest_difference(trained: LoadedModel, model: runtime.Model) -> float:
    """Largest difference of a vector's number or a logit on random requests, relative to 1 + its absolute value."""
    worst = 0.0
    for requests in random_requests(model):
        expected = torch.cat(answers_of_the_trainer(trained, model, requests))
        if model.facts["task"] == "ranking":
            found = torch.cat(model.predict_batch(requests.histories, requests.candidates, requests.at))
            items = [item for each in requests.candidates for item in each.items]
            assert torch.equal(found.isnan().all(dim=1), torch.tensor([item == _UNKNOWN for item in items]))
            found, expected = found[~found.isnan().all(dim=1)], expected[~found.isnan().all(dim=1)]
        else:
            items, vectors = _item_vectors(trained)
            expected = torch.cat([expected, vectors])
            found = torch.cat([model.embed_batch(requests.histories, requests.at), model.item_vectors(items)])
        worst = max(worst, float(((found - expected).abs() / (1 + expected.abs())).nan_to_num(torch.inf).max()))
    return worst


@torch.no_grad()
def answers_of_the_trainer(trained: LoadedModel, model: runtime.Model, requests: Requests) -> list[Tensor]:
    """Logits of the candidates of each history, or its vector [1, E]."""
    if model.facts["task"] == "retrieval":
        batches = trained.encoder.batches(requests.histories)
        return [*trained.user_vectors(batches, requests.at).cpu().split(1)]
    counts = [len(each.items) for each in requests.candidates]
    return [*torch.cat([*_logits(trained, model, requests)]).split(counts)]


def _item_vectors(trained: LoadedModel) -> tuple[list[Any], Tensor]:
    corpus = trained.retrieval_evaluator().corpus()
    return trained.vocabularies[trained.source.roles.item].values_at(corpus.ids.cpu()), corpus.vectors()


def _logits(trained: LoadedModel, model: runtime.Model, requests: Requests) -> Iterator[Tensor]:
    """Logits of the candidates: together, as in training with candidates; else each as the newest event."""
    encoder, sequences = trained.encoder, []
    is_trained = model.facts["candidates"]["trained"]
    for history, shown in zip(requests.histories, requests.candidates, strict=True):
        count = len(shown.items)
        room = (model.facts["candidates"]["most"] or count) if is_trained else 1
        (events,) = encoder.histories([(history, requests.at, model.facts["max_items"] - room)])
        parts = encoder.candidates(shown, history, requests.at, 1 if is_trained else count)
        sequences += [(events, part) for part in parts]
    first = 0
    for batch in encoder.batches_of(_followed(*each) for each in sequences):
        counts = [shown.length for _, shown in sequences[first : first + batch.real_batch_size]]
        first += batch.real_batch_size
        logits = trained.forward(_labelled(trained, model, batch, counts)).logits
        assert logits is not None, "a ranking model has logits"
        yield logits.cpu()


def _followed(events: Events, candidates: Events) -> Events:
    """The events, and the candidates behind them."""
    both = (events, candidates)
    numbers = [each.numbers for each in both if each.numbers is not None]
    return replace(
        events,
        ids={name: torch.cat([each.ids[name] for each in both]) for name in events.ids},
        counts={name: torch.cat([each.counts[name] for each in both]) for name in events.counts},
        numbers=torch.cat(numbers) if numbers else None,
        times=[*events.times, *candidates.times],
        length=events.length + candidates.length,
    )


def _labelled(trained: LoadedModel, model: runtime.Model, batch: HSTUBatch, counts: Sequence[int]) -> HSTUBatch:
    """The batch with the newest ``counts`` items of each sequence labelled, and as candidates if they are any."""
    labels = np.zeros(batch.batch_size, dtype=np.int64)
    labels[: len(counts)] = counts
    shown = labels if model.facts["candidates"]["trained"] else np.zeros_like(labels)
    names, total = trained.source.roles.labels, int(labels.sum())
    return replace(
        batch,
        num_candidates=torch.from_numpy(shown),
        num_candidates_host=shown,
        num_labels=torch.from_numpy(labels),
        num_labels_host=labels,
        labels=torch.full((total,), model.facts["tasks"][0]["first"]),
        label_values=torch.full((len(names), total), torch.nan) if names else None,
    )


def _history(model: runtime.Model, user: int, length: int, draw: random.Random) -> runtime.History:
    facts, times, now = model.facts, [], 1_000_000_000 + draw.randrange(_DAY_S)
    for _ in range(length):
        times.append(now)
        now += draw.choice((0, 30, draw.randrange(40 * _DAY_S)))
    chosen = [name for name in facts["contextual"] if draw.random() < 0.8]
    given = [name for name, must in model.encoder.given_features.items() if must or draw.random() < 0.3]
    return runtime.History(
        items=_values(model, facts["item"], length, draw),
        actions=_values(model, facts["action"], length, draw, unknown=0) if facts["action"] else None,
        timestamps=times if facts["reads_times"] else None,
        context={name: _values(model, name, 1, draw)[0] for name in chosen},
        features={name: _of_events(model, name, length, draw) for name in given},
        user=user,
    )


def _candidates(model: runtime.Model, history: runtime.History, count: int, draw: random.Random) -> runtime.Candidates:
    names = [name for name in model.encoder.known_before if name in history.features]
    items = _values(model, model.facts["item"], count, draw)
    return runtime.Candidates(items, {name: _of_events(model, name, count, draw) for name in names})


def _of_events(model: runtime.Model, name: str, count: int, draw: random.Random) -> list[Any]:
    """Values of a feature, None among them."""
    widths = {entry["name"]: entry["width"] for entry in model.facts["numbers"]}
    found: list[Any]
    if name in widths:
        found = [[draw.gauss(0, 3) for _ in range(widths[name])] for _ in range(count)]
    elif model.facts["features"][name]["is_list"]:
        found = [_values(model, name, draw.randint(0, 3), draw) for _ in range(count)]
    else:
        found = _values(model, name, count, draw)
    return [None if draw.random() < 0.1 else value for value in found]


def _values(model: runtime.Model, feature: str, count: int, draw: random.Random, unknown: float = 0.05) -> list[Any]:
    """Known values of a feature, and now and then an unknown one."""
    known = model.encoder.vocabularies[feature]
    if not known.size:
        return [_UNKNOWN] * count
    places = torch.tensor([draw.randrange(known.size) for _ in range(count)], dtype=torch.int64)
    return [_UNKNOWN if draw.random() < unknown else value for value in known.values_at(places)]
