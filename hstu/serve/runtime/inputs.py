"""Convert sequences of ids to the inputs of an exported program."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .cache import Prefix, joined_prefixes
from .encode import Events, joined
from .files import Table, int64s, run_indices
from .requests import Candidates, History


class Query(NamedTuple):
    """A request to a model."""

    history: History
    candidates: Candidates | None = None
    """Items to score. A ranking model needs them."""
    at: int | None = None
    """Time of the request. None: that of the newest event."""
    earlier: Prefix | None = None
    """What an earlier run has kept of this user, to be reused."""
    caches: bool = False
    """Keep keys and values of the history, unless ``Model.whole_because`` says why not."""


class Sequence_(NamedTuple):
    """A history to predict from."""

    events: Events
    """Those after the prefix."""
    candidates: Events | None = None
    """Items to score. None: predict from the newest event."""
    prefix: Prefix | None = None
    """The first events, whose keys and values are cached, with the context. None: cache nothing."""

    @property
    def cached_items(self) -> int:
        """Number of events in the prefix."""
        return 0 if self.prefix is None else self.prefix.num_items

    @property
    def new_items(self) -> int:
        """Number of events and candidates after the prefix."""
        return self.events.length + (0 if self.candidates is None else self.candidates.length)


def num_tokens(facts: Mapping[str, Any], sequence: Sequence_) -> int:
    """Tokens of a sequence after its prefix, which has the context."""
    context = 0 if sequence.cached_items else len(facts["contextual"])
    events, shown = sequence.events.length, sequence.new_items - sequence.events.length
    per_candidate = 1 if facts["candidates"]["apart"] else facts["tokens_per_item"]  # nothing sees their actions
    return context + events * facts["tokens_per_item"] + shown * per_candidate


def inputs_of(
    facts: Mapping[str, Any], tables: Mapping[str, Table], sequences: Sequence[Sequence_]
) -> tuple[dict[str, Tensor], list[int]]:
    """(inputs of the program, see hstu/model/program.py; number of outputs of each sequence)."""
    parts = [part for each in sequences for part in (each.events, each.candidates) if part is not None]
    inputs, own = _table_rows(facts, tables, parts), _layout(facts, sequences)
    inputs |= {name: int64s(own[name]) for name in own.keys() & facts["inputs"]}
    inputs |= _padded("", own["lengths"], own["ends"])
    if "item_padded" in facts["inputs"]:
        inputs |= _padded("item_", own["item_lengths"], own["item_lengths"])
    if own["kept"]:
        inputs |= _padded("kept_", own["kept_lengths"], own["kept_ends"])
    if "prefix" in facts["inputs"]:
        inputs |= joined_prefixes(facts, [each.prefix for each in sequences])
    if "is_history" in inputs:
        inputs["is_history"] = inputs["is_history"].float()
    return {name: inputs[name] for name in facts["inputs"]}, own["counts"]


def _layout(facts: Mapping[str, Any], sequences: Sequence[Sequence_]) -> dict[str, list[int]]:
    """Numbers of tokens, items and sequences. For few, the fixed costs of operators of tensors would be larger."""
    per_item, context, truncate = facts["tokens_per_item"], len(facts["contextual"]), facts["truncate_to_items"]
    total, rows = sum(each.new_items for each in sequences), context * len(sequences)
    own = defaultdict[str, list[int]](list)
    first = first_item = 0  # of the sequence, among all tokens and items
    for number, each in enumerate(sequences):
        shown, cached = each.new_items - each.events.length, each.cached_items
        # Unless "apart", the attention mask treats the candidate as the newest event of the history.
        events, apart = (each.events.length, shown) if facts["candidates"]["apart"] else (each.new_items, 0)
        before = context + cached * per_item if cached else 0  # tokens of the prefix
        end = context + (cached + events) * per_item
        last, last_item = first + end - before, first_item + events  # behind the history
        stop, stop_item = last + apart, last_item + apart
        of_context = range(number, rows + number, len(sequences)) if rows and not cached else range(0)
        table = [range(rows + first_item + of * total, rows + last_item + of * total) for of in range(per_item)]
        own["order"] += [*of_context, *joined(zip(*table, strict=True)), *range(rows + last_item, rows + stop_item)]
        own["positions"] += [*range(before, end), *[end] * apart]
        if "token_times" in facts["inputs"]:
            of_items = [*each.events.times, *(() if each.candidates is None else each.candidates.times)]
            times = of_items[:1] * len(of_context) + joined(zip(*[of_items[:events]] * per_item, strict=True))
            own["token_times"] += times + of_items[events:]
            if times and facts["asks_for_next"]:  # the time of the next token, or of the request, or its own
                times = times[1:] + ([each.events.at or 0] if facts["request_follows"] else times[-1:])
            own["query_times"] += times + of_items[events:]
        own["is_history"] += [1] * each.events.length + [0] * shown
        count = max(1, shown) if facts["task"] == "ranking" else 1
        step = per_item if facts["task"] == "ranking" and not facts["candidates"]["apart"] else 1
        own["counts"].append(count)
        own["item_lengths"].append(each.new_items)
        own["outputs"] += range(stop - count * step, stop, step)
        own["lengths"].append(stop - first)
        own["ends"].append(end)
        if truncate is not None:  # which leaves nothing cached
            removed = max(0, end - context - truncate * per_item)
            own["kept"] += [*range(first, first + context), *range(first + context + removed, stop)]
            own["kept_lengths"].append(stop - first - removed)
            own["kept_ends"].append(end - removed)
        first, first_item = stop, stop_item
    return own


def _table_rows(facts: Mapping[str, Any], tables: Mapping[str, Table], parts: Sequence[Events]) -> dict[str, Tensor]:
    """The inputs with one row per event or per user. A list has the mean of its rows."""

    def rows_of(name: str, ids: Sequence[Tensor]) -> Tensor:
        return tables[facts["features"][name]["table"]].rows(torch.cat([*ids]))

    def of_events(names: Sequence[str]) -> Tensor:
        found = []
        for name in names:
            rows = rows_of(name, [part.ids[name] for part in parts])
            if facts["features"][name]["is_list"]:
                counts = torch.cat([part.counts[name] for part in parts])
                sums = rows.new_zeros(len(counts), rows.shape[1]).index_add_(0, run_indices(counts)[0], rows)
                rows = sums / counts[:, None]
            found.append(rows)
        return torch.cat(found, dim=1)

    names = {"items": [facts["item"]], "actions": [facts["action"]] if facts["action"] else []}
    names |= {role: facts[role] for role in ("side", "known_after")}
    inputs = {role: of_events(read) for role, read in names.items() if read}
    if "action_ids" in facts["inputs"]:
        inputs["action_ids"] = torch.cat([part.ids[facts["action"]] for part in parts])
    if facts["numbers"]:
        inputs["numbers"] = torch.cat([part.numbers for part in parts if part.numbers is not None])
    if facts["contextual"]:
        users = [part for part in parts if part.context]
        inputs["context"] = torch.cat([rows_of(n, [user.context[n] for user in users]) for n in facts["contextual"]])
    return inputs


def _padded(kind: str, lengths: Sequence[int], ends: Sequence[int]) -> dict[str, Tensor]:
    total = sum(lengths)
    padded = pad_sequence(torch.arange(total).split([*lengths]), batch_first=True, padding_value=total)
    places = (padded.view(-1) < total).nonzero().view(-1)
    return {f"{kind}padded": padded, f"{kind}places": places, f"{kind}history_ends": int64s(ends)}
