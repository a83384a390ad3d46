"""From sequences of ids to the inputs of the program: rows of tables, where each token is, what it sees and when."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .encode import Events
from .files import Table

SCORES_AT_ONCE = 1 << 19
"""Attention scores that are computed at once, unless one sequence has more: 6 sequences of 200 tokens and 2 heads.

Few sequences of similar lengths are padded by less than many, and what is computed of them stays in the caches.
"""

Program = Callable[[dict[str, Tensor]], Tensor]
Sequence_ = tuple[Events, "Events | None"]
"""Events of a user, and candidates to score; None: the newest event is read."""


def run(
    program: Program, facts: Mapping[str, Any], tables: Mapping[str, Table], sequences: Sequence[Sequence_]
) -> list[Tensor]:
    """What the program predicts for each sequence, [number of outputs of the sequence, width]."""
    lengths = [_num_items(sequence) * facts["tokens_per_item"] + len(facts["contextual"]) for sequence in sequences]
    order = sorted(range(len(sequences)), key=lengths.__getitem__)  # sequences of one chunk are padded to the longest
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * facts["heads"] * lengths[order[stop]] ** 2 <= SCORES_AT_ONCE:
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
