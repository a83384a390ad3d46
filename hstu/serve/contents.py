"""The contents of an exported directory besides the program: facts, tables, ids and item features."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hstu.base.errors import ConfigError, DataError
from hstu.base.ids import codes_of
from hstu.config.args import DatasetArgs, RetrievalArgs
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import is_of_negatives
from hstu.data.batches.jagged import ranges, run_offsets
from hstu.data.preprocess.running import learn_from
from hstu.data.store.popularity import events_by_context, events_of_items
from hstu.model.embedding import TableSpec
from hstu.model.program import ServingProgram, key_of
from hstu.parallel.tables import dynamic_tables
from hstu.serve.loaded import LoadedModel
from hstu.serve.runtime.files import FORMAT, MOST_CONTEXTS, MOST_ITEMS_OF_CONTEXT, VERSION
from hstu.serve.runtime.model import ITEM_VECTORS
from hstu.train.builder import raw_ids
from hstu.train.inference import StoredSource

MOST_CANDIDATES = 256
"""Candidates per sequence if training does not set a limit."""
_ROWS_AT_ONCE = 1 << 16


def check_can_be_served(trained: LoadedModel) -> None:
    """Raise ConfigError or DataError if the model reads inputs that requests cannot contain."""
    if why := trained.config.why_no_program:
        raise ConfigError(f"cannot export a program: {why}")
    if isinstance(trained.source, StoredSource) and trained.source.roles.tower:
        why = "the model reads the features of all items from the data"
        raise DataError(f"cannot export a program: {why}. {trained.source.missing}")


def caveats(config: RunConfig) -> list[str]:
    """Where scores of requests are not those of an evaluation, for people."""
    found, dataset = [], config.dataset
    if config.task == "ranking" and _newest_event_is_scored(config):
        option = "min_full_attention_tokens" if config.network.truncate_to_items is None else "truncate_to_items"
        text = "treats the newest events otherwise: metrics in the middle of a history are not those of a request"
        found.append(f"NetworkArgs.{option} {text}; with DatasetArgs.max_num_candidates above 0 they are")
    if isinstance(dataset, DatasetArgs) and dataset.candidates == "requests" and not dataset.max_num_candidates:
        text = "a history is cut to what fits beside the candidates of a request: their scores depend on their number"
        found.append(f"without DatasetArgs.max_num_candidates, {text}")
    return found


def _newest_event_is_scored(config: RunConfig) -> bool:
    """Whether a candidate is the newest event, which windows and truncation count: training has no candidates."""
    network, is_windowed = config.network, config.network.has_window and config.network.min_full_attention_tokens > 0
    return (network.truncate_to_items is not None or is_windowed) and not config.dataset.has_candidates


def collect(
    trained: LoadedModel, program: ServingProgram
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Compute, inside ``LoadedModel.inference``, the object in serving.json; table name → float32 [rows, dim]; ids
    (``_Features``) and items (``_items``)."""
    features = _Features(trained)
    facts = {**_facts(trained, program), "features": features.facts}
    tables = {spec.name: features.rows_of(spec) for spec in trained.model.specs}
    vocabulary, source = features.tensors, trained.source
    if not isinstance(source, StoredSource):
        ids, codes = features.item_ids(), np.arange(source.cardinalities[source.roles.item], dtype=np.int64)
        places = codes_of(trained.model_ids(codes), ids)  # index in ``ids`` of each item of the data
        vocabulary |= _items(trained, features, places, len(ids))
        popularity = np.zeros(len(ids), dtype=np.int64)
        popularity[places] = events_of_items(source.store, np.arange(source.store.num_users))
        vocabulary["popularity"] = torch.from_numpy(popularity)
        bounds = MOST_CONTEXTS, MOST_ITEMS_OF_CONTEXT
        facts["popular_in"], items, events = events_by_context(source.store, facts["contextual"], *bounds)
        vocabulary["popular_in"] = torch.from_numpy(np.stack([places[items], events], axis=1))
        if trained.encoder.running_names:
            learnt = learn_from(source.store, places).tables
            vocabulary |= {f"running.{name}": table for name, table in learnt.items()}
        if trained.config.has_item_tower and isinstance(trained.config.task_args, RetrievalArgs):
            vectors = trained.retrieval_evaluator().corpus(source.item_ids()).vectors()
            tables[ITEM_VECTORS] = vectors.new_zeros(len(ids), vectors.shape[1])
            tables[ITEM_VECTORS][torch.from_numpy(places)] = vectors
    return facts, tables, vocabulary


def _facts(trained: LoadedModel, program: ServingProgram) -> dict[str, Any]:
    config, inputs = trained.config, program.inputs
    dataset, network, args = trained.dataset, config.network, config.task_args
    has_candidates = dataset.has_candidates
    alone = _newest_event_is_scored(config)
    running = trained.encoder.running_names
    counts = f"running statistics ({', '.join(running)}) count all events of a user" if running else None
    spans = [span for span in network.attention_spans if span is not None]
    cached = {
        "layers": network.num_layers,
        "channels": network.kv_channels,
        "span": min(spans, default=None),
        "full_tokens": network.min_full_attention_tokens,
    }
    return {
        **trained.encoder.facts,
        "format": FORMAT,
        "version": VERSION,
        "program": key_of(program, network, args, config.numbers, trained.source.roles),
        "inputs": list(program.input_names),
        "cached": cached if program.whole_because is None else None,
        "whole_because": program.whole_because or counts,
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
        "filter_seen": trained.leaves_out_seen,
        "tasks": [asdict(each) for each in trained.predictions],
    }


class _Features:
    def __init__(self, trained: LoadedModel) -> None:
        self._trained, self._source, self._vocabularies = trained, trained.source, trained.vocabularies
        self._table_of = {name: spec.name for spec in trained.model.specs for name in spec.features}
        ids = {
            name: np.sort(table.slots.content()[0].cpu().numpy())
            for name, table in dynamic_tables(trained.model).items()
        }
        self._dynamic_ids = {name: ids[table] for name, table in self._table_of.items() if table in ids}
        self.tensors = raw_ids(trained.source).tensors()
        """ids.<feature>: its values. rows.<feature>: the table row of each value, if it differs from the index."""
        self.facts = {name: self._describe(name) for name in trained.source.roles.names}

    def rows_of(self, spec: TableSpec) -> Tensor:
        """The table rows that belong to ids, float32 [rows, dim]; one row of zeros if there are no ids."""
        names = [name for name in spec.features if not is_of_negatives(name)]
        ids = self._dynamic_ids.get(names[0])
        if ids is None:
            ids = np.arange(max(self._source.cardinalities[name] for name in names), dtype=np.int64)
        if not len(ids):
            return torch.zeros(1, spec.dim)
        found = [
            self._trained.model.rows_of({names[0]: chunk.to(self._trained.mesh.device)})[names[0]]
            for chunk in torch.from_numpy(ids).split(_ROWS_AT_ONCE)
        ]
        return torch.cat([rows.detach().float().cpu() for rows in found])

    def table_rows(self, feature: str, ids: np.ndarray) -> np.ndarray:
        """The table row of each model id, int64 [n]; -1 for ids without a row."""
        known = self._dynamic_ids.get(feature)
        if known is None:
            return np.where((ids >= 0) & (ids < self._source.cardinalities[feature]), ids, -1)
        return codes_of(ids, known)

    def _describe(self, feature: str) -> dict[str, Any]:
        """Add the rows of the values of a feature, and raw ones, to ``tensors``. Returns the facts of the feature."""
        vocabulary, roles = self._vocabularies[feature], self._source.roles
        kind, ids = vocabulary.kind, np.arange(vocabulary.size, dtype=np.int64)
        if kind == "raw":
            kind, ids = "numbers", self.item_ids() if feature == roles.item else self._dynamic_ids[feature]
            self.tensors[f"ids.{feature}"] = torch.from_numpy(ids)
        rows, missing = (self.table_rows(feature, each) for each in (ids, np.array([vocabulary.missing])))
        if not np.array_equal(rows, np.arange(len(rows))):
            self.tensors[f"rows.{feature}"] = torch.from_numpy(rows)
        return {
            "table": self._table_of[feature],
            "is_list": feature in roles.lists,
            "missing": int(missing[0]) if feature in roles.side else -1,
            "kind": kind,
            "size": len(ids),
            "ranges": vocabulary.ranges,
        }

    def item_ids(self) -> np.ndarray:
        """Model ids of the items in the model or the data, ascending."""
        item = self._source.roles.item
        if self._vocabularies[item].kind != "raw":
            return np.arange(self._vocabularies[item].size, dtype=np.int64)
        of_data = self._source.item_ids()
        return self._dynamic_ids[item] if of_data is None else np.union1d(self._dynamic_ids[item], of_data)


def _items(trained: LoadedModel, features: _Features, places: np.ndarray, count: int) -> dict[str, Tensor]:
    """Features and titles of ``count`` exported items. ``places``: export index of each item of the data.

    item.<feature>: table rows, int64 [items]; for a list [values], with item.<feature>.offsets, int64 [items + 1];
    for numbers float32 [items, width]. titles.offsets, titles.utf8: see ``as_texts``.
    """

    def spread(values: np.ndarray, filler: Any) -> np.ndarray:
        found = np.full((count, *values.shape[1:]), filler, dtype=values.dtype)
        found[places] = values
        return found

    found, known = {}, {name: tensor.numpy() for name, tensor in trained.encoder.known.items()}
    for name, values in known.items():
        feature = name.removeprefix("item.")
        if feature in trained.source.roles.numbers:
            found[name] = spread(values, np.nan)
        elif f"{name}.offsets" in known:
            rows, lengths = features.table_rows(feature, values), np.diff(known[f"{name}.offsets"])
            bounds = run_offsets(spread(lengths, 1))
            found[name], found[f"{name}.offsets"] = np.full(bounds[-1], features.facts[feature]["missing"]), bounds
            found[name][ranges(bounds[places], lengths)] = rows
        elif not name.endswith(".offsets"):
            found[name] = spread(features.table_rows(feature, values), features.facts[feature]["missing"])
    titles = trained.store.titles()
    texts = {} if titles is None else as_texts("titles", spread(titles, ""))
    return {name: torch.from_numpy(values) for name, values in found.items()} | texts


def as_texts(name: str, texts: Iterable[Any]) -> dict[str, Tensor]:
    """Encode texts as UTF-8 bytes, uint8 ``<name>.utf8``, with ``<name>.offsets``, int64 [n + 1]."""
    encoded = [str(text).encode() for text in texts]
    return {
        f"{name}.offsets": torch.from_numpy(run_offsets([*map(len, encoded)])),
        f"{name}.utf8": torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8),
    }
