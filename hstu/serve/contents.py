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
from hstu.model.embedding import TableSpec
from hstu.model.ranking import RankingDense, RankingModel
from hstu.model.retrieval import RetrievalDense
from hstu.model.tasks import MultiTaskDense
from hstu.parallel.ddp import unwrap_dense
from hstu.parallel.tables import dynamic_tables
from hstu.serve.histories import ItemsOfData, request_facts
from hstu.serve.loaded import LoadedModel
from hstu.serve.program import ServingProgram
from hstu.serve.runtime.files import FORMAT, VERSION
from hstu.serve.runtime.model import ITEM_VECTORS
from hstu.train.inference import StoredSource

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
    if isinstance(config.task_args, RankingArgs) and network.target_group_size > 1:
        raise ConfigError(
            f"cannot export a program: with NetworkArgs.target_group_size = {network.target_group_size} a "
            "candidate sees the actions on others of its group, which a request does not know. Train with 1"
        )
    if isinstance(trained.source, StoredSource) and roles.tower:
        needed = "the features of all items"
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
    config, inputs = trained.config, program.inputs
    dataset, network, args = config.dataset, config.network, config.task_args
    assert isinstance(dataset, DatasetArgs)
    has_candidates = dataset.has_candidates
    # As the newest event, a candidate counts among the newest tokens of a window and of a truncated history.
    alone = not has_candidates and (
        network.truncate_to_items is not None or (network.has_window and network.min_full_attention_tokens > 0)
    )
    return {
        **request_facts(config, trained.source, trained.vocabularies),
        "format": FORMAT,
        "version": VERSION,
        "inputs": list(program.input_names),
        "tokens_per_item": inputs.tokens_per_item,
        "heads": network.num_attention_heads,
        "truncate_to_items": network.truncate_to_items,
        "asks_for_next": config.asks_for_next,
        "request_follows": isinstance(args, RetrievalArgs) or not has_candidates,
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
        kinds = {"binary": "binary", "class": "class"}
        return [
            {
                "name": each.args.task_name,
                "kind": kinds.get(each.args.kind, "number"),
                "width": each.args.output_width,
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
        self._vocabularies = trained.vocabularies
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
        return int(self.table_rows(feature, np.array([self._vocabularies[feature].missing]))[0])

    def _describe(self, feature: str) -> dict[str, Any]:
        """Store the values of a feature, and their rows. Returns its facts."""
        vocabulary, roles = self._vocabularies[feature], self._source.roles
        kind = vocabulary.kind
        ids = np.arange(vocabulary.size, dtype=np.int64)
        if kind == "raw":
            kind, ids = "numbers", self.item_ids() if feature == roles.item else self._in_table(feature)
            self.tensors[f"ids.{feature}"] = torch.from_numpy(ids)
        elif kind == "numbers":
            self.tensors[f"ids.{feature}"] = vocabulary.numbers.clone()
        elif kind == "texts":
            self.tensors |= as_texts(f"ids.{feature}", vocabulary.texts)
        rows = self.table_rows(feature, ids)
        if not np.array_equal(rows, np.arange(len(rows))):
            self.tensors[f"rows.{feature}"] = torch.from_numpy(rows)
        return {
            "table": self._spec_of[feature].name,
            "is_list": feature in roles.lists,
            "missing": self.missing(feature) if feature in roles.side else -1,
            "kind": kind,
            "size": len(ids),
        }

    def item_ids(self) -> np.ndarray:
        """What the model gets for the items that it or the data has, ascending: the order of all of _Items."""
        item = self._source.roles.item
        if self._vocabularies[item].kind != "raw":
            return np.arange(self._vocabularies[item].size, dtype=np.int64)
        of_data = self._source.item_ids()
        return self._in_table(item) if of_data is None else np.union1d(self._in_table(item), of_data)

    def _in_table(self, feature: str) -> np.ndarray:
        """Of a feature with raw ids, those that have a row, ascending."""
        return self._dynamic_ids[self._spec_of[feature].name]


class _Items:
    """What the data knows of items: features, times of the first events, titles; and the vectors of an item tower.

    tensors: item.<feature>, rows of the feature's table, int64 [items], or of a list [values], with
    item.<feature>.offsets, int64 [items + 1]; for numbers float32 [items, width].
    titles.offsets and titles.utf8.
    """

    def __init__(self, trained: LoadedModel, features: _Features) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.vectors: Tensor | None = None
        source = trained.source
        if isinstance(source, StoredSource):
            return
        self._source, self._ids = source, features.item_ids()
        own = source.item_ids()
        codes = np.arange(source.cardinalities[source.roles.item], dtype=np.int64)
        self._places = codes_of(codes if own is None else own, self._ids)
        """Place of each item of the data."""
        known = ItemsOfData(source.store)
        for name in source.roles.side:
            key = f"item.{name}"
            if key in known and name in source.roles.numbers:
                self._add(key, known.tensor(key).numpy(), np.nan)
            elif key in known:
                offsets = known.tensor(f"{key}.offsets").numpy() if name in source.roles.lists else None
                rows = features.table_rows(name, known.tensor(key).numpy())
                self._add_side(key, rows, offsets, features.missing(name))
        titles = source.store.titles()
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

    def _add_side(self, name: str, rows: np.ndarray, offsets: np.ndarray | None, missing: int) -> None:
        """Rows of the values of the items of the data, and ``missing`` for others. ``offsets``: of a list."""
        if offsets is None:
            return self._add(name, rows, missing)
        lengths = np.ones(len(self._ids), dtype=np.int64)
        lengths[self._places] = np.diff(offsets)
        bounds = np.concatenate([[0], lengths.cumsum()])
        values = np.full(bounds[-1], missing, dtype=np.int64)
        of_value = np.repeat(self._places, np.diff(offsets))
        values[bounds[of_value] + np.arange(len(rows)) - np.repeat(offsets[:-1], np.diff(offsets))] = rows
        self.tensors[name] = torch.from_numpy(values)
        self.tensors[f"{name}.offsets"] = torch.from_numpy(bounds)

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
