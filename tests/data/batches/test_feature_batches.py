"""Random tables with any kinds of columns -> store -> the batches of every split, against a few lines of pandas."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.config.args import DatasetArgs, Task
from hstu.data.batches.batch import HSTUBatch, packed, unpacked
from hstu.data.datasets.spec import UNKNOWN
from hstu.data.preprocess import InteractionColumns, import_interactions
from hstu.data.sampling.sampler import BatchPlan
from hstu.data.sampling.samples import build_samples
from hstu.data.sampling.splits import Split
from hstu.data.store.sequence_store import SequenceStore
from tests.data.collators import assert_same, build_collator

SEED, BATCH_SIZE = 7, 3
CONTEXT, ITEM, LISTS, EVENT = ["town", "age"], ["maker", "size"], ["tags"], ["device", "place"]
TIMES = ["hour_of_day", "day_of_week", "time_gap"]
NUMBERS = {"price": "item", "watched": "event"}
VALUES = ["", "a", "b", "C", "é", "10"]
SPLITS: dict[Task, tuple[Split, ...]] = {"retrieval": ("train", "valid", "test"), "ranking": ("train", "valid")}
Sample = dict[str, Any]
"""Raw values: those of the user, of the events and of their items by name, the labels, the target."""


@st.composite
def schemas(draw: st.DrawFn) -> dict[str, Any]:
    """Which columns the tables have, and how they are split and read."""
    has_action, has_time = draw(st.booleans()), draw(st.booleans())
    some = {
        name: draw(st.lists(st.sampled_from(list(names)), unique=True))
        for name, names in (
            ("context", CONTEXT),
            ("item", ITEM),
            ("lists", LISTS),
            ("event", EVENT),
            ("numbers", NUMBERS),
        )
    }
    task: Task = draw(st.sampled_from(["retrieval", "ranking"] if has_action else ["retrieval"]))
    split = draw(st.sampled_from(["given", "auto"] + ["time"] * (has_time and task == "ranking")))
    return some | {
        "action": has_action,
        "time": has_time,
        "times": draw(st.lists(st.sampled_from(TIMES), unique=True)) if has_time else [],
        "task": task,
        "split": split,
        "candidates": draw(st.integers(0, 2)) if task == "ranking" and split != "given" else 0,
        "length": 100 if split == "given" else draw(st.integers(3, 12)),
    }


def random_tables(seed: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """(events in order of time within a user, one row per user, one row per item, some of which no event has)."""
    rng = np.random.default_rng(seed)
    users = [f"u{number}" for number in range(rng.integers(2, 7))]
    lengths = rng.integers(1, 16, len(users))
    size = int(lengths.sum())
    events = pd.DataFrame({"user": np.repeat(users, lengths), "item": rng.choice([f"i{n}" for n in range(9)], size)})
    steps = [rng.integers(0, 60_000, length) * rng.integers(0, 2, length) for length in lengths]  # half of them are 0
    events["at"] = 10**6 + np.concatenate([step.cumsum() for step in steps])
    events["action"] = rng.integers(0, 4, size)
    place = np.concatenate([np.linspace(0, 0.999, length) for length in lengths])
    events["split"] = np.array(["train", "valid", "test"])[np.searchsorted([0.5, 0.8], place)]
    for name in EVENT:
        events[name] = rng.choice(VALUES, size)
    events["watched"] = rng.choice(["", "0.5", "-2", "1e9"], size)
    events.loc[0, "watched"] = "0.5"  # a column of numbers without any is refused
    context = pd.DataFrame({"user": users} | {name: rng.choice(VALUES, len(users)) for name in CONTEXT})
    items = pd.DataFrame({"item": [f"i{n}" for n in range(8)] + ["other"]})  # i8 has no row
    for name in ITEM:
        items[name] = rng.choice(VALUES, len(items))
    items["price"] = [f"{number / 4}" for number in rng.integers(0, 99, len(items))]
    items.loc[items["item"].isin(rng.permutation(items["item"])[:3]), "price"] = ""
    if not items.price[items["item"].isin(events["item"])].any():
        items["price"] = "1.5"
        events.loc[0, "item"] = "i0"
    items["tags"] = ["|".join(rng.choice(["a", "b", "Ω"], rng.integers(0, 4))) for _ in range(len(items))]
    return events, context, items


def reference(
    schema: Mapping[str, Any], tables: tuple[pd.DataFrame, ...], split: Split, chosen: set[str]
) -> Iterator[Sample]:
    events, context, items = tables
    rows = events.merge(items, on="item", how="left").fillna("").merge(context, on="user").replace("", UNKNOWN)
    rows["tags"] = [[UNKNOWN] if text == UNKNOWN else text.split("|") for text in rows.tags]
    for name in NUMBERS:
        rows[name] = pd.Series([None if text == UNKNOWN else float(text) for text in rows[name]], dtype=object)
    rows["hour_of_day"] = rows["at"] // 3600 % 24
    rows["day_of_week"] = pd.to_datetime(rows["at"], unit="s").dt.dayofweek
    rows["time_gap"] = codes_of_gaps(rows.groupby("user")["at"].diff())
    cut = np.sort(rows["at"])[int(0.7 * len(rows))]
    for user, whole in rows.groupby("user", sort=True):
        later = whole["at"] >= cut if schema["split"] == "time" else whole.split != "train"
        if user not in chosen:
            continue
        if schema["task"] == "retrieval":
            ends = [len(whole) - {"train": 2, "valid": 2, "test": 1}[split]]
            if schema["split"] == "given":
                ends = [int((~later).sum())] if split == "train" else np.flatnonzero(whole.split == split).tolist()
            runs = [(whole[:end], end - 1 if split == "train" else 0) for end in map(lambda end: max(end, 0), ends)]
            runs = [(run, labels) for run, labels in runs if len(run) > (split == "train")]
        elif schema["split"] == "auto":
            runs = [(whole, len(whole))]
        elif split == "train":
            runs = [(whole[~later], int((~later).sum()))]
        else:
            end = whole if schema["split"] == "time" else whole[whole.split != ("test" if split == "valid" else "")]
            runs = [(end, int((later if schema["split"] == "time" else end.split == split).sum()))]
        for run, labels in runs:
            shown = min(schema["candidates"], labels)
            if len(run) < 1 + shown or (schema["task"] == "ranking" and labels == 0):
                continue
            newest, least = run[-(schema["length"] - schema["candidates"] + shown) :], schema["task"] == "retrieval"
            first = len(newest) - shown  # candidates follow the newest event of the history
            gaps = codes_of_gaps(newest["at"][first:] - newest["at"].iloc[first - 1])
            newest = newest.assign(time_gap=[*newest.time_gap[:first], *gaps])
            labels = shown if schema["candidates"] else min(labels, len(newest) - least)
            target = whole.item.iloc[len(run)] if least and split != "train" else None
            yield sample_of(schema, newest, labels, shown, target, set(run.item) if target else None)


def codes_of_gaps(seconds: Iterable[float]) -> list[int]:
    return [0 if np.isnan(each) else 1 + int(each + 1).bit_length() - 1 for each in seconds]


def sample_of(schema, newest, labels, shown, target, seen) -> Sample:  # type: ignore[no-untyped-def]
    names = [
        *schema["item"],
        *schema["lists"],
        *schema["event"],
        *schema["times"],
        *schema["numbers"],
        *(["action"] if schema["action"] else []),
    ]
    labelled = newest["item" if schema["task"] == "retrieval" else "action"].tolist()
    return {
        "user": newest.user.iloc[0],
        "context": [newest[name].iloc[0] for name in schema["context"]],
        "events": {name: newest[name].tolist() for name in ["item", *names]},
        "times": newest["at"].tolist() if schema["time"] else None,
        "labels": labelled[len(labelled) - labels :],
        "candidates": shown,
        "target": target,
        "seen": seen,
    }


def found(schema: Mapping[str, Any], store: SequenceStore, args: DatasetArgs, split: Split) -> Iterator[Sample]:
    """The samples of all batches of a split, in raw values."""
    task: Task = schema["task"]
    samples = build_samples(store, args, task, split, SEED)
    collator = build_collator(
        store, samples, args, task, batch_size=BATCH_SIZE, seed=SEED, wants_timestamps=schema["time"],
        wants_seen=task == "retrieval" and split != "train",
    )  # fmt: skip
    empty = collator(BatchPlan.of(np.arange(0)))
    for first in range(0, len(samples), BATCH_SIZE):
        batch = collator(BatchPlan.of(np.arange(first, min(first + BATCH_SIZE, len(samples)))))
        assert_same(unpacked(batch, *packed(empty)), empty)  # as a rank gets it that has samples
        yield from in_raw_values(schema, store, unpacked(empty, *packed(batch)))


def in_raw_values(schema: Mapping[str, Any], store: SequenceStore, batch: HSTUBatch) -> Iterator[Sample]:
    def raw(name: str, codes: Any) -> list[Any]:
        has_vocabulary = name in store.features and store.feature(name).has_vocab
        return list(store.raw_ids(name)[codes]) if has_vocabulary else [int(code) for code in codes]

    jagged = {name: [row.numpy() for row in values.to_dense()] for name, values in batch.features.to_dict().items()}
    lists, times, ends = {}, None, np.cumsum(batch.item_lengths)
    if batch.items.list_lengths is not None:
        of_events = np.split(batch.items.list_lengths.numpy(), ends[:-1], axis=1)
        lists = {name: [row[place] for row in of_events] for place, name in enumerate(schema["lists"])}
    splits = np.cumsum(batch.num_labels.numpy())[:-1]
    labels = np.split(batch.labels.numpy(), splits) if len(batch.labels) == batch.num_labels_total else []
    if batch.items.timestamps is not None:
        times = np.split(batch.items.timestamps.numpy(), ends[:-1])
    for row in range(batch.batch_size):
        if row >= batch.real_batch_size:
            assert all(len(values[row]) == 0 for values in jagged.values()), "missing sequences are empty"
            continue
        of_row = {name: raw(name, values[row]) for name, values in jagged.items() if name not in schema["context"]}
        for name, lengths in lists.items():
            parts = np.split(np.array(of_row[name], dtype=object), np.cumsum(lengths[row])[:-1])
            of_row[name] = [part.tolist() for part in parts]
        if batch.items.numbers is not None:
            numbers = batch.items.numbers[ends[row] - batch.item_lengths[row] : ends[row]].T.tolist()
            for name, values in zip(schema["numbers"], numbers, strict=True):
                of_row[name] = [None if np.isnan(value) else value for value in values]
        is_evaluation = batch.seen is not None
        seen = None
        if batch.seen is not None:
            seen = set(raw("item", batch.seen.values.split(batch.seen.lengths.tolist())[row].numpy()))
        label = "item" if schema["task"] == "retrieval" else "action"
        yield {
            "user": store.raw_ids("user_id")[batch.user_ids[row]],
            "context": [raw(name, jagged[name][row])[0] for name in schema["context"]],
            "events": of_row,
            "times": None if times is None else times[row].tolist(),
            "labels": [] if is_evaluation else raw(label, labels[row]),
            "candidates": int(batch.num_candidates[row]),
            "target": raw("item", batch.labels[row : row + 1].numpy())[0] if is_evaluation else None,
            "seen": seen,
        }


def make_store(schema: Mapping[str, Any], tables: tuple[pd.DataFrame, ...], folder: Path) -> SequenceStore:
    files = [folder / name for name in ("events.csv", "users.csv", "items.csv")]
    for table, file in zip(tables, files, strict=True):
        table.to_csv(file, index=False)
    of_kind = {kind: [name for name in schema["numbers"] if NUMBERS[name] == kind] for kind in ("item", "event")}
    columns = InteractionColumns(
        interactions=files[0], user="user", item="item",
        action="action" if schema["action"] else None, time="at" if schema["time"] else None,
        split="split" if schema["split"] == "given" else None,
        context=files[1] if schema["context"] else None, context_columns=tuple(schema["context"]),
        items=files[2] if schema["item"] or schema["lists"] or "price" in schema["numbers"] else None,
        item_columns=(*schema["item"], *schema["lists"], *of_kind["item"]), lists=dict.fromkeys(schema["lists"], "|"),
        event_columns=(*schema["event"], *of_kind["event"]), numbers=tuple(schema["numbers"]),
    )  # fmt: skip
    return SequenceStore.open(import_interactions("mine", columns, output=folder / "store"))


def check(schema: Mapping[str, Any], seed: int) -> None:
    tables = random_tables(seed)
    side = [*schema["item"], *schema["lists"], *schema["event"], *schema["times"], *schema["numbers"]]
    args = DatasetArgs(
        dataset_name="mine", max_sequence_length=schema["length"], max_num_candidates=schema["candidates"],
        side_feature_names=side, split="auto" if schema["split"] == "given" else schema["split"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(schema, tables, Path(folder))
        chosen = everyone = set(tables[0].user)
        for split in SPLITS[schema["task"]]:
            batches = list(found(schema, store, args, split))
            if schema["task"] == "ranking" and schema["split"] == "auto":  # by a hash: test_samples.py
                chosen = {sample["user"] for sample in batches} if split == "train" else everyone - chosen
            assert batches == list(reference(schema, tables, split, chosen)), split


@settings(max_examples=5)
@given(schemas(), st.integers(0, 2**32))
def test_batches_are_those_of_the_reference(schema: dict[str, Any], seed: int) -> None:
    check(schema, seed)
