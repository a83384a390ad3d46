"""What lies beside the program in an exported directory: facts, tables, ids, and what is known of items."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hstu.base.errors import ConfigError, DataError
from hstu.base.ids import codes_of
from hstu.config.args import DatasetArgs, RankingArgs, RetrievalArgs
from hstu.data.batches.batch import is_of_negatives
from hstu.data.datasets.spec import UNKNOWN
from hstu.data.store.layout import TIME_FEATURES
from hstu.data.store.sequence_store import SequenceStore
from hstu.model.embedding import TableSpec
from hstu.model.ranking import RankingDense, RankingModel
from hstu.model.retrieval import RetrievalDense
from hstu.model.tasks import MultiTaskDense
from hstu.parallel.ddp import unwrap_dense
from hstu.parallel.tables import dynamic_tables
from hstu.serve.loaded import LoadedModel
from hstu.serve.program import ServingProgram
from hstu.serve.runtime.files import FORMAT, VERSION
from hstu.serve.runtime.model import ITEM_VECTORS
from hstu.train.given_histories import Vocabulary
from hstu.train.inference import InferenceSource, StoredSource

MOST_CANDIDATES = 256
"""Candidates that are scored in one sequence, where training does not limit them."""
_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Contents:
    """What to write."""

    facts: dict[str, Any]
    """serving.json."""
    tables: dict[str, Tensor]
    """Name → float32 [rows, dim]."""
    vocabulary: dict[str, Tensor]
    """int64 and uint8 tensors of ids, and what is known of items, also float32; see ``_Items``."""


def check_can_be_served(trained: LoadedModel) -> None:
    """Raise ConfigError or DataError for a model whose requests lack what it reads."""
    config, network, roles = trained.config, trained.config.network, trained.source.roles
    if isinstance(config.task_args, RankingArgs):
        if network.target_group_size > 1:
            raise ConfigError(
                f"cannot export a program: with NetworkArgs.target_group_size = {network.target_group_size} a "
                "candidate sees the actions on others of its group, which a request does not know. Train with 1"
            )
        assert isinstance(config.dataset, DatasetArgs)
        shows_labels = not config.dataset.has_candidates and (
            not network.is_causal
            or not network.interleave_actions
            or (bool(roles.contextual) and not network.disable_contextual_mask and network.num_layers > 1)
        )
        if shows_labels:
            raise ConfigError(
                "cannot export a program: the model has seen the actions that it predicts "
                "(NetworkArgs.allow_label_leak), and a request does not know them"
            )
    if isinstance(trained.source, StoredSource) and (roles.tower or "item_age" in roles.side):
        needed = "the features of all items" if roles.tower else "'item_age'"
        raise DataError(f"cannot export a program: the model reads {needed} from the data. {trained.source.missing}")


def task_of(trained: LoadedModel) -> RetrievalDense | RankingModel:
    """The dense part of what is served."""
    task = unwrap_dense(trained.model).task
    assert isinstance(task, (RetrievalDense, RankingModel))
    return task


def collect(trained: LoadedModel, program: ServingProgram) -> Contents:
    """Read everything from a model in evaluation mode, with averaged weights if it has them."""
    features = _Features(trained)
    facts = {**_facts(trained, program), "features": features.facts}
    tables = {name: features.rows_of(spec) for name, spec in features.specs.items()}
    items = _Items(trained, features)
    if items.vectors is not None:
        tables[ITEM_VECTORS] = items.vectors
    return Contents(facts, tables, {**features.tensors, **items.tensors})


def _facts(trained: LoadedModel, program: ServingProgram) -> dict[str, Any]:
    config, roles, inputs = trained.config, trained.source.roles, program.inputs
    dataset, network, args = config.dataset, config.network, config.task_args
    assert isinstance(dataset, DatasetArgs)
    times = [name for name in roles.side if name in TIME_FEATURES]
    is_retrieval = isinstance(args, RetrievalArgs)
    reads_bias = network.has_relative_bias
    has_candidates = dataset.has_candidates
    # As the newest event, a candidate counts among the newest tokens of a window and of a truncated history.
    alone = not has_candidates and (
        network.truncate_to_items is not None or (network.has_window and network.min_full_attention_tokens > 0)
    )
    widths = zip(roles.numbers, roles.number_widths, strict=True)
    return {
        "format": FORMAT,
        "version": VERSION,
        "task": "retrieval" if is_retrieval else "ranking",
        "item": roles.item,
        "action": roles.action,
        "contextual": list(roles.contextual),
        "side": inputs.side["side"],
        "known_after": inputs.side["known_after"],
        "numbers": [{"name": name, "width": width, "known_after": name in roles.known_after} for name, width in widths],
        "inputs": list(program.input_names),
        "max_items": trained.source.max_items,
        "tokens_per_item": inputs.tokens_per_item,
        "heads": network.num_attention_heads,
        "truncate_to_items": network.truncate_to_items,
        "reads_times": reads_bias or any(name in TIME_FEATURES for name in roles.side),
        "reads_request_time": (reads_bias and config.asks_for_next)
        if is_retrieval
        else reads_bias or any(name not in roles.known_after for name in times),
        "asks_for_next": config.asks_for_next,
        "request_follows": is_retrieval or not has_candidates,
        "candidates": {
            "trained": has_candidates,
            "apart": not alone,
            "most": dataset.max_num_candidates if has_candidates else 1 if alone else MOST_CANDIDATES,
        },
        "l2_norm_eps": args.l2_norm_eps if isinstance(args, RetrievalArgs) else None,
        "tasks": _tasks(trained),
    }


def _tasks(trained: LoadedModel) -> list[dict[str, Any]]:
    """Name, kind and number of outputs of each prediction."""
    task = task_of(trained)
    if isinstance(task, MultiTaskDense):
        kinds = {"binary": "binary", "class": "class", "ordinal": "ordinal"}
        return [
            {
                "name": each.args.task_name,
                "kind": kinds.get(each.args.kind, "number"),
                "width": each.num_predictions,
                "first": each.first_class,
            }
            for each in task.each_task
        ]
    if not isinstance(task, RankingModel):
        return [{"name": "cosine", "kind": "number", "width": 1, "first": 0}]
    assert isinstance(task, RankingDense) and isinstance(trained.config.task_args, RankingArgs)
    action = str(trained.source.roles.action)
    if not task.is_multi_task:
        width = trained.config.task_args.prediction_head_arch[-1]
        return [{"name": action, "kind": "class", "width": width, "first": task.label_offset}]
    return [{"name": f"task{bit}", "kind": "binary", "width": 1, "first": 0} for bit in range(task.num_tasks)]


class _Features:
    """Ids and table rows of every feature."""

    def __init__(self, trained: LoadedModel) -> None:
        self._model, self._source = trained.model, trained.source
        self._device = trained.mesh.device
        self.vocabularies = trained.vocabularies
        self.specs: dict[str, TableSpec] = {spec.name: spec for spec in trained.model.specs}
        self._spec_of = {name: spec for spec in trained.model.specs for name in spec.features}
        self._dynamic_ids = {
            name: np.sort(table.slots.content()[0].cpu().numpy())
            for name, table in dynamic_tables(trained.model).items()
        }
        self.tensors: dict[str, Tensor] = {}
        self.facts = {name: self._describe(name) for name in trained.source.roles.names}

    def rows_of(self, spec: TableSpec) -> Tensor:
        """The rows of a table that ids have, float32 [rows, dim]; one of zeros if there is none."""
        names = [name for name in spec.features if not is_of_negatives(name)]
        ids = self._dynamic_ids.get(spec.name)
        if ids is None:
            ids = np.arange(max(self._source.cardinalities[name] for name in names), dtype=np.int64)
        chunks = [ids[first : first + _ROWS_AT_ONCE] for first in range(0, len(ids), _ROWS_AT_ONCE)]
        found = [
            self._model.rows_of({names[0]: torch.from_numpy(chunk).to(self._device)})[names[0]] for chunk in chunks
        ]
        return torch.cat([rows.detach().float().cpu() for rows in found] or [torch.zeros(1, spec.dim)])

    def table_rows(self, feature: str, ids: np.ndarray) -> np.ndarray:
        """The row of each of ``ids`` (what the model gets), int64 [n]; -1 where there is none."""
        known = self._dynamic_ids.get(self._spec_of[feature].name)
        if known is None:
            return np.where((ids >= 0) & (ids < self._source.cardinalities[feature]), ids, -1)
        return codes_of(ids, known)

    def missing(self, feature: str) -> int:
        """The row that stands for missing values."""
        return int(self.table_rows(feature, self.vocabularies[feature].encode([UNKNOWN]))[0])

    def in_table(self, feature: str) -> np.ndarray:
        """Of a feature with raw ids, those that have a row, ascending."""
        return self._dynamic_ids[self._spec_of[feature].name]

    def _describe(self, feature: str) -> dict[str, Any]:
        vocabulary, roles = self.vocabularies[feature], self._source.roles
        facts = {
            "table": self._spec_of[feature].name,
            "is_list": feature in roles.lists,
            "missing": self.missing(feature) if feature in roles.side else -1,
        }
        if feature == roles.item:
            return facts | self.list_ids(feature, item_ids(self._source, self), vocabulary)
        ids = self.in_table(feature) if vocabulary.keeps_raw else np.arange(vocabulary.num_ids, dtype=np.int64)
        is_time = feature in TIME_FEATURES and vocabulary.raw_ids is None
        return facts | self.list_ids(feature, ids, vocabulary) | ({"kind": "time"} if is_time else {})

    def list_ids(self, feature: str, ids: np.ndarray, vocabulary: Vocabulary) -> dict[str, Any]:
        """Store the raw ids of what the model gets, and their rows. Returns the kind of ids and their number."""
        rows = self.table_rows(feature, ids)
        if not np.array_equal(rows, np.arange(len(rows))):
            self.tensors[f"rows.{feature}"] = torch.from_numpy(rows)
        if vocabulary.raw_ids is None and not vocabulary.keeps_raw:
            return {"kind": "range", "size": len(ids)}
        raw = ids if vocabulary.keeps_raw else vocabulary.raw_ids[ids]  # type: ignore[index]
        if raw.dtype == object:
            self.tensors |= as_texts(f"ids.{feature}", raw)
            return {"kind": "texts", "size": len(ids)}
        self.tensors[f"ids.{feature}"] = torch.from_numpy(np.array(raw))
        return {"kind": "numbers", "size": len(ids)}


def item_ids(source: InferenceSource | StoredSource, features: _Features) -> np.ndarray:
    """What the model gets for the items that are known to it or to the data, ascending: the order of all of _Items."""
    vocabulary = features.vocabularies[source.roles.item]
    if not vocabulary.keeps_raw:
        return np.arange(vocabulary.num_ids, dtype=np.int64)
    of_data = source.item_ids()
    in_table = features.in_table(source.roles.item)
    return in_table if of_data is None else np.union1d(in_table, of_data)


class _Items:
    """What the data knows of items: features, times of the first events, titles; and the vectors of an item tower.

    tensors: item.<feature>, rows of the feature's table, int64 [items], or of a list [values], with
    item.<feature>.offsets, int64 [items + 1]; for numbers float32 [items, width]. item_first_times, int64 [items].
    titles.offsets and titles.utf8.
    """

    def __init__(self, trained: LoadedModel, features: _Features) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.vectors: Tensor | None = None
        source = trained.source
        if isinstance(source, StoredSource):
            return
        self._store: SequenceStore = source.store
        self._features, self._source = features, source
        self._ids = item_ids(source, features)
        own = source.item_ids()
        codes = np.arange(source.cardinalities[source.roles.item], dtype=np.int64)
        self._places = codes_of(codes if own is None else own, self._ids)
        """Place of each item of the data."""
        for name in source.roles.side:
            if name in self._store.item_side_features:
                self._add_side(name)
            elif name in self._store.item_number_features:
                self._add("item." + name, self._store.item_numbers(name).astype(np.float32), np.nan)
        if "item_age" in source.roles.side:
            self._add("item_first_times", self._store.first_times().astype(np.int64), np.iinfo(np.int64).max)
        titles = self._store.titles()
        if titles is not None:
            named = np.full(len(self._ids), "", dtype=object)
            named[self._places] = titles
            self.tensors |= as_texts("titles", named)
        if trained.config.has_item_tower and isinstance(trained.config.task_args, RetrievalArgs):
            self.vectors = self._tower_vectors(trained)

    def _add(self, name: str, of_data: np.ndarray, filler: Any) -> None:
        """Values of the items of the data, and ``filler`` for others."""
        values = np.full((len(self._ids), *of_data.shape[1:]), filler, dtype=of_data.dtype)
        values[self._places] = of_data
        self.tensors[name] = torch.from_numpy(values)

    def _add_side(self, name: str) -> None:
        codes, offsets = self._store.item_values(name)
        rows = self._features.table_rows(name, self._store.model_ids(name, np.asarray(codes)))
        missing = self._features.missing(name)
        if offsets is None:
            return self._add(f"item.{name}", rows, missing)
        lengths = np.ones(len(self._ids), dtype=np.int64)
        lengths[self._places] = np.diff(offsets)
        bounds = np.concatenate([[0], lengths.cumsum()])
        values = np.full(bounds[-1], missing, dtype=np.int64)
        of_value = np.repeat(self._places, np.diff(offsets))
        values[bounds[of_value] + np.arange(len(rows)) - np.repeat(offsets[:-1], np.diff(offsets))] = rows
        self.tensors[f"item.{name}"] = torch.from_numpy(values)
        self.tensors[f"item.{name}.offsets"] = torch.from_numpy(bounds)

    def _tower_vectors(self, trained: LoadedModel) -> Tensor:
        """Vectors of length 1, float32 [items, E]; zeros for items that are not in the data."""
        of_data = self._ids[self._places] if self._source.item_ids() is not None else None
        corpus = trained.retrieval_evaluator().corpus(of_data)
        vectors = corpus.vectors()
        found = torch.zeros(len(self._ids), vectors.shape[1])
        found[torch.from_numpy(self._places)] = vectors
        return found


def as_texts(name: str, texts: Iterable[Any]) -> dict[str, Tensor]:
    """Texts as ``<name>.offsets``, int64 [n + 1], into the UTF-8 bytes ``<name>.utf8``."""
    encoded = [str(text).encode() for text in texts]
    offsets = torch.tensor([0, *(len(text) for text in encoded)]).cumsum(0)
    return {
        f"{name}.offsets": offsets,
        f"{name}.utf8": torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8),
    }
