"""The model of an exported directory: what a service calls, and how sequences of ids become inputs of the program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .encode import Encoder, Events
from .files import (
    COMPILED,
    PROGRAM,
    TABLES,
    VOCABULARY,
    WEIGHTS,
    Table,
    Vocabulary,
    read_directory,
    read_tables,
    read_tensors,
    texts_of,
)
from .requests import Candidates, History, ServingError

ITEM_VECTORS = "item_vectors"
_COSINES_AT_ONCE = 1 << 25
"""Cosines of users and items that are computed at once."""
_SCORES_AT_ONCE = 1 << 19
"""Attention scores that are computed at once, unless one sequence has more: 6 sequences of 200 tokens and 2 heads.

Few sequences of similar lengths are padded by less than many, and what is computed of them stays in the caches.
"""
Program = Callable[[dict[str, Tensor]], Tensor]
"""Inputs, which hstu/serve/program.py names → outputs."""
Sequence_ = tuple[Events, Events | None]
"""Events of a user, and candidates to score; None: the newest event is read."""


@dataclass(frozen=True)
class Recommendation:
    """The best items of one user, best first."""

    items: list[Any]
    """Ids of the raw data."""
    scores: list[float]
    """Cosines of the vectors of user and item."""
    titles: list[str]
    """Titles of the items; empty where the data has none."""


def load(directory: str | Path, *, compiled: bool = False, like: Model | None = None) -> Model:
    """Load the folder ``serving`` of an export, and compare every file with its checksum.

    Args:
        directory: the folder. It may have been moved, and may change or be removed afterwards.
        compiled: run the program that ``--aot`` has compiled for this kind of machine instead of the graph.
        like: a model that this one may share the program with. Reading a program takes seconds, and exports of one
            configuration have equal ones.

    Raises:
        ServingError: a file is missing, incomplete or damaged, or the folder is of another version.
    """
    return Model(Path(directory), compiled, like)


class Model:
    """An exported model in host memory; :func:`load` creates it. Several threads may call it at once.

    ``facts`` is what serving.json holds: features, tasks and limits of the model. ``encoder`` looks up what it reads.
    ``titles`` are those of the items in the order of ``encoder.items``; empty where the data has none.
    """

    def __init__(self, directory: Path, compiled: bool, like: Model | None) -> None:
        self.facts, checksums = read_directory(directory)
        self._tables = tables = read_tables(directory / TABLES)
        stored = read_tensors(directory / VOCABULARY)
        vocabularies = {name: Vocabulary.read(stored, name, each) for name, each in self.facts["features"].items()}
        self.encoder = Encoder(self.facts, vocabularies, vocabularies[self.facts["item"]], stored)
        self.titles = texts_of(stored, "titles") if "titles.utf8" in stored else []
        self._items: Tensor | None = None
        if self.facts["task"] == "retrieval":
            items, places = self.encoder.items, torch.arange(self.encoder.items.size)
            if ITEM_VECTORS in tables:
                vectors = tables[ITEM_VECTORS].rows(places)
            else:
                vectors = tables[self.facts["features"][self.facts["item"]]["table"]].rows(items.rows_of(places))
            self._items = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=self.facts["l2_norm_eps"])
            self._is_missing = ~self._items.any(dim=1)
        if compiled and COMPILED not in checksums:
            raise ServingError(f"{directory} has no compiled program; export with --aot, or load it without")
        self._weights = dict(sorted(read_tensors(directory / WEIGHTS).items()))
        self._checksum = checksums[COMPILED if compiled else PROGRAM]
        self._program: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]
        if like is not None and like._checksum == self._checksum:
            self._program = like._program
        elif compiled:
            self._program = torch._inductor.aoti_load_package(str(directory / COMPILED))
        else:
            self._program = torch.export.load(directory / PROGRAM).module()

    @property
    def reads_request_time(self) -> bool:
        """Whether results depend on ``at``, when they are asked for."""
        return bool(self.facts["reads_request_time"])

    def recommend(
        self, history: History, k: int = 10, at: int | None = None, filter_seen: bool = True
    ) -> Recommendation:
        """:meth:`recommend_batch` for one history."""
        return self.recommend_batch([history], k, at, filter_seen)[0]

    def recommend_batch(
        self, histories: Sequence[History], k: int = 10, at: int | None = None, filter_seen: bool = True
    ) -> list[Recommendation]:
        """The ``k`` best items of each user; fewer where there are not as many.

        Args:
            histories: what each user has done.
            k: number of items.
            at: when they ask, in whole seconds since 1970. None: at the newest event of each.
            filter_seen: leave out the items of a user's history.

        Raises:
            ServingError: a history lacks something that the model reads, is empty or has an event after ``at``; the
                model does not read ``at``; or it is a ranking model.
        """
        seen = [history.items if filter_seen else () for history in histories]
        self._item_vectors("recommend")
        return self.nearest(self.embed_batch(histories, at), [k] * len(histories), seen)

    def nearest(self, queries: Tensor, k: Sequence[int], seen: Sequence[Sequence[Any]]) -> list[Recommendation]:
        """The items whose vectors have the largest cosines with each of ``queries``, float32 [n, E].

        ``k``: the number of items of each. ``seen``: items to leave out of each.
        """
        items, found = self._item_vectors("recommend"), []
        step = max(1, _COSINES_AT_ONCE // max(1, len(items)))
        for first in range(0, len(queries), step):
            scores = queries[first : first + step] @ items.t()
            scores[:, self._is_missing] = -torch.inf
            for own, left_out in zip(scores, seen[first : first + step], strict=True):
                places = self.encoder.items.places(left_out)
                own[places[places >= 0]] = -torch.inf
            own_k = k[first : first + step]
            best, places = scores.topk(min(max(own_k), len(items)), dim=1)
            found += [self._named(*row) for row in zip(best, places, own_k, strict=True)]
        return found

    def _named(self, scores: Tensor, places: Tensor, k: int) -> Recommendation:
        chosen = places[scores > -torch.inf][:k]
        titles = [self.titles[place] for place in chosen.tolist()] if self.titles else []
        return Recommendation(self.encoder.items.values_at(chosen), scores[: len(chosen)].tolist(), titles)

    def embed(self, history: History, at: int | None = None) -> Tensor:
        """:meth:`embed_batch` for one history: float32 [E]."""
        return self.embed_batch([history], at)[0]

    def embed_batch(self, histories: Sequence[History], at: int | None = None) -> Tensor:
        """Vectors of users, float32 [len(histories), E], of length 1. Arguments and errors: :meth:`recommend_batch`."""
        width = self._item_vectors("embed").shape[1]
        encoded = [self.encode(history, at) for history in histories]
        return torch.cat([torch.empty(0, width), *self.run(encoded)])

    def encode(self, history: History, at: int | None = None) -> Sequence_:
        """What :meth:`run` reads of a user to embed. A server encodes requests of several times and runs them together.

        Arguments and errors: :meth:`recommend_batch`.
        """
        self._item_vectors("embed")
        return self.encoder.history(history, at, self.facts["max_items"]), None

    def run(self, encoded: Sequence[Sequence_]) -> list[Tensor]:
        """What the program predicts for each: the vector [1, E] of a user, or logits [candidates, outputs]."""
        return _run(lambda inputs: self._program(inputs, self._weights), self.facts, self._tables, encoded)

    def item_vectors(self, items: Sequence[Any]) -> Tensor:
        """Vectors of items, float32 [len(items), E], of length 1; zeros for items that the model does not have."""
        places = self.encoder.items.places(items)
        return self._item_vectors("embed")[places.clamp(min=0)].masked_fill((places < 0)[:, None], 0)

    def score(
        self, history: History, candidates: Candidates | Sequence[Any], at: int | None = None
    ) -> dict[str, list[Any]]:
        """:meth:`score_batch` for one history."""
        return self.score_batch([history], [candidates], at)[0]

    def score_batch(
        self, histories: Sequence[History], candidates: Sequence[Candidates | Sequence[Any]], at: int | None = None
    ) -> list[dict[str, list[Any]]]:
        """For each history: name of a prediction → its value for each candidate, in the order given.

        Ranking has a prediction per task (``facts["tasks"]``). A binary task gives a probability, a class task a list
        of probabilities, others a number. Retrieval has "cosine".
        Arguments and errors: :meth:`recommend_batch`.
        """
        return [self.predictions(outputs) for outputs in self.predict_batch(histories, candidates, at)]

    def predictions(self, outputs: Tensor) -> dict[str, list[Any]]:
        """Name of a prediction → its values, of what the model computes for candidates, float32 [n, outputs]."""
        values, first = {}, 0
        for task in self.facts["tasks"]:
            own = outputs[:, first : first + task["width"]]
            first += task["width"]
            if task["kind"] != "number":
                own = own.softmax(1) if task["kind"] == "class" else own.sigmoid()
            values[task["name"]] = (own if task["kind"] == "class" else own[:, 0]).tolist()
        return values

    def predict_batch(
        self, histories: Sequence[History], candidates: Sequence[Candidates | Sequence[Any]], at: int | None = None
    ) -> list[Tensor]:
        """As :meth:`score_batch`, but what the model computes, float32 [candidates, outputs]: logits of ranking."""
        shown = [each if isinstance(each, Candidates) else Candidates(each) for each in candidates]
        if len(shown) != len(histories):
            raise ServingError(f"{len(shown)} lists of candidates for {len(histories)} histories; give one per history")
        if self.facts["task"] == "retrieval":
            queries = self.embed_batch(histories, at)
            return [
                (self.item_vectors(each.items) @ query)[:, None] for each, query in zip(shown, queries, strict=True)
            ]
        pairs = list(zip(histories, shown, strict=True))
        parts = [self.encoder.sequences(history, each, at) for history, each in pairs]
        found = iter(self.run([part for own in parts for part in own]))
        width = sum(task["width"] for task in self.facts["tasks"])
        return [torch.cat([torch.empty(0, width), *(next(found) for _ in own)]) for own in parts]

    def _item_vectors(self, purpose: str) -> Tensor:
        if self._items is None:
            raise ServingError(f"cannot {purpose}: a ranking model has no vectors of users and items; use score")
        return self._items


def _run(
    program: Program, facts: Mapping[str, Any], tables: Mapping[str, Table], sequences: Sequence[Sequence_]
) -> list[Tensor]:
    """What the program predicts for each sequence, [number of outputs of the sequence, width]."""
    lengths = [_num_items(sequence) * facts["tokens_per_item"] + len(facts["contextual"]) for sequence in sequences]
    order = sorted(range(len(sequences)), key=lengths.__getitem__)  # sequences of one chunk are padded to the longest
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * facts["heads"] * lengths[order[stop]] ** 2 <= _SCORES_AT_ONCE:
            stop += 1
        chunk = order[start:stop]
        inputs, counts = _inputs(facts, tables, [sequences[place] for place in chunk])
        with torch.inference_mode():
            outputs = program(inputs)
        for place, own in zip(chunk, outputs.split(counts), strict=True):
            found[place] = own
        start = stop
    return found


def _num_items(sequence: Sequence_) -> int:
    events, candidates = sequence
    return events.length + (0 if candidates is None else candidates.length)


def _inputs(
    facts: Mapping[str, Any], tables: Mapping[str, Table], sequences: Sequence[Sequence_]
) -> tuple[dict[str, Tensor], list[int]]:
    """The inputs that the program reads (hstu/serve/program.py names them), and the number of outputs of each."""
    parts = [part for sequence in sequences for part in sequence if part is not None]
    inputs = _table_rows(facts, tables, parts)
    per_item, num_context = facts["tokens_per_item"], len(facts["contextual"])
    items = torch.tensor([_num_items(sequence) for sequence in sequences])
    shown = torch.tensor([0 if candidates is None else candidates.length for _, candidates in sequences])
    # Where one candidate is the newest event to the mask, it is a part of the history.
    apart = shown if facts["candidates"]["apart"] else torch.zeros_like(shown)
    lengths, ends = num_context + items * per_item, num_context + (items - apart) * per_item
    sequence, place = _runs(lengths)
    first_item = items.cumsum(0) - items
    item = first_item[sequence] + (place - num_context).clamp(min=0) // per_item
    row = num_context * len(items) + item + (place - num_context) % per_item * int(items.sum())
    inputs["order"] = torch.where(place < num_context, place * len(items) + sequence, row)
    inputs["positions"] = torch.minimum(place, ends[sequence])
    inputs |= _padded("", lengths, ends)
    if "is_history" in facts["inputs"]:
        of_item, place_of_item = _runs(items)
        inputs["is_history"] = (place_of_item < (items - shown)[of_item]).float()
    if "token_times" in facts["inputs"]:
        times = _joined([part.times for part in parts])[item]
        at = torch.stack([events.at for events, _ in sequences if events.at is not None])[sequence]
        inputs["token_times"] = times
        inputs["query_times"] = _query_times(facts, times, place, lengths[sequence], ends[sequence], at)
    if facts["truncate_to_items"] is not None:
        removed = (ends - num_context - facts["truncate_to_items"] * per_item).clamp(min=0)
        is_kept = (place < num_context) | (place >= num_context + removed[sequence])
        inputs["kept"] = is_kept.nonzero().squeeze(1)
        inputs |= _padded("kept_", lengths - removed, ends - removed)
    counts = shown.clamp(min=1) if facts["task"] == "ranking" else torch.ones_like(shown)
    run, output = _runs(counts)
    last = lengths.cumsum(0)[run]
    back = (counts[run] - output) * per_item if facts["task"] == "ranking" else 1
    inputs["outputs"] = last - back
    return {name: inputs[name] for name in facts["inputs"]}, counts.tolist()


def _table_rows(facts: Mapping[str, Any], tables: Mapping[str, Table], parts: Sequence[Events]) -> dict[str, Tensor]:
    """The inputs that have a row per event, and those of the users; of a list the mean of its rows."""

    def rows_of(name: str, ids: Sequence[Tensor]) -> Tensor:
        return tables[facts["features"][name]["table"]].rows(torch.cat([*ids]))

    def of_events(names: Sequence[str]) -> Tensor:
        found = []
        for name in names:
            rows = rows_of(name, [part.ids[name] for part in parts])
            is_list = facts["features"][name]["is_list"]
            found.append(_means(rows, torch.cat([part.counts[name] for part in parts])) if is_list else rows)
        return torch.cat(found, dim=1)

    names = {"items": [facts["item"]], "actions": [facts["action"]] if facts["action"] else []}
    names |= {role: facts[role] for role in ("side", "known_after")}
    inputs = {role: of_events(read) for role, read in names.items() if read}
    if facts["numbers"]:
        inputs["numbers"] = _joined([part.numbers for part in parts])
    if facts["contextual"]:
        users = [part for part in parts if part.context]
        inputs["context"] = torch.cat([rows_of(n, [user.context[n] for user in users]) for n in facts["contextual"]])
    return inputs


def _joined(parts: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([part for part in parts if part is not None])


def _means(rows: Tensor, lengths: Tensor) -> Tensor:
    """Means of runs of rows [sum of lengths, width], one run for each of the lengths int64 [n]: [n, width]."""
    run, _ = _runs(lengths)
    return rows.new_zeros(len(lengths), rows.shape[1]).index_add_(0, run, rows) / lengths[:, None]


def _query_times(
    facts: Mapping[str, Any], times: Tensor, place: Tensor, lengths: Tensor, ends: Tensor, at: Tensor
) -> Tensor:
    """From when each token looks back, int64 [T]: the time of the token after it, or its own.

    The newest token of a history is followed by the request, unless candidates are apart in training, too.
    """
    if not facts["asks_for_next"]:
        return times
    following = torch.cat([times[1:], times[-1:]])
    queries = torch.where(place + 1 < ends, following, times)
    return torch.where(place + 1 == ends, at, queries) if facts["request_follows"] else queries


def _padded(kind: str, lengths: Tensor, ends: Tensor) -> dict[str, Tensor]:
    """The inputs padded, places and history_ends of sequences."""
    sequence, place = _runs(lengths)
    longest = int(lengths.max())
    places = sequence * longest + place
    padded = torch.full((len(lengths) * longest,), len(places))
    padded[places] = torch.arange(len(places))
    return {f"{kind}padded": padded.view(-1, longest), f"{kind}places": places, f"{kind}history_ends": ends}


def _runs(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(run, place in its run) of each element of consecutive runs; int64 [sum of lengths] both."""
    run = torch.repeat_interleave(lengths)
    return run, torch.arange(len(run)) - (lengths.cumsum(0) - lengths)[run]
