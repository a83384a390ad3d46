"""Convert sequences of ids to the inputs of an exported program."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache import Prefix, joined_prefixes
from .encode import Events
from .files import Table, run_indices


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


def tokens_per_candidate(facts: Mapping[str, Any]) -> int:
    """1 if candidates are apart: nothing sees their actions, which are then left out."""
    return 1 if facts["candidates"]["apart"] else int(facts["tokens_per_item"])


def num_tokens(facts: Mapping[str, Any], sequence: Sequence_) -> int:
    """Tokens of a sequence after its prefix, which has the context."""
    context = 0 if sequence.cached_items else len(facts["contextual"])
    shown = 0 if sequence.candidates is None else sequence.candidates.length
    return context + sequence.events.length * facts["tokens_per_item"] + shown * tokens_per_candidate(facts)


def inputs_of(
    facts: Mapping[str, Any], tables: Mapping[str, Table], sequences: Sequence[Sequence_]
) -> tuple[dict[str, Tensor], list[int]]:
    """(inputs of the program, see hstu/model/program.py; number of outputs of each sequence)."""
    parts = [part for each in sequences for part in (each.events, each.candidates) if part is not None]
    inputs = _table_rows(facts, tables, parts)
    per_item, num_context = facts["tokens_per_item"], len(facts["contextual"])
    items = torch.tensor([each.new_items for each in sequences])
    cached = torch.tensor([each.cached_items for each in sequences])
    shown = torch.tensor([0 if each.candidates is None else each.candidates.length for each in sequences])
    # Unless "apart", the attention mask treats the candidate as the newest event of the history.
    apart = shown if facts["candidates"]["apart"] else torch.zeros_like(shown)
    before = torch.where(cached > 0, num_context + cached * per_item, 0)  # tokens of the prefix
    ends = num_context + (cached + items - apart) * per_item
    lengths = torch.tensor([num_tokens(facts, each) for each in sequences])
    sequence, place = run_indices(lengths)
    place = place + before[sequence]  # in the sequence with its prefix
    first_item = items.cumsum(0) - items
    inputs["positions"] = position = torch.minimum(place, ends[sequence])
    of_sequence = (position - num_context).clamp(min=0) // per_item + place - position - cached[sequence]
    item = first_item[sequence] + of_sequence.clamp(min=0)
    row = num_context * len(items) + item + (position - num_context) % per_item * int(items.sum())
    inputs["order"] = torch.where(place < num_context, place * len(items) + sequence, row)
    inputs |= _padded("", lengths, ends)
    if "prefix" in facts["inputs"]:
        inputs |= joined_prefixes(facts, [each.prefix for each in sequences])
    if "is_history" in facts["inputs"]:
        of_item, place_of_item = run_indices(items)
        inputs["is_history"] = (place_of_item < (items - shown)[of_item]).float()
    if "token_times" in facts["inputs"]:
        times = _joined([part.times for part in parts])[item]
        at = torch.stack([each.events.at for each in sequences if each.events.at is not None])[sequence]
        inputs["token_times"] = inputs["query_times"] = times
        if facts["asks_for_next"]:  # the time of the next token, or of the request, or its own
            following = torch.cat([times[1:], times[-1:]])
            queries = torch.where(place + 1 < ends[sequence], following, times)
            is_asked = place + 1 == ends[sequence]
            inputs["query_times"] = torch.where(is_asked, at, queries) if facts["request_follows"] else queries
    if facts["truncate_to_items"] is not None:
        removed = (ends - num_context - facts["truncate_to_items"] * per_item).clamp(min=0)
        is_kept = (place < num_context) | (place >= num_context + removed[sequence])
        inputs["kept"] = is_kept.nonzero().squeeze(1)
        inputs |= _padded("kept_", lengths - removed, ends - removed)
    counts = shown.clamp(min=1) if facts["task"] == "ranking" else torch.ones_like(shown)
    run, output = run_indices(counts)
    last = lengths.cumsum(0)[run]
    back = (counts[run] - output) * tokens_per_candidate(facts) if facts["task"] == "ranking" else 1
    inputs["outputs"] = last - back
    return {name: inputs[name] for name in facts["inputs"]}, counts.tolist()


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
    if facts["numbers"]:
        inputs["numbers"] = _joined([part.numbers for part in parts])
    if facts["contextual"]:
        users = [part for part in parts if part.context]
        inputs["context"] = torch.cat([rows_of(n, [user.context[n] for user in users]) for n in facts["contextual"]])
    return inputs


def _joined(parts: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([part for part in parts if part is not None])


def _padded(kind: str, lengths: Tensor, ends: Tensor) -> dict[str, Tensor]:
    sequence, place = run_indices(lengths)
    longest = int(lengths.max())
    places = sequence * longest + place
    padded = torch.full((len(lengths) * longest,), len(places))
    padded[places] = torch.arange(len(places))
    return {f"{kind}padded": padded.view(-1, longest), f"{kind}places": places, f"{kind}history_ends": ends}
