"""Read user histories with raw ids from the data, and build model batches from histories."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch

from hstu.base.errors import DataError
from hstu.checkpoint.raw_ids import RawIds, mapped_tensor
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import PADDING_ID, HSTUBatch, ItemFeatures
from hstu.data.batches.collate import Assembler, Rows
from hstu.data.datasets.spec import UNKNOWN
from hstu.data.features.running import RunningStatistics
from hstu.data.preprocess.running import learn_from
from hstu.data.sampling.sampler import START, BatchPlan
from hstu.data.store.layout import TIME_FEATURES
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore
from hstu.serve.runtime.encode import Encoder, Events
from hstu.serve.runtime.files import Vocabulary
from hstu.serve.runtime.requests import History
from hstu.train.batch_source import BatchSource
from hstu.train.sources import StoreSource


def vocabulary_of(raw: np.ndarray, **options: Any) -> Vocabulary:
    """Create a Vocabulary of ascending raw ids: int64, or objects of type str. ``options``: its other arguments."""
    kind, values = ("texts", raw.tolist()) if raw.dtype == object else ("numbers", mapped_tensor(raw))
    return Vocabulary(kind, len(raw), values, **options)


def stored_vocabulary(store: SequenceStore, feature: str) -> Vocabulary:
    """The vocabulary of a feature of the data, or of its users. Its ``rows`` are the codes."""
    if feature != USER_FEATURE and not store.feature(feature).has_vocab:
        return Vocabulary("range", store.cardinality(feature))
    raw = store.raw_ids(feature)
    if feature == USER_FEATURE and raw.dtype != object:  # the users of a lake may be in any order
        order = np.argsort(raw, kind="stable")
        return vocabulary_of(raw[order], row_of=mapped_tensor(order))
    return vocabulary_of(raw, ranges=store.ranges.get(feature, {}))


def vocabularies_of(source: BatchSource, raw_ids: RawIds) -> dict[str, Vocabulary]:
    """Feature → vocabulary from raw values to model ids. Unknown values have a row of zeros."""
    found = {}
    for name in source.roles.names:
        size, raw = source.cardinalities[name], raw_ids.decoded(name)
        if name in source.raw_features:
            found[name] = Vocabulary("raw", size, missing=PADDING_ID, unknown=PADDING_ID)
        elif raw is None:
            is_time = name in TIME_FEATURES and name in source.roles.side
            found[name] = Vocabulary("time" if is_time else "range", size, missing=size, unknown=size)
        else:
            found[name] = vocabulary_of(raw, missing=size, unknown=size, ranges=source.ranges.get(name, {}))
        if name in source.roles.side:
            found[name].missing = int(found[name].rows([UNKNOWN])[0])
    return found


def _request_facts(config: RunConfig, source: BatchSource, vocabularies: Mapping[str, Vocabulary]) -> dict[str, Any]:
    """The entries of serving.json that ``Encoder`` reads."""
    roles, network, is_retrieval = source.roles, config.network, config.task == "retrieval"
    times = [name for name, vocabulary in vocabularies.items() if vocabulary.kind == "time"]
    widths = zip(roles.numbers, roles.number_widths, strict=True)
    stored = source.store.features if isinstance(source, StoreSource) else {}
    running = source.store.running_statistics if isinstance(source, StoreSource) else ()
    is_asked = any(name in running and name not in roles.known_after for name in roles.numbers)
    ranked = {name: each.statistics.quantiles for name, each in stored.items() if each.statistics}
    seen = {name: (values[0], values[-1]) for name, values in ranked.items() if values}
    return {
        "task": config.task,
        "item": roles.item,
        "action": roles.action,
        "contextual": list(roles.contextual),
        "side": [name for name in roles.categories if name not in roles.known_after],
        "known_after": [name for name in roles.categories if name in roles.known_after],
        "numbers": [
            {
                "name": name,
                "width": width,
                "known_after": name in roles.known_after,
                "seen": seen.get(name),
                "is_running": name in running,
            }
            for name, width in widths
        ],
        "max_items": source.max_items,
        "reads_times": network.needs_times or bool(times) or is_asked,
        "reads_request_time": config.reads_request_time
        if is_retrieval
        else network.needs_times or is_asked or any(name not in roles.known_after for name in times),
        "features": {
            name: {"kind": vocabulary.kind, "is_list": name in roles.lists} for name, vocabulary in vocabularies.items()
        },
    }


class BatchEncoder(Encoder):
    """Builds batches of a trained model from requests. Raises DataError for requests that the model cannot read."""

    error = DataError

    def __init__(self, config: RunConfig, source: BatchSource, vocabularies: Mapping[str, Vocabulary]) -> None:
        self._config, self._source = config, source
        items, known = vocabularies[source.roles.item], dict[str, np.ndarray]()  # values by code of the data's items
        if isinstance(source, StoreSource):
            store = source.store
            items = stored_vocabulary(store, source.roles.item)
            for name in source.roles.side:
                if name in store.item_number_features:
                    known[f"item.{name}"] = store.item_numbers(name)
                elif name in store.item_side_features:
                    codes, offsets = store.item_values(name)
                    known[f"item.{name}"] = store.model_ids(name, np.asarray(codes))
                    if offsets is not None:
                        known[f"item.{name}.offsets"] = offsets
        tensors = {name: mapped_tensor(values) for name, values in known.items()}
        super().__init__(_request_facts(config, source, vocabularies), vocabularies, items, tensors)

    @cached_property
    def running(self) -> RunningStatistics | None:
        """As of Encoder, from the data of the model."""
        source = self._source
        return learn_from(source.store) if isinstance(source, StoreSource) and self.running_names else None

    def batches(self, histories: Iterable[History]) -> Iterator[HSTUBatch]:
        """Batches of the newest ``max_items`` events of histories, for retrieval. Raises DataError."""
        return self.batches_of(self.histories([(each, None, self._source.max_items) for each in histories]))

    def batches_of(self, sequences: Iterable[Events]) -> Iterator[HSTUBatch]:
        """Batches of events without labels."""
        # Evaluation batches, because training batches draw negatives. Nothing reads their held-out items.
        size, roles = self._config.trainer.eval_batch_size, self._source.roles
        assembler = Assembler(size, "retrieval", roles, 1, seed=0, negatives=self._source.negatives)
        remaining = iter(sequences)
        while chunk := [*islice(remaining, size)]:
            count = np.arange(len(chunk))
            yield assembler.assemble(self._rows(chunk), BatchPlan(count, count, 0, 0, START))

    def _rows(self, sequences: Sequence[Events]) -> Rows:
        roles, nothing = self._source.roles, np.zeros(len(sequences), dtype=np.int64)

        def joined(tensors: Iterable[Any]) -> np.ndarray:
            return torch.cat([*tensors]).numpy()

        ids = {name: joined(each.ids[name] for each in sequences) for name in sequences[0].ids}
        counts = {name: joined(each.counts[name] for each in sequences) for name in roles.lists}
        times = [time for each in sequences for time in each.times]
        return Rows(
            user_ids=np.arange(len(sequences)),
            lengths=np.array([each.length for each in sequences]),
            num_candidates=nothing,
            num_labels=nothing,
            items=ids[roles.item],
            actions=ids[roles.action] if roles.action else None,
            timestamps=np.array(times, dtype=np.int64) if self._config.network.needs_times else None,
            context={name: joined(each.context[name] for each in sequences) for name in roles.contextual},
            side=ItemFeatures({name: ids[name] for name in roles.categories}, counts),
            numbers=joined(each.numbers for each in sequences) if roles.numbers else None,
            held_out=nothing,
        )


def histories(
    store: SequenceStore, rows: Iterable[int] | None = None, features: Sequence[str] = ()
) -> Iterator[History]:
    """Read the histories of all users, or of the users in ``rows``, lazily. ``features``: event features to include."""
    raw = {name: store.raw_ids(name) for name, feature in store.features.items() if feature.has_vocab}
    offsets, users = store.offsets(), store.raw_ids(USER_FEATURE)
    action, timestamp = store.action_feature, store.timestamp_feature
    read = dict.fromkeys(filter(None, (store.item_feature, action, timestamp, *features)))
    for row in range(store.num_users) if rows is None else rows:
        events = slice(int(offsets[row]), int(offsets[row + 1]))
        stored: dict[str, Any] = {name: store.sequence(name)[events] for name in read}
        stored |= {name: int(store.context(name)[row]) for name in store.contextual_features}
        values = {name: raw[name][codes] if name in raw else codes for name, codes in stored.items()}
        yield History(
            users[row],
            items=values[store.item_feature],
            actions=None if action is None else values[action],
            timestamps=None if timestamp is None else values[timestamp],
            context={name: values[name] for name in store.contextual_features},
            features={name: values[name] for name in features},
        )
