"""Load an exported model, and answer requests with it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cache import Prefix, newest_changes
from .encode import Encoder, Events
from .files import (
    COMPILED,
    PROGRAM,
    TABLES,
    VOCABULARY,
    WEIGHTS,
    Contents,
    Vocabulary,
    fitting,
    read_contents,
    rows_at,
    tables_of,
    texts_of,
)
from .inputs import Query, Sequence_, inputs_of, num_tokens
from .requests import Candidates, History, ServingError

ITEM_VECTORS = "item_vectors"
_COSINES_AT_ONCE = 1 << 25
"""Maximum cosine similarities per matrix product."""
_LARGEST = 1 << 20
"""Maximum number of events, and width of a feature."""
_SCORES_AT_ONCE = 1 << 16
"""Maximum attention scores per chunk, unless one sequence has more: those of 3 sequences of 100 tokens with 2 heads.
Small chunks need less padding, and their activations fit the CPU caches."""
Lists = tuple[Sequence[Any], Sequence[Any] | None]
"""(items not to recommend, the only items to recommend). None: all."""


@dataclass(frozen=True)
class Recommendation:
    """The best items of one user, best first."""

    items: list[Any]
    """Raw ids."""
    scores: list[float]
    """Cosine similarities of user and item."""
    titles: list[str]
    """Titles of the items; empty if the data has no titles."""
    unknown: dict[str, list[Any]] = field(default_factory=dict)
    """Item, action or feature → values of the history that the model does not have."""


class Scores(dict[str, list[Any]]):
    """Name of a prediction → its value per candidate. ``unknown``: as of a Recommendation, also of the candidates."""

    unknown: dict[str, list[Any]]


def load(directory: str | Path, *, like: Model | None = None, mapped: bool = False) -> Model:
    """Load the folder ``serving`` of an export, and verify the checksums of all files.

    Args:
        directory: the folder. It may have been moved, and may change or be removed after loading. A delta is applied
            to ``like`` if that is its base or made of it, or else to the export at the path that it states.
        like: share what is equal with this model: the program, as in exports of one configuration, which saves
            seconds; after a delta also tables and vocabularies.
        mapped: map the tensors, so that processes share them. The files must then never be changed, but may be removed.

    Raises ServingError if a file is missing or damaged, a delta does not fit its base, the folder has another version,
    or a test request fails.
    """
    contents = read_contents(Path(directory), None if like is None else like.contents, mapped)
    with fitting(Path(directory)):
        model = Model(contents, like)
        model.check()
        return model


class Model:
    """An exported model in host memory, created by :func:`load`. Thread-safe.

    ``facts`` is the content of serving.json: features, tasks and limits of the model. ``encoder`` converts raw ids.
    ``titles`` has the item titles in the order of ``encoder.items``; it is empty if the data has no titles.
    ``contents`` is what the export holds.
    """

    def __init__(self, contents: Contents, like: Model | None = None) -> None:
        self.contents, self.facts = contents, contents.facts
        facts, stored = self.facts, contents.tensors[VOCABULARY]
        self.tables = tables = tables_of(contents.tensors[TABLES])
        sizes = {"tokens_per_item": (facts["tokens_per_item"], 2), "max_items": (facts["max_items"], _LARGEST)}
        sizes |= {each["name"]: (each["width"], _LARGEST) for each in facts["numbers"]}
        for name, each in facts["features"].items():
            if each["kind"] not in ("texts", "numbers"):
                sizes[name] = each["size"], len(tables[each["table"]].weight)
        for name, (size, largest) in sizes.items():
            if type(size) is not int or not 0 <= size <= largest:
                raise ValueError(f"the size of {name!r} is {size!r}; it may be at most {largest}")
        vocabularies = {name: self._vocabulary(name, like) for name in facts["features"]}
        self.encoder = Encoder(self.facts, vocabularies, vocabularies[self.facts["item"]], stored)
        self.reads_request_time = bool(facts["reads_request_time"])
        """Whether results depend on ``at``, the time of the request."""
        self.filter_seen = bool(facts.get("filter_seen", True))
        """Whether items of a history are not recommended unless a caller says otherwise. Older exports lack it."""
        self.titles = texts_of(stored, "titles") if "titles.utf8" in stored else []
        self._items: Tensor | None = None
        if self.facts["task"] == "retrieval":
            table, rows = tables.get(ITEM_VECTORS), torch.arange(self.encoder.items.size)
            if table is None:
                table, rows = tables[facts["features"][facts["item"]]["table"]], self.encoder.items.rows_of(rows)
            is_as_stored = rows.equal(torch.arange(len(table.weight))[: len(rows)])
            is_as_stored = is_as_stored and table.weight.dtype == torch.float32
            self._items = table.weight[: len(rows)] if is_as_stored else table.rows(rows)  # no copy of a mapped table
            norms = self._items.norm(dim=1).clamp(min=facts["l2_norm_eps"])
            self._lengths = torch.nn.functional.pad(norms, (0, 1), value=1.0)
            self._is_missing = torch.nn.functional.pad(~self._items.any(dim=1), (0, 1), value=True)
        self.weights = dict(sorted(contents.tensors[WEIGHTS].items()))
        self.whole_because: str | None = facts["whole_because"]
        """Why no keys and values can be kept for later requests of a user. None: they can."""
        self._program, self.traced_because = _program_of(contents, like)
        """``traced_because``: why the compiled program of the export does not run. None: it does, or there is none."""

    def _vocabulary(self, name: str, like: Model | None) -> Vocabulary:
        """The vocabulary of a feature: that of ``like``, with what it has looked up, if a delta did not change it."""
        stored, facts = self.contents.tensors[VOCABULARY], self.facts["features"][name]
        if like is not None and like.facts["features"].get(name) == facts:
            theirs, keys = like.contents.tensors[VOCABULARY], (f"ids.{name}", f"ids.{name}.utf8", f"rows.{name}")
            if all(stored.get(key) is theirs.get(key) for key in keys):
                return like.encoder.vocabularies[name]
        return Vocabulary.read(stored, name, facts)

    def check(self) -> None:
        """Answer a test request. Raises an error of any type if that fails or the result is not finite."""
        encoder = self.encoder
        item, missing = encoder.items.values_at(torch.tensor([0])), {name: [None] for name in encoder.given_features}
        history = History(items=item, actions=[None], timestamps=[0], features=missing)
        shown = Candidates(item, {name: [None] for name in encoder.known_before})
        (computed,) = self.run([self.encode(history, shown, 0 if self.reads_request_time else None)])
        self.predictions(self.outputs_of(item, computed))
        for name in encoder.described:
            encoder.text_of(name)
        if not computed.isfinite().all():
            raise ServingError("it gives no finite number")

    def left_out(self, history: History, filter_seen: bool | None) -> Sequence[Any]:
        """The items of a history if these are not recommended, else none. Argument: see :meth:`recommend_batch`."""
        return history.items if (self.filter_seen if filter_seen is None else filter_seen) else ()

    def recommend(
        self, history: History, k: int = 10, at: int | None = None, filter_seen: bool | None = None
    ) -> Recommendation:
        """Recommend items for one history, see :meth:`recommend_batch`."""
        return self.recommend_batch([history], k, at, filter_seen)[0]

    def recommend_batch(
        self, histories: Sequence[History], k: int = 10, at: int | None = None, filter_seen: bool | None = None
    ) -> list[Recommendation]:
        """Recommend the ``k`` best items to each user, or fewer if not enough items are left.

        Args:
            histories: one per user.
            at: time of the request in whole seconds since 1970. None: the time of each user's newest event.
            filter_seen: leave out the items of a user's history. None: if the model's evaluation does.

        Raises ServingError if a history is empty, incomplete or has an event after ``at``, if the model does not read
        ``at``, or if it is a ranking model.
        """
        lists = [(self.left_out(history, filter_seen), None) for history in histories]
        found = self.nearest(self.embed_batch(histories, at), [k] * len(histories), lists)
        unknown = self.unknown_batch(histories, [Candidates([])] * len(histories))
        return [replace(each, unknown=own) for each, own in zip(found, unknown, strict=True)]

    def unknown(self, history: History, candidates: Candidates | Sequence[Any] = ()) -> dict[str, list[Any]]:
        """Item, action or feature → values of a request that the model reads and does not have."""
        return self.unknown_batch([history], [candidates])[0]

    def unknown_batch(
        self, histories: Sequence[History], candidates: Sequence[Candidates | Sequence[Any]]
    ) -> list[dict[str, list[Any]]]:
        """As :meth:`unknown`, of each request."""
        read = (each.cut(slice(-self.facts["max_items"], None)) for each in histories)
        shown = (each if isinstance(each, Candidates) else Candidates(each) for each in candidates)
        others = (History(items=each.items, features=each.features) for each in shown)
        return self.encoder.unknown([*zip(read, others, strict=True)])

    def nearest(self, queries: Tensor, k: Sequence[int], lists: Sequence[Lists]) -> list[Recommendation]:
        """Find the ``k`` items nearest to each unit vector of ``queries``, float32 [n, E]."""
        found, count = [], len(self._is_missing)
        step = max(1, _COSINES_AT_ONCE // max(1, count))
        for first in range(0, len(queries), step):
            chunk = slice(first, first + step)
            best, places = self.scores(queries[chunk], lists[chunk]).topk(min(max(k[chunk]), count), dim=1)
            for own_best, own_places, own_k in zip(best.tolist(), places, k[chunk], strict=True):
                scores = [score for score in own_best[:own_k] if score > -torch.inf]
                found.append(self.named(scores, own_places[: len(scores)]))
        return found

    def scores(self, queries: Tensor, lists: Sequence[Lists]) -> Tensor:
        """Cosines of unit vectors, float32 [n, E], and all items, [n, items + 1]; -inf for items not to recommend, and
        in the last column, which is for unknown items."""
        scores = queries.new_empty(len(queries), len(self._lengths))
        torch.mm(queries, self.stored_vectors.t(), out=scores[:, :-1])
        scores /= self._lengths
        scores[:, self._is_missing] = -torch.inf
        for own, (left_out, only) in zip(scores, lists, strict=True):
            if only is not None:
                places = self.encoder.items.places(only)
                kept = own[places]
                own.fill_(-torch.inf)[places] = kept
            own[self.encoder.items.places(left_out)] = -torch.inf
        return scores

    def named(self, scores: list[float], places: Tensor) -> Recommendation:
        """The items at places, int64 [n], with their scores."""
        titles = [self.titles[place] for place in places.tolist()] if self.titles else []
        return Recommendation(self.encoder.items.values_at(places), scores, titles)

    def embed(self, history: History, at: int | None = None) -> Tensor:
        """Encode one history into a unit vector, float32 [E], see :meth:`embed_batch`."""
        return self.embed_batch([history], at)[0]

    def embed_batch(self, histories: Sequence[History], at: int | None = None) -> Tensor:
        """Encode histories into unit vectors, float32 [n, E]. Arguments and errors: :meth:`recommend_batch`."""
        encoded = self.encode_batch([Query(history, None, at) for history in histories])
        return torch.cat([self.stored_vectors[:0], *self.run(encoded)])

    def encode(self, history: History, candidates: Candidates | None, at: int | None = None) -> list[Sequence_]:
        """Prepare one request for :meth:`run`."""
        return self.encode_batch([Query(history, candidates, at)])[0]

    def encode_batch(self, queries: Sequence[Query]) -> list[list[Sequence_]]:
        """Prepare requests for :meth:`run`, which runs requests with different ``at`` together."""
        read, found = [self._read(query) for query in queries], []
        asked = [(query.history, query.at, count) for query, (count, _, _) in zip(queries, read, strict=True)]
        for query, (_, parts, prefix), events in zip(queries, read, self.encoder.histories(asked), strict=True):
            shown: Sequence[Events | None] = [None]
            if self.facts["task"] == "ranking" and query.candidates is not None:
                shown = self.encoder.candidates(query.candidates, query.history, query.at, parts)
            found.append([Sequence_(events, part, prefix) for part in shown])
        return found

    def _read(self, query: Query) -> tuple[int, int, Prefix | None]:
        """(number of the newest events to compute, of parts of the candidates, what is cached of the other events)."""
        facts, parts, room = self.facts, 1, self.facts["max_items"]
        history, candidates, _, earlier, caches = query
        if facts["task"] == "ranking":
            if candidates is None:
                raise ServingError("a ranking model has no vectors of users and items; use score, in the server /score")
            room, parts = self.encoder.room(len(candidates.items))
        elif candidates is not None and candidates.features:
            raise ServingError("a retrieval model reads no features of candidates; leave them out")
        count = min(len(history.items), room)
        if not caches or self.whole_because is not None:
            return count, parts, None
        before = int(len(history.items) > room)
        window = history.cut(slice(len(history.items) - count - before, None))
        scored = 1 if candidates is not None and not facts["candidates"]["apart"] else 0
        end = len(facts["contextual"]) + (count + scored) * facts["tokens_per_item"]
        nothing = Prefix(window, before, end)
        prefix = nothing if earlier is None else earlier.valid_for(facts, nothing)
        return count - prefix.num_items, parts, prefix

    def run(
        self, encoded: Sequence[Sequence[Sequence_]], keep: Callable[[int, Prefix], None] | None = None
    ) -> list[Tensor]:
        """Run the program. Returns the vector [1, E] of each user, or the logits [candidates, outputs]. ``keep`` is
        called with the number of each request with ``caches``, and what its next request may reuse."""
        encoded = self._with_shared_prefixes(encoded)
        outputs, found = iter(self._run([part for own in encoded for part in own])), []
        nothing = torch.empty(0, sum(len(task["columns"]) for task in self.facts["tasks"]))
        for place, own in enumerate(encoded):
            of_parts = [next(outputs) for _ in own]
            found.append(torch.cat([output for output, _ in of_parts]) if own else nothing)
            if keep is not None and own and (prefix := of_parts[-1][1]) is not None:
                keep(place, prefix)
        return found

    def item_vectors(self, items: Sequence[Any]) -> Tensor:
        """Unit vectors of items, float32 [len(items), E]; zeros for unknown items."""
        places = self.encoder.items.places(items)
        found = rows_at(self.stored_vectors, places) / self._lengths[places, None]
        return found.masked_fill((places < 0)[:, None], 0)

    def score(self, history: History, candidates: Candidates | Sequence[Any], at: int | None = None) -> Scores:
        """Score candidates for one history, see :meth:`score_batch`."""
        return self.score_batch([history], [candidates], at)[0]

    def score_batch(
        self, histories: Sequence[History], candidates: Sequence[Candidates | Sequence[Any]], at: int | None = None
    ) -> list[Scores]:
        """Score candidates. Returns for each history: name → one value per candidate, None for unknown items. The names
        are the ``columns`` of ``facts["tasks"]``: probabilities and values of ranking, the cosine as "score" of
        retrieval. Errors: :meth:`recommend_batch`."""
        found = [self.predictions(outputs) for outputs in self.predict_batch(histories, candidates, at)]
        for scores, unknown in zip(found, self.unknown_batch(histories, candidates), strict=True):
            scores.unknown = unknown
        return found

    def predictions(self, outputs: Tensor) -> Scores:
        """Convert outputs for candidates, float32 [n, outputs], to name → values, None for those that are NaN."""
        columns = columns_of(self.facts["tasks"], outputs)
        return Scores({name: [None if v != v else v for v in each.tolist()] for name, each in columns.items()})

    def outputs_of(self, items: Sequence[Any], computed: Tensor) -> Tensor:
        """Outputs for candidates, float32 [n, outputs], from those of :meth:`run`. NaN for items without a score."""
        is_unknown = self.encoder.known_items.places(items) < 0
        if self._items is not None:
            vectors = self.item_vectors(items)
            computed, is_unknown = vectors @ computed.T, ~vectors.any(dim=1)
        return computed.masked_fill(is_unknown[:, None], torch.nan)

    def predict_batch(
        self, histories: Sequence[History], candidates: Sequence[Candidates | Sequence[Any]], at: int | None = None
    ) -> list[Tensor]:
        """As :meth:`score_batch`, but logits or cosines, float32 [candidates, outputs]; NaN for unknown items."""
        shown = [each if isinstance(each, Candidates) else Candidates(each) for each in candidates]
        if len(shown) != len(histories):
            raise ServingError(f"{len(shown)} lists of candidates for {len(histories)} histories; give one per history")
        outputs = self.run(self.encode_batch([Query(*each, at) for each in zip(histories, shown, strict=True)]))
        return [self.outputs_of(each.items, computed) for each, computed in zip(shown, outputs, strict=True)]

    def _with_shared_prefixes(self, encoded: Sequence[Sequence[Sequence_]]) -> list[Sequence[Sequence_]]:
        """Compute the history of several parts with candidates once, if that is the prefix of each."""
        found, newest = list(encoded), int(newest_changes(self.facts))
        if not self.facts["candidates"]["apart"]:  # windows count the candidate, too
            return found
        firsts = {place: own[0] for place, own in enumerate(encoded) if len(own) > 1}
        firsts = {place: own for place, own in firsts.items() if own.prefix and own.events.length > newest}
        alone = self._run([Sequence_(own.events, None, own.prefix) for own in firsts.values()])
        for (place, own), (_, prefix) in zip(firsts.items(), alone, strict=True):
            events = own.events.part(own.events.length - newest, own.events.length)
            found[place] = [Sequence_(events, part.candidates, prefix) for part in encoded[place]]
        return found

    def _run(self, sequences: Sequence[Sequence_]) -> list[tuple[Tensor, Prefix | None]]:
        """Run the program on chunks of sequences of similar length. Returns [outputs, width] per sequence, and more of
        its prefix."""
        facts, chunks, longest = self.facts, list[list[int]](), 0
        found: list[tuple[Tensor, Prefix | None]] = [(torch.empty(0), None)] * len(sequences)
        most, per_item, context = _SCORES_AT_ONCE // facts["heads"], facts["tokens_per_item"], len(facts["contextual"])
        new = [num_tokens(facts, each) for each in sequences]
        whole = [count + each.cached_items * per_item + context for count, each in zip(new, sequences, strict=True)]
        # A chunk is padded to its longest sequence.
        for place in sorted(range(len(sequences)), key=lambda place: (new[place], whole[place])):
            longest = max(longest, whole[place])
            if not chunks or (len(chunks[-1]) + 1) * new[place] * longest > most:
                chunks, longest = [*chunks, []], whole[place]
            chunks[-1].append(place)
        for chunk in chunks:
            inputs, counts = inputs_of(facts, self.tables, [sequences[place] for place in chunk])
            with torch.inference_mode():
                outputs, *computed = self._program(inputs, self.weights)
            first, times = 0, inputs.get("token_times")
            for place, own in zip(chunk, outputs.split(counts), strict=True):
                events, _, prefix = sequences[place]
                found[place] = own, prefix and prefix.followed_by(facts, events.length, computed, times, first)
                first += new[place]
        return found

    @property
    def stored_vectors(self) -> Tensor:
        """Vectors of the items, float32 [items, E], of any length. Retrieval only."""
        if self._items is None:
            raise ServingError("a ranking model has no vectors of users and items; use score, in the server /score")
        return self._items

    @cached_property
    def vectors(self) -> Tensor:
        """Unit vectors of all items, float32 [items + 1, E], zeros for unknown items, the last. A copy, if used."""
        return torch.nn.functional.pad(self.stored_vectors, (0, 0, 0, 1)).div_(self._lengths[:, None])

    @cached_property
    def popularity(self) -> Tensor | None:
        """Events of each item in the data, as a part of the most that one has, [items + 1]. None: an older export."""
        counts = self.contents.tensors[VOCABULARY].get("popularity")
        return None if counts is None else torch.nn.functional.pad(counts / counts.max().clamp(min=1), (0, 1))

    @property
    def popular_in(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Context, such as "country=DE" → its items with the most events in the data, int64 [n]; their events, [n]."""
        rows = self.facts.get("popular_in", {})  # older exports lack it
        counted = self.contents.tensors[VOCABULARY].get("popular_in", torch.empty(0, 2)).split([*rows.values()])
        return {context: (own[:, 0], own[:, 1].float()) for context, own in zip(rows, counted, strict=True)}


def _program_of(contents: Contents, like: Model | None) -> tuple[Callable[..., Sequence[Tensor]], str | None]:
    """(what maps inputs and weights to outputs: the compiled program, if it fits this machine; why it does not)."""
    if like is not None and all(like.contents.files.get(n) == contents.files.get(n) for n in (PROGRAM, COMPILED)):
        return like._program, like.traced_because
    path, why = contents.path_of(COMPILED), None
    if path.is_file():
        loader: Any = torch._C._aoti.AOTIModelPackageLoader
        wanted = loader.load_metadata_from_package(str(path), "model").get("for")
        if wanted == machine():
            run = loader(str(path), "model", False, 1, -1).run
            return lambda inputs, weights: run([*inputs.values(), *weights.values()]), None
        why = f"it was compiled for {wanted}, and this is {machine()}"
    traced = torch.export.load(contents.path_of(PROGRAM))
    constants = [traced.constants[each.target] for each in traced.graph_signature.input_specs if each.target]
    graph = traced.graph_module  # its module() would match each input with guards
    return lambda inputs, weights: graph(*constants, *inputs.values(), *weights.values()), why


def machine() -> str:
    """What a compiled program depends on: instructions of the processor, and the version of torch."""
    has = torch.backends.cpu.get_cpu_capability()
    instructions = "AVX2" if has in ("AVX2", "AVX512") else has
    return f"{platform.machine()} with {instructions}, torch {torch.__version__.partition('+')[0]}"


def columns_of(tasks: Sequence[Mapping[str, Any]], outputs: Tensor) -> dict[str, Tensor]:
    """Convert outputs, float32 [n, outputs], to name → float32 [n]: probabilities, values and expected classes."""
    columns: dict[str, Tensor] = {}
    widths = [len(task["columns"]) for task in tasks]
    for task, own in zip(tasks, outputs.double().split(widths, dim=1), strict=True):
        if task["kind"] == "class":
            own = own.softmax(1)
        elif task["kind"] == "binary":
            own = own.sigmoid()
        if task["expected"] is not None:
            columns[task["expected"]] = own @ (task["first"] + torch.arange(own.shape[1])).double()
        columns |= dict(zip(task["columns"], own.T, strict=True))
    return {name: values.float() for name, values in columns.items()}
